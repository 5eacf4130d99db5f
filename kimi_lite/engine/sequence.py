"""One request in progress: its tokens so far, its place in the cache, its sampler, its parser and its times."""

from dataclasses import dataclass, field

from kimi_lite.engine.loop_guard import LoopGuard
from kimi_lite.engine.sampler import Sampler
from kimi_lite.engine.types import Constraint, Request, Stats
from kimi_lite.kv.chain import Key, digests_of, keys_of
from kimi_lite.kv.pages import SequencePages
from kimi_lite.text.stream import StreamParser


@dataclass(slots=True, eq=False)
class Sequence:
    """Made by the engine, ordered by the scheduler. `pages` is None while it waits."""

    request: Request
    sampler: Sampler
    parser: StreamParser
    added_s: float
    constraint: Constraint | None = None
    guard: LoopGuard | None = None
    token_ids: list[int] = field(init=False)  # the prompt and everything sampled
    prompt_keys: tuple[Key, ...] = field(init=False)  # token ids, and which images they stand for
    pages: SequencePages | None = None
    num_cached: int = 0  # tokens of the prompt that were in the cache when it first ran
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)
        self.prompt_keys = tuple(keys_of(self.token_ids, digests_of(self.request.salts)))

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def generated_ids(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_ids) :]

    @property
    def num_left(self) -> int:
        """Tokens that must still run before the next one can be sampled: 1 when decoding."""
        return len(self.token_ids) - self.pages.num_computed

    @property
    def is_prompt_read(self) -> bool:
        """Whether the tokens that run next are generated ones."""
        return self.pages.num_computed >= len(self.request.prompt_ids)

    @property
    def num_left_alike(self) -> int:
        """Of those that must still run, how many are of the next one's kind: to the prompt's end, or all."""
        end = len(self.token_ids) if self.is_prompt_read else len(self.request.prompt_ids)
        return end - self.pages.num_computed

    @property
    def is_reasoning(self) -> bool:
        """Whether the next token belongs to the reasoning, as far as is known."""
        return self.parser.kind == "reasoning"

    @property
    def is_thought_out(self) -> bool:
        """Whether it still reasons after as many tokens as it may; all tokens so far were reasoning then."""
        limit = self.request.max_reasoning_tokens
        return limit is not None and self.num_generated >= limit and self.is_reasoning

    @property
    def is_in_a_loop(self) -> bool:
        """Whether the answer repeats itself, or its calls those before them. Asked once after every token."""
        if self.guard is None:
            return False
        calls = [(call.name, call.arguments) for call in self.parser.tool_calls]
        return self.guard.repeats_calls(calls) or self.guard.repeats_itself(self.generated_ids)

    def append(self, token_id: int, now_s: float) -> None:
        self.token_ids.append(token_id)
        self.first_token_s = now_s if self.first_token_s is None else self.first_token_s
        self.last_token_s = now_s

    def stats(self, now_s: float) -> Stats:
        started_s = now_s if self.started_s is None else self.started_s
        first_token_s = now_s if self.first_token_s is None else self.first_token_s
        return Stats(
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=self.num_cached,
            prompt_s=first_token_s - started_s,
            generated_tokens=self.num_generated,
            generation_s=0.0 if self.last_token_s is None else self.last_token_s - first_token_s,
            time_to_first_token_s=first_token_s - self.added_s,
        )
