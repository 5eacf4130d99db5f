"""Our side of `tools.bench`: the engine as every front end uses it, and the clock around it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import psutil

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import store_sizes
from kimi_lite.arch.tensors import check_tensors
from kimi_lite.engine.device import choose_device, find_gpu
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.loader import describe
from kimi_lite.engine.planning import choose_tier, plan_load
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.pages import KVCache, value_bytes
from kimi_lite.model.cpu.transformer import Transformer
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.options import Options
from kimi_lite.text.template import ChatTemplate
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.tools.bench.plan import BenchTest, Prompt, context_needed
from kimi_lite.units import GIB

_MAX_LUCK = 8  # tokens with which two passages may begin alike


@dataclass(frozen=True, slots=True)
class Run:
    """One timed repeat. `seconds` is the time of the tokens that the test names, and of no others."""

    seconds: float
    num_tokens: int  # really computed; a passage may begin like one that is still in the cache
    first_token_s: float  # from the request to its first token; of the slowest sequence
    gaps_s: tuple[float, ...]  # between the tokens of a sequence
    counters: Mapping[str, float] = field(default_factory=dict)  # what the tiers of experts did meanwhile

    @property
    def tok_s(self) -> float:
        return self.num_tokens / self.seconds


class Ours:
    """A loaded model with a cache for all sequences of the largest test, twice, so that prefixes stay in it."""

    name = "kimi-lite"

    def __init__(self, path: Path, tests: Sequence[BenchTest], options: Options | None = None) -> None:
        options = options or Options()
        kv_dtype = options.kv_dtype
        self.store = GGUFStore.open(path)
        self.config = ModelConfig.from_metadata(self.store.metadata, self.store.path.name)
        check_tensors(self.store, self.config)
        self.tokenizer = Tokenizer.from_metadata(self.store.metadata)
        self.sizes = store_sizes(self.store, self.config)
        self.kv_value_bytes = value_bytes(self.config, kv_dtype)
        num_pages = self._num_pages(tests)
        options = replace(
            options,
            context_length=context_needed(tests),
            num_sequences=2 * max(test.num_sequences for test in tests),
        )
        device = choose_device(options.device if options.allows_gpu else "cpu")
        self.plan = plan_load(self.store, self.config, options, gpu=find_gpu(device))
        self.is_on_gpu = device != "cpu"
        self._open_model(options, num_pages, device)
        template = ChatTemplate.from_metadata(self.store.metadata, self.tokenizer)
        info = describe(self.store, self.config)
        self.engine = Engine(self.transformer, self.kv, self.tokenizer, template, context_needed(tests), info)
        self._num_requests = 0

    def _open_model(self, options: Options, num_pages: int, device: str) -> None:
        recorder = RoutingRecorder(options.routing_trace, self.config) if options.routing_trace else None
        tier = choose_tier(self.store, self.config, self.plan, options)
        if self.is_on_gpu:
            from kimi_lite.model.hybrid import load

            parts = (self.store, self.config, options, num_pages * PAGE_TOKENS, device, lambda stage, done, total: None)
            self.transformer, self.kv = load.load_hybrid(*parts, tier, recorder)
            return
        self.kv = KVCache(self.config.num_layers, self.config.kv_latent_size, num_pages, options.kv_dtype)
        self.transformer = Transformer(
            self.store, self.config, self.kv, options.num_threads, tier=tier, recorder=recorder
        )

    @property
    def num_threads(self) -> int:
        return self.plan.num_threads if self.is_on_gpu else self.transformer.team.num_threads

    def close(self) -> None:
        self.transformer.close()

    def run(self, test: BenchTest, prompts: Sequence[Prompt]) -> Run:
        """Brings the prefixes into the cache, then times what comes after them."""
        for prompt in prompts:
            if prompt.prefix:
                self._generate([prompt.prefix], 1)
        is_prompt = test.kind == "pp"
        before = self.transformer.counters()
        start_s = time.perf_counter()
        arrivals, num_cached = self._generate(
            [p.prefix + p.fresh for p in prompts], 1 if is_prompt else test.num_tokens + 1
        )
        too_much = num_cached - sum(len(prompt.prefix) for prompt in prompts)
        assert 0 <= too_much <= _MAX_LUCK * len(prompts), (num_cached, test)
        steps_s = [max(step) for step in zip(*arrivals, strict=True)]
        seconds = steps_s[0] - start_s if is_prompt else steps_s[-1] - steps_s[0]
        gaps_s = tuple(b - a for a, b in pairwise(steps_s))
        counters = {name: value - before.get(name, 0) for name, value in self.transformer.counters().items()}
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

    def _num_pages(self, tests: Sequence[BenchTest]) -> int:
        longest = context_needed(tests)
        if longest > self.config.context_length:
            need, have = f"{longest:,}", f"{self.config.context_length:,}"
            raise KimiLiteError(
                f"The longest test needs {need} tokens of context; the model has {have}.", "Use a smaller -d or -p."
            )
        num_pages = 2 * max(test.num_sequences * -(-test.context_tokens // PAGE_TOKENS) for test in tests)
        need_bytes = num_pages * PAGE_TOKENS * self.config.kv_bytes_per_token(self.kv_value_bytes)
        have_bytes = psutil.virtual_memory().available  # a GPU's room is the plan's business
        if need_bytes > have_bytes:
            need, have = f"{need_bytes / GIB:.2f}", f"{have_bytes / GIB:.2f}"
            raise KimiLiteError(
                f"The caches of the tests need {need} GiB of memory; {have} is free.", "Use a smaller -d or -b."
            )
        return num_pages


Runner = Callable[[BenchTest, Sequence[Prompt]], Run]  # `Ours.run` or `llama.Llama.run`
