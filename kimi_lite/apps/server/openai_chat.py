"""`/v1/chat/completions`: OpenAI's body to a chat request, and its answers back, in one document or as chunks."""

import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kimi_lite.apps.server import sse
from kimi_lite.apps.server.bodies import read_body
from kimi_lite.apps.server.chat import ChatRequest, Choice, Prepared
from kimi_lite.apps.server.errors import ApiError
from kimi_lite.apps.server.merge import merged
from kimi_lite.apps.server.messages import read_choice, read_messages, read_tools
from kimi_lite.apps.server.openai_models import ChatBody, Sampled
from kimi_lite.apps.server.state import ServerState, client_of
from kimi_lite.engine.service import Progress
from kimi_lite.engine.types import TOP_P, Logprobs, SamplingParams, Stats, Token

_FINISH = {"cancelled": "stop"}  # all others are the API's own words, or say what they mean ("repetition")


async def chat_completions(http: HttpRequest) -> Response:
    """POST /v1/chat/completions."""
    state: ServerState = http.app.state.server
    body = await read_body(http, ChatBody)
    chat = to_chat(body, state, client_of(http, body.prompt_cache_key or body.user))
    prepared = await state.chats.prepare(chat)
    writer = _Writer(state, body, prepared, state.chats.open(prepared))
    if body.stream:
        return sse.stream(writer.chunks())
    return await sse.unless_gone(http, writer.document())


def to_chat(body: ChatBody, state: ServerState, client: str) -> ChatRequest:
    """What the body asks for; ApiError 400 for what it cannot have."""
    engine = state.service.require_ready()
    tools = [*(body.tools or []), *({"type": "function", "function": f} for f in body.functions or [])]
    declared = read_tools(tools, state.can_call, engine.info.name)
    choice = body.tool_choice if body.tool_choice is not None else body.function_call
    return ChatRequest(
        messages=read_messages(body.messages, can_see=False),
        tools=declared,
        tool_choice=read_choice(choice, declared),
        has_parallel_calls=body.parallel_tool_calls is not False,
        is_thinking=_is_thinking(body),
        keeps_reasoning=_keeps_reasoning(body),
        max_reasoning_tokens=_reasoning_tokens(body),
        sampling=sampling_of(body, body.max_completion_tokens or body.max_tokens, _num_logprobs(body)),
        temperature=body.temperature,
        num_choices=body.n or 1,
        json_schema=_schema(body),
        client=client,
    )


def sampling_of(body: Sampled, max_tokens: int | None, num_logprobs: int | None) -> SamplingParams:
    """The sampling fields; the temperature is the mode's where none is given, which `Chats` fills in."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=TOP_P if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or body.repeat_penalty or 1.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=_biases(body.logit_bias or {}),
        num_logprobs=num_logprobs,
        seed=None if body.seed is None else body.seed % (1 << 63),
        max_tokens=max_tokens,
        stop=tuple(text for text in stop if text),
        ignore_eos=body.ignore_eos,
    )


def _biases(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(token_id), bias) for token_id, bias in biases.items())
    except ValueError:
        raise ApiError(400, "logit_bias must have token ids as keys.", "invalid_value", "logit_bias") from None


def _is_thinking(body: ChatBody) -> bool | None:
    """The vendor's field first, then vLLM's and SGLang's, then OpenAI's effort."""
    if body.thinking is not None:
        return body.thinking.type == "enabled"
    switches = body.chat_template_kwargs or {}
    for name in ("thinking", "enable_thinking"):
        if isinstance(switches.get(name), bool):
            return switches[name]
    return None if body.reasoning_effort is None else body.reasoning_effort not in ("none", "minimal")


def _keeps_reasoning(body: ChatBody) -> bool:
    switches = body.chat_template_kwargs or {}
    return bool(body.thinking and body.thinking.keep) or switches.get("preserve_thinking") is True


def _reasoning_tokens(body: ChatBody) -> int | None:
    if body.thinking is not None and body.thinking.budget_tokens is not None:
        return body.thinking.budget_tokens
    budget = body.thinking_budget_tokens
    return None if budget is None or budget < 0 else budget


def _num_logprobs(body: ChatBody) -> int | None:
    return (body.top_logprobs or 0) if body.logprobs else None


def _schema(body: ChatBody) -> dict[str, Any] | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    schema = wanted.json_schema and wanted.json_schema.schema_
    if schema is None:
        raise ApiError(400, "response_format.json_schema.schema is missing.", "invalid_value", "response_format")
    return schema


@dataclass(slots=True)
class _Said:
    """What came of one choice so far."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] | None = None  # None: it was not in a thinking mode
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    stats: Stats | None = None

    def add(self, token: Token) -> None:
        self.stats = token.stats
        if token.unsaid:  # it was reasoning after all
            self.reasoning, self.content = [*(self.reasoning or []), *self.content], []
        elif token.kind == "reasoning":
            self.reasoning = [*(self.reasoning or []), token.text]
        elif token.kind == "content":
            self.content.append(token.text)
        elif token.call is not None:
            function = {"name": token.call.name, "arguments": ""}
            self.calls.append({"id": token.call.id, "type": "function", "function": function})
        elif token.call_index is not None and token.call_index < len(self.calls):
            self.calls[token.call_index]["function"]["arguments"] += token.text
        self.finish_reason = token.finish_reason or self.finish_reason


class _Writer:
    """The answer to one request, in OpenAI's shape."""

    def __init__(self, state: ServerState, body: ChatBody, prepared: Prepared, answers: Sequence[Choice]) -> None:
        self._state, self._body, self._prepared, self._answers = state, body, prepared, answers
        self._tokenizer = state.service.require_ready().tokenizer
        self._head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": state.model_name}
        starts = prepared.requests[0].starts_in_reasoning
        self._choices = [_Said(reasoning=[] if starts else None) for _ in prepared.requests]

    async def document(self) -> Response:
        """The whole answer at once."""
        async for i, event in merged(self._answers):
            if isinstance(event, Token):
                _raise_failure(event)
                self._choices[i].add(event)
                self._add_logprobs(i, event)
        choices = [self._whole(i, choice) for i, choice in enumerate(self._choices)]
        self._state.log_answer(self._prepared, [choice.stats for choice in self._choices])
        return JSONResponse(
            {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage(), **self._timings()}
        )

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The answer as it comes. The first chunk goes out at once."""
        for i in range(len(self._choices)):
            yield self._chunk(i, {"role": "assistant", "content": ""})
        try:
            async for item in sse.with_keepalive(merged(self._answers), lambda: [sse.KEEPALIVE, self._chunk(0, {})]):
                if isinstance(item, bytes):
                    yield item
                    continue
                i, event = item
                if isinstance(event, Progress):
                    if self._body.return_progress:
                        yield self._progress(event)
                    continue
                _raise_failure(event)
                self._choices[i].add(event)
                for delta, reason in self._deltas(event):
                    yield self._chunk(i, delta, reason, event.logprobs)
        except Exception as error:
            self._state.log_failure(error)
            yield sse.event(ApiError.of(error).openai())
            return
        finally:
            self._state.log_answer(self._prepared, [choice.stats for choice in self._choices])
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield sse.event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage(),
                             **self._timings()})  # fmt: skip
        yield b"data: [DONE]\n\n"

    def _deltas(self, token: Token) -> list[tuple[dict[str, Any], str | None]]:
        """The deltas of one token: text of its kind, and at the end a finish reason alone."""
        deltas: list[tuple[dict[str, Any], str | None]] = []
        if token.kind == "tool_call":
            index = token.call_index or 0
            if token.call is not None:
                function = {"name": token.call.name, "arguments": token.text}
                call = {"index": index, "id": token.call.id, "type": "function", "function": function}
                deltas.append(({"tool_calls": [call]}, None))
            elif token.text:
                deltas.append(({"tool_calls": [{"index": index, "function": {"arguments": token.text}}]}, None))
        elif token.text:
            name = "reasoning_content" if token.kind == "reasoning" else "content"
            deltas.append(({name: token.text}, None))
        if token.finish_reason is not None:
            deltas.append(({}, _FINISH.get(token.finish_reason, token.finish_reason)))
        return deltas

    def _chunk(
        self, i: int, delta: dict[str, Any], reason: str | None = None, logprobs: Logprobs | None = None
    ) -> bytes:
        choice: dict[str, Any] = {"index": i, "delta": delta, "finish_reason": reason}
        if logprobs is not None and "content" in delta:
            choice["logprobs"] = {"content": [self._logprob(logprobs)]}
        return sse.event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})

    def _progress(self, event: Progress) -> bytes:
        """As llama-server tells it: an empty delta with how far the prompt is."""
        progress = {"total": event.total_tokens, "processed": event.done_tokens}
        choice = {"index": 0, "delta": {}, "finish_reason": None}
        return sse.event(
            {**self._head, "object": "chat.completion.chunk", "choices": [choice], "prompt_progress": progress}
        )

    def _whole(self, i: int, choice: _Said) -> dict[str, Any]:
        content = "".join(choice.content)
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not choice.calls else None}
        if choice.reasoning is not None:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.calls:
            message["tool_calls"] = choice.calls
        reason = choice.finish_reason or "stop"
        whole = {"index": i, "message": message, "finish_reason": _FINISH.get(reason, reason)}
        return {**whole, "logprobs": {"content": choice.logprobs}} if self._body.logprobs else whole

    def _add_logprobs(self, i: int, token: Token) -> None:
        if token.logprobs is not None and token.kind == "content":
            self._choices[i].logprobs.append(self._logprob(token.logprobs))

    def _logprob(self, logprobs: Logprobs) -> dict[str, Any]:
        def entry(token_id: int, value: float) -> dict[str, Any]:
            data = self._tokenizer.decode_bytes(token_id)
            return {"token": data.decode("utf-8", "replace"), "logprob": value, "bytes": list(data)}

        return {**entry(*logprobs.chosen), "top_logprobs": [entry(*top) for top in logprobs.top]}

    def _usage(self) -> dict[str, Any]:
        return usage([choice.stats for choice in self._choices], self._prepared)

    def _timings(self) -> dict[str, Any]:
        stats = self._choices[0].stats
        return {} if stats is None else {"timings": timings(stats)}


def usage(stats: list[Stats | None], prepared: Prepared) -> dict[str, Any]:
    """Prompt tokens count once, however many choices."""
    known = [each for each in stats if each is not None]
    num_prompt, num_cached = prepared.num_prompt_tokens, known[0].cached_tokens if known else 0
    num_generated = sum(each.generated_tokens for each in known)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "cached_tokens": num_cached,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def timings(stats: Stats) -> dict[str, Any]:
    """llama-server's names."""
    num_read = stats.prompt_tokens - stats.cached_tokens
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": num_read,
        "prompt_ms": round(1e3 * stats.prompt_s, 3),
        "prompt_per_second": stats.prompt_tok_s,
        "predicted_n": stats.generated_tokens,
        "predicted_ms": round(1e3 * stats.generation_s, 3),
        "predicted_per_second": stats.generation_tok_s,
    }


def dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _raise_failure(event: object) -> None:
    if isinstance(event, Token) and event.failure is not None:
        raise event.failure
