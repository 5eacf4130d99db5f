"""Our side of `tools.bench`: the engine as every front end uses it, and the clock around it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from kimi_lite.arch.config import ModelConfig
from kimi_lite.engine.loader import load
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.options import Options
from kimi_lite.tools.bench.plan import BenchTest, Prompt, context_needed

_MAX_LUCK = 8  # tokens with which two passages may begin alike


@dataclass(frozen=True, slots=True)
class Run:
    """One timed repeat. `seconds` is the time of the tokens that the test names, and of no others."""

    seconds: float
    num_tokens: int  # really computed; a passage may begin like one that is still in the cache
    first_token_s: float  # from the request to its first token; of the slowest sequence
    gaps_s: tuple[float, ...]  # between the tokens of a sequence
    counters: Mapping[str, float] = field(default_factory=dict)  # what the tiers of experts did meanwhile
    waited_s: float | None = None  # that threads had no core, of a program in another process

    @property
    def tok_s(self) -> float:
        return self.num_tokens / self.seconds


class Ours:
    """A loaded model with a cache for all sequences of the largest test, twice, so that prefixes stay in it."""

    name = "kimi-lite"

    def __init__(self, tests: Sequence[BenchTest], options: Options) -> None:
        """options: of a model that is named. Raises KimiLiteError where a test or the model does not fit."""
        self.store = GGUFStore.open(options.model)
        self.config = ModelConfig.from_metadata(self.store.metadata, self.store.path.name)
        longest, have = context_needed(tests), self.config.context_length
        if longest > have:
            raise KimiLiteError(
                f"The longest test needs {longest:,} tokens of context; the model has {have:,}.",
                "Use a smaller -d or -p.",
            )
        num_sequences = 2 * max(test.num_sequences for test in tests)
        self.engine = load(
            self.store.path, replace(options, context_length=longest, num_sequences=num_sequences, prefix_folder=None)
        )
        self.plan, self.tokenizer = self.engine.plan, self.engine.tokenizer
        self._num_requests = 0

    @property
    def is_on_gpu(self) -> bool:
        return self.plan.is_on_gpu

    @property
    def num_threads(self) -> int:
        return self.plan.num_threads

    def close(self) -> None:
        self.engine.close()

    def run(self, test: BenchTest, prompts: Sequence[Prompt]) -> Run:
        """Brings the prefixes into the cache, then times what comes after them."""
        for prompt in prompts:
            if prompt.prefix:
                self._generate([prompt.prefix], 1)
        is_prompt = test.kind == "pp"
        before = self.engine.counters()
        start_s = time.perf_counter()
        arrivals, num_cached = self._generate(
            [p.prefix + p.fresh for p in prompts], 1 if is_prompt else test.num_tokens + 1
        )
        too_much = num_cached - sum(len(prompt.prefix) for prompt in prompts)
        assert 0 <= too_much <= _MAX_LUCK * len(prompts), (num_cached, test)
        steps_s = [max(step) for step in zip(*arrivals, strict=True)]
        seconds = steps_s[0] - start_s if is_prompt else steps_s[-1] - steps_s[0]
        gaps_s = tuple(b - a for a, b in pairwise(steps_s))
        counters = {name: value - before.get(name, 0) for name, value in self.engine.counters().items()}
        return Run(seconds, test.total_tokens - too_much, steps_s[0] - start_s, gaps_s, counters)

    def _generate(self, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> tuple[list[list[float]], int]:
        """When each token of each sequence came, and how many prompt tokens were in the cache."""
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        requests = [Request(f"{self._num_requests + i}", prompt, sampling) for i, prompt in enumerate(prompts)]
        self._num_requests += len(requests)
        arrivals: dict[str, list[float]] = {request.id: [] for request in requests}
        num_cached = dict.fromkeys(arrivals, 0)
        for token in self.engine.generate(requests):
            if token.id is not None:
                arrivals[token.request_id].append(time.perf_counter())
                num_cached[token.request_id] = token.stats.cached_tokens
        return list(arrivals.values()), sum(num_cached.values())


Runner = Callable[[BenchTest, Sequence[Prompt]], Run]  # `Ours.run`, `llama.Llama.run` or `ik_llama.IkLlama.run`
