"""What `tools.bench` measures, in llama-bench's language: `pp512`, `tg128`, `tg128 @ d4096`, and the tokens that go
in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kimi_lite.engine.scoring import TEXT
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.units import parse_token_count

_SEQUENCE_STRIDE, _PASSAGE_STRIDE = 997, 641  # tokens of the text between two beginnings


@dataclass(frozen=True, slots=True)
class BenchTest:
    """`num_tokens` prompt tokens ("pp") or generated ones ("tg") for each sequence, after `depth` tokens of context."""

    kind: Literal["pp", "tg"]
    num_tokens: int
    depth: int = 0
    num_sequences: int = 1

    @property
    def name(self) -> str:
        batch = f" x{self.num_sequences}" if self.num_sequences > 1 else ""
        return f"{self.kind}{self.num_tokens}{f' @ d{self.depth}' if self.depth else ''}{batch}"

    @property
    def total_tokens(self) -> int:
        """Tokens that are timed."""
        return self.num_tokens * self.num_sequences

    @property
    def context_tokens(self) -> int:
        """Of each sequence, at its end; generation begins with a prompt of at least one token."""
        return max(self.depth, 1) + self.num_tokens + 1

    @property
    def mean_depth(self) -> float:
        return self.depth + self.num_tokens / 2


@dataclass(frozen=True, slots=True)
class Prompt:
    """Of one sequence: `prefix` is in the cache before the clock starts, `fresh` is not, or for its first few
    tokens."""

    prefix: tuple[int, ...]
    fresh: tuple[int, ...]


def plan_tests(prompt: str, generate: str, depths: str, batches: str, is_sweep: bool) -> list[BenchTest]:
    """Every combination of llama-bench's comma-separated lists; a sweep fills the depths in steps of the prompt
    length."""
    prompts, generated = _numbers("-p", prompt), _numbers("-n", generate)
    at, num_sequences = _numbers("-d", depths), _numbers("-b", batches)
    if is_sweep:
        step = max(prompts)
        if not step:
            raise KimiLiteError("--sweep goes down the context in steps of -p, and -p is 0.", "Try -p 512.")
        at = list(range(min(at), max(at) + 1, step))
    if not (at and num_sequences and min(num_sequences) > 0):
        raise KimiLiteError("-d needs a depth and -b a number of sequences above 0.", "Try -d 0 -b 1.")
    tests = [
        BenchTest(kind, count, depth, batch)
        for batch in num_sequences
        for depth in at
        for kind, counts in (("pp", prompts), ("tg", generated))
        for count in counts
        if count
    ]
    if not tests:
        raise KimiLiteError("Nothing to measure: -p and -n are both 0.", "Try -p 512 -n 128.")
    return list(dict.fromkeys(tests))


def _numbers(flag: str, text: str) -> list[int]:
    """`0,4096`; each may be written 4K."""
    return [parse_token_count(part, flag) for part in text.split(",") if part.strip()]


def load_tokens(tokenizer: Tokenizer, is_random: bool, num_at_least: int = 0) -> np.ndarray:
    """int32: the text in the repository, or as many random tokens; both the same every time."""
    ids = np.array(tokenizer.encode(TEXT.read_text(encoding="utf-8")), np.int32)
    if is_random:
        ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, max(len(ids), num_at_least), dtype=np.int32)
        ids[np.isin(ids, list(tokenizer.special.values()))] = 0
    return ids


class Passages:
    """Hands out prompts: the same prefixes every time, and after them always another passage, which no cache can
    know."""

    def __init__(self, ids: np.ndarray) -> None:
        self._ids, self._distinct = ids, np.unique(ids)
        self._num_given = 0

    def prompts(self, test: BenchTest) -> list[Prompt]:
        """One for each sequence of the test."""
        return [self._prompt(test, sequence * _SEQUENCE_STRIDE) for sequence in range(test.num_sequences)]

    def _prompt(self, test: BenchTest, start: int) -> Prompt:
        if test.kind == "tg":
            known = self._take(start, max(1, test.depth))
            return Prompt(known[:-1], known[-1:])
        self._num_given += 1
        unlike_others = int(
            self._distinct[self._num_given % len(self._distinct)]
        )  # so that passages differ from the start
        rest = self._take(self._num_given * _PASSAGE_STRIDE, test.num_tokens - 1)
        return Prompt(self._take(start, test.depth), (unlike_others, *rest))

    def _take(self, start: int, length: int) -> tuple[int, ...]:
        """Tokens `start .. start + length` of the text, which begins again at its end."""
        return tuple(np.take(self._ids, np.arange(start, start + length), mode="wrap").tolist())


def context_needed(tests: Sequence[BenchTest]) -> int:
    """Tokens of the longest sequence."""
    return max(test.context_tokens for test in tests)
