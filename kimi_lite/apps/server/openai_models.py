"""The bodies of OpenAI's requests, as far as they mean something here. What is unknown is ignored, what is wrong is
a 400."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

Number = Annotated[float, Field(strict=False)]
MAX_MESSAGES = 100_000


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Body(BaseModel):
    """null is the same as nothing: clients send either."""

    model_config = ConfigDict(extra="ignore", strict=False)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


class Thinking(Body):
    """The vendor's switch: `{"type": "enabled", "keep": "all"}`."""

    type: Literal["enabled", "disabled"] = "enabled"
    keep: Literal["all"] | None = None
    budget_tokens: Annotated[int, Field(ge=0)] | None = None


class StreamOptions(Body):
    include_usage: bool = False


class JsonSchema(Body):
    name: str = "answer"
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class Sampled(Body):
    """What chat completions and completions have in common."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # -1 and 0: off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None  # llama-server's name
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    return_progress: bool = False
    ignore_eos: bool = False


class ChatBody(Sampled):
    """`/v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: list[dict[str, Any]] | None = None
    functions: list[dict[str, Any]] | None = None  # before tools were
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    function_call: Literal["auto", "none"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    thinking_budget_tokens: Annotated[int, Field(ge=-1)] | None = None


class CompletionBody(Sampled):
    """`/v1/completions`. A prompt is text or token ids, or a list of them."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TokenizeBody(Body):
    content: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    with_pieces: bool = False


class DetokenizeBody(Body):
    tokens: list[int]


def is_thinking_at(effort: Effort | None) -> bool | None:
    """None: as the model does by itself."""
    return None if effort is None else effort not in ("none", "minimal")
