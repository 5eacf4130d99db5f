"""The engine's vocabulary: what is asked (`Request`), how (`SamplingParams`), and what comes back (`Token` with its
`Stats`).

Apps, server and benchmark all consume the same stream of `Token`, so they cannot disagree about what happened.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from kimi_lite.engine.loop_guard import LoopLimits
from kimi_lite.errors import KimiLiteError
from kimi_lite.kv.chain import Salt
from kimi_lite.text.stream import Kind
from kimi_lite.text.tool_calls import ToolCall

FinishReason = Literal["stop", "length", "cancelled", "tool_calls", "repetition", "error"]

THINKING_TEMPERATURE, INSTANT_TEMPERATURE, TOP_P = 1.0, 0.6, 0.95  # the vendor's recommendation for Kimi K2.5


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. Temperature 0 is greedy; the filters' defaults of 0, 0 and 1 are
    off."""

    temperature: float = THINKING_TEMPERATURE
    top_k: int = 0
    top_p: float = TOP_P
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over the prompt and what was generated
    frequency_penalty: float = 0.0  # taken from a token's logit for each time it was generated
    presence_penalty: float = 0.0  # taken once from the logits of tokens that were generated
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    num_logprobs: int | None = None  # log-probabilities of the chosen and of so many likeliest tokens; None: not wanted
    seed: int | None = None  # None: another answer every time
    max_tokens: int | None = None  # None: until the model stops or the context is full
    stop: tuple[str, ...] = ()  # the answer ends before any of these; reasoning is not searched
    ignore_eos: bool = False  # for benchmarks

    def __post_init__(self) -> None:
        _require("Temperature", self.temperature, "0 or more", 0 <= self.temperature < math.inf)
        _require("Top-k", self.top_k, "0 (off) or more", self.top_k >= 0)
        _require("Top-p", self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1)
        _require("Min-p", self.min_p, "from 0 to 1", 0 <= self.min_p <= 1)
        _require("Repetition penalty", self.repetition_penalty, "above 0", 0 < self.repetition_penalty < math.inf)
        for name, value in (("Frequency", self.frequency_penalty), ("Presence", self.presence_penalty)):
            _require(f"{name} penalty", value, "from -2 to 2", -2 <= value <= 2)
        for token_id, bias in self.logit_bias:
            _require(f"The bias of token {token_id}", bias, "from -100 to 100", -100 <= bias <= 100)
        wanted = self.num_logprobs
        _require("The number of log-probabilities", wanted, "from 0 to 20", wanted is None or 0 <= wanted <= 20)
        _require("Seed", self.seed, "0 or more", self.seed is None or self.seed >= 0)
        _require("Max tokens", self.max_tokens, "1 or more", self.max_tokens is None or self.max_tokens >= 1)
        _require("Stop", self.stop, "texts that are not empty", all(self.stop))

    def with_seed_of(self, choice: int) -> "SamplingParams":
        """For one of several answers to the same prompt: each has a seed of its own, if any has."""
        return self if self.seed is None else replace(self, seed=self.seed + choice)


class Constraint(Protocol):
    """A grammar's state for one answer: which tokens may come next. Made anew for every request."""

    def allowed(self) -> np.ndarray | None:
        """uint32 bits, (ceil(vocab / 32),): bit i % 32 of word i // 32 says whether token i may come. None: any may."""

    def accept(self, token_id: int) -> None:
        """This token came."""


class Logprob(NamedTuple):
    """Of the model's own distribution (temperature 1, before penalties and filters), natural logarithm."""

    token_id: int
    logprob: float


class Logprobs(NamedTuple):
    """Of one sampled token: its own, and the likeliest ones in falling order."""

    chosen: Logprob
    top: tuple[Logprob, ...]


class ContextExceeded(KimiLiteError):
    """A prompt that the context can never hold."""


def _require(name: str, value: object, allowed: str, is_allowed: bool) -> None:
    if not is_allowed:
        raise KimiLiteError(f"{name} is {value!r}; it must be {allowed}.")


@dataclass(frozen=True, slots=True, eq=False)
class PlacedImage:
    """An image, or a chunk of a video's frames, in a prompt: rows that stand in the place of the embeddings of as many
    equal placeholder ids."""

    position: int  # of the first placeholder
    features: np.ndarray  # float32 (tokens, D)
    digest: bytes  # of what was shown to the vision tower, and of the tower

    @property
    def end(self) -> int:
        return self.position + len(self.features)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. `id` is the caller's name for it, never used again: a late `cancel` would hit its
    namesake."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    starts_in_reasoning: bool = False  # the prompt ends inside <think>
    tools: tuple[Mapping, ...] = ()  # as declared to the model; they name calls whose id does not
    num_calls: int = 0  # of the conversation so far; new ids count on from it
    max_reasoning_tokens: int | None = None  # then </think> is put in the model's mouth; None: no limit
    constraint: Callable[[], Constraint] | None = None  # the grammar of the answer; reasoning stays free
    loop_limits: LoopLimits | None = None  # None: an answer may repeat itself
    earlier_calls: tuple[tuple[str, str], ...] = ()  # (name, arguments) of the conversation, for the loop guard
    client: str = ""  # whose request it is: clients take turns in the queue
    priority: int = 0  # of a client's requests the highest is let in first and its prompt read first
    is_plain: bool = False  # a text to go on with, no chat: the answer is all content, markers mean nothing
    images: tuple[PlacedImage, ...] = ()  # in the order of their positions

    @property
    def salts(self) -> tuple[Salt, ...]:
        """What the prompt's ids do not say: which images they stand for."""
        return tuple(Salt(image.position, image.digest) for image in self.images)


@dataclass(frozen=True, slots=True)
class Stats:
    """Of one request so far. Waiting for other requests counts into `time_to_first_token_s` only."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the cache
    prompt_s: float  # from the first prefill step to the first token
    generated_tokens: int
    generation_s: float  # from the first token to the last
    time_to_first_token_s: float

    @property
    def prompt_tok_s(self) -> float | None:
        """Tokens really prefilled, per second; None when the prompt was not read to its end."""
        is_known = self.generated_tokens > 0 and self.prompt_s > 0
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_s if is_known else None

    @property
    def generation_tok_s(self) -> float | None:
        """Decode speed: the first token came with the prompt and does not count."""
        return (self.generated_tokens - 1) / self.generation_s if self.generation_s > 0 else None


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a request's output. Text that became known only later, or of another kind, follows with `id` None."""

    request_id: str
    id: int | None
    text: str
    kind: Kind
    finish_reason: FinishReason | None
    stats: Stats
    call: ToolCall | None = None  # id and name, with the first piece of a tool call
    call_index: int | None = None  # which call of this answer a piece belongs to, from 0
    error: str | None = None  # what is wrong with a tool call: it has no tool, or its arguments are no JSON object
    logprobs: Logprobs | None = None  # of `id`, where they were asked for
    failure: Exception | None = None  # with finish reason "error": why this request alone could not go on
    stopped_by: str | None = None  # with finish reason "stop": the stop string that was met
    unsaid: str = ""  # came as content (or reasoning) before and is this token's text instead: a late `</think>`


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a front end tells its user about the model."""

    name: str
    path: Path
    total_bytes: int
    bytes_by_type: tuple[tuple[str, int], ...]  # ("Q8_0", bytes of all tensors of that type), largest first
