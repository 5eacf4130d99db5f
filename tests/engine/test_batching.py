"""An answer does not depend on its company: whoever else is in the batch, however prompts are cut, how many threads
there are, who is sent back for lack of pages, what others have left in the cache: every row of logits has the bits of
the request alone."""

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from kimi_lite.arch.config import ModelConfig
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.types import ModelInfo, Request, SamplingParams
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch
from kimi_lite.model.cpu.transformer import Transformer
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.options import Options
from kimi_lite.text.template import ChatTemplate
from kimi_lite.text.tokenizer import Tokenizer
from tests.engine.fakes import tiny_metadata
from tests.tiny import write_tiny_gguf

NUM_PAGES, MAX_THREADS = 72, 3
MODELS = {
    "Q8_0": {"types": {".weight": "Q8_0"}, "expert_feed_forward_size": 64},
    "K-quants and ternary": {
        "types": {".weight": "F32", "_exps": "TQ1_0", "attn_output": "Q4_K", "attn_q_a": "Q6_K", "attn_q_b": "Q5_0"}
        | {"attn_kv_a_mqa": "Q4_K", "ffn_down": "IQ4_XS", "attn_k_b": "Q8_0", "attn_v_b": "Q4_0", "output": "Q6_K"},
        "hidden_size": 256,
        "num_heads": 8,
        "q_lora_rank": 64,
        "v_head_dim": 32,
        "feed_forward_size": 256,
        "expert_feed_forward_size": 256,
    },
    "floats": {"types": {".weight": "BF16", "_exps": "F32"}},
    "many experts": {  # so many that prompts leave each with few tokens
        "types": {".weight": "Q8_0", "_exps": "Q4_0"},
        "num_experts": 24,
        "num_experts_used": 2,
        "expert_feed_forward_size": 32,
    },
}


class Recording(Engine):
    """Keeps the logits of every token, and counts how often a sequence was sent back."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.logits: dict[str, list[bytes]] = {}
        self.tokens: dict[str, list[int]] = {}

    def _choose(self, sequence, logits: np.ndarray) -> int:
        token_id = super()._choose(sequence, logits)
        self.logits.setdefault(sequence.request.id, []).append(logits.tobytes())
        self.tokens.setdefault(sequence.request.id, []).append(token_id)
        return token_id


class Model:
    """A model file, opened once for each number of threads; `expanded_until`: see `Layers.prepare`."""

    def __init__(self, path: Path, expanded_until: int | None = None) -> None:
        store = GGUFStore.open(path)
        config = ModelConfig.from_metadata(store.metadata)
        self._sizes = config.num_layers, config.kv_latent_size
        self._kv = KVCache(*self._sizes, NUM_PAGES, "f16")
        self.models = [Transformer(store, config, self._kv, Options(num_threads=i + 1)) for i in range(MAX_THREADS)]
        for model in self.models if expanded_until else []:
            model._layers.prepare = partial(model._layers.prepare, expanded_until=expanded_until)
        self.tokenizer = Tokenizer.from_metadata(tiny_metadata())
        self._template = ChatTemplate.from_metadata(tiny_metadata(), self.tokenizer)
        self._info = ModelInfo("tiny", path, 0, ())
        self._alone: dict[Request, tuple[list[bytes], list[int]]] = {}

    def engine(self, num_pages: int = 24, num_threads: int = 1, **options: object) -> Recording:
        """An engine with an empty cache of its own."""
        kv = KVCache(*self._sizes, num_pages, "f16", storage=self._kv.storage[:, :num_pages])
        return Recording(
            self.models[num_threads - 1],
            kv,
            self.tokenizer,
            self._template,
            num_pages * PAGE_TOKENS,
            self._info,
            **options,
        )

    def alone(self, request: Request) -> tuple[list[bytes], list[int]]:
        if request not in self._alone:
            engine = self.engine()
            for _ in engine.generate([request]):
                pass
            self._alone[request] = engine.logits[request.id], engine.tokens[request.id]
        return self._alone[request]

    def close(self) -> None:
        for model in self.models:
            model.close()


@pytest.fixture(scope="module", params=[*MODELS, "both forms of attention in a prompt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("batching") / "tiny.gguf"
    write_tiny_gguf(path, np.random.default_rng(0), **MODELS.get(request.param, MODELS["Q8_0"]))
    opened = Model(path, None if request.param in MODELS else 70)
    yield opened
    opened.close()


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes before a step, and the step before which it is cancelled, if it still runs."""

    request: Request
    step: int
    cancel_step: int | None


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    """Prompts of any length, some with a common beginning; greedy or by a seed."""
    shared = np.random.default_rng(99).integers(0, 256, 130).tolist()
    result = []
    for i in range(draw(st.integers(1, 7))):
        own = np.random.default_rng(draw(st.integers(0, 3))).integers(0, 256, draw(st.integers(4, 90))).tolist()
        prompt = tuple(shared[: draw(st.sampled_from([0, 0, 30, 64, 130]))] + own)
        sampling = SamplingParams(
            temperature=draw(st.sampled_from([0.0, 0.0, 1.0])),
            seed=draw(st.integers(0, 3)),
            max_tokens=draw(st.sampled_from([1, 20, 70, 70])),
            ignore_eos=True,
        )
        cancel_step = draw(st.none() | st.integers(0, 40))
        result.append(Arrival(Request(f"r{i}", prompt, sampling), draw(st.integers(0, 25)), cancel_step))
    return result


def run(engine: Recording, coming: Sequence[Arrival]) -> int:
    """To the end of all; how often a sequence was sent back."""
    left, step, num_sent_back = list(coming), 0, 0
    while left or not engine.is_idle:
        for arrival in [each for each in left if each.step <= step]:
            left.remove(arrival)
            engine.add(arrival.request)
        for arrival in coming:
            if arrival.cancel_step == step and arrival.step < step:
                engine.cancel(arrival.request.id)
        running = {sequence.request.id for sequence in engine.scheduler.running}
        engine.step()
        num_sent_back += sum(sequence.request.id in running for sequence in engine.scheduler.waiting)
        step += 1
    assert engine.kv.num_available == engine.kv.num_pages, "all pages are free again"
    return num_sent_back


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    coming=arrivals(),
    num_pages=st.integers(5, 9),
    num_threads=st.integers(1, MAX_THREADS),
    max_step_tokens=st.sampled_from([1, 3, 8, 50, 64, 200, 512]),
    max_running=st.sampled_from([None, None, 2]),
)
def test_every_answer_equals_its_solo_run(
    model: Model,
    coming: list[Arrival],
    num_pages: int,
    num_threads: int,
    max_step_tokens: int,
    max_running: int | None,
) -> None:
    engine = model.engine(num_pages, num_threads, max_step_tokens=max_step_tokens, max_running=max_running)
    num_sent_back = run(engine, coming)
    event(f"sent back: {num_sent_back > 0}")
    for arrival in coming:
        logits, tokens = model.alone(arrival.request)
        num_seen = len(engine.logits.get(arrival.request.id, []))
        assert engine.logits.get(arrival.request.id, []) == logits[:num_seen]
        assert engine.tokens.get(arrival.request.id, []) == tokens[:num_seen]
        assert num_seen == len(logits) or arrival.cancel_step is not None


def test_a_sequence_that_is_sent_back_has_the_same_logits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three answers that need eight pages get five: what they had generated leaves the cache and is computed again."""
    sampling = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)
    coming = [
        Arrival(Request(f"r{i}", tuple(np.random.default_rng(i).integers(0, 256, length).tolist()), sampling), 0, None)
        for i, length in enumerate((30, 60, 100))
    ]
    engine, num_again, forward = model.engine(num_pages=5, num_threads=2), [0], model.models[1].forward

    def look(batch: Batch, should_stop: Callable[[], bool] | None = None) -> np.ndarray:
        num_again[0] += sum(piece.length - 1 for piece in batch.sequences if piece.is_generated)
        return forward(batch, should_stop)

    monkeypatch.setattr(engine.model, "forward", look)
    assert run(engine, coming) > 0
    assert num_again[0] > 0
    for arrival in coming:
        assert (engine.logits[arrival.request.id], engine.tokens[arrival.request.id]) == model.alone(arrival.request)


def test_many_at_once(model: Model) -> None:
    """More than attend at once, and more than one pass of the head takes."""
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    coming = [
        Arrival(Request(f"r{i}", tuple(np.random.default_rng(i).integers(0, 256, 5).tolist()), sampling), 0, None)
        for i in range(NUM_PAGES)
    ]
    engine = model.engine(NUM_PAGES, num_threads=3)
    run(engine, coming)
    for arrival in coming:
        assert (engine.logits[arrival.request.id], engine.tokens[arrival.request.id]) == model.alone(arrival.request)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("model", ["Q8_0"], indirect=True)  # of the engine's, whatever the types
def test_nothing_is_left_of_requests_that_ended(model: Model) -> None:
    """400 requests, some cancelled: pages, threads, files and objects are those of the first hundred."""
    engine, rng = model.engine(num_pages=12, num_threads=2, max_step_tokens=64), np.random.default_rng(1)
    num_added, num_ended, held = 0, 0, []
    while num_ended < 400:
        while num_added < 400 and len(engine._live) < 12:
            prompt = tuple(rng.integers(0, 256, int(rng.integers(4, 60))).tolist())
            sampling = SamplingParams(temperature=num_added % 2, seed=num_added, max_tokens=3, ignore_eos=True)
            engine.add(Request(f"r{num_added}", prompt, sampling, client=str(num_added % 3)))
            num_added += 1
        if rng.random() < 0.05:
            engine.cancel(next(iter(engine._live)))
        for token in engine.step():
            num_ended += token.finish_reason is not None
        engine.logits.clear()
        engine.tokens.clear()
        if num_ended >= 100 * (len(held) + 1):
            gc.collect()
            held.append((threading.active_count(), len(os.listdir("/proc/self/fd")), len(gc.get_objects())))
    assert engine.kv.num_available == engine.kv.num_pages
    assert not (engine._live or engine._cancelled or engine.scheduler.running or engine.scheduler.waiting)
    assert {each[:2] for each in held} == {held[0][:2]}
    assert held[-1][2] - held[0][2] < 600, "two objects of each request since"
