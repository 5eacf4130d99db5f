"""A model whose layers several devices share gives the bits of the model on one."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.arch.config import ModelConfig
from kimi_lite.engine import loader
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_failure import GpuBroken, GpuMemoryEnded
from kimi_lite.experts.heat import load_heat
from kimi_lite.experts.recorder import RoutingRecorder, read_trace
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, Cancelled, SequenceSlice
from kimi_lite.model.hybrid import load
from kimi_lite.model.hybrid.parts import HybridParts, SplitPages, joined_counters
from kimi_lite.options import Options
from tests.model.hybrid.runner import DEVICE, HybridRunner
from tests.model.hybrid.stand_in import GPU, StandInKernels
from tests.model.hybrid.test_load import answer
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="two stand-ins")
NUM_LAYERS = 4
SPLITS = [
    tuple(np.diff([0, *cuts, NUM_LAYERS]).tolist()) for n in (1, 2, 3) for cuts in combinations(range(1, NUM_LAYERS), n)
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    sizes = {"num_layers": NUM_LAYERS, "expert_feed_forward_size": 32, "hidden_size": 64, "num_heads": 2}
    sizes["types"] = {"_exps": "Q8_0"}
    return write_tiny_gguf(tmp_path_factory.mktemp("gpus") / "tiny.gguf", np.random.default_rng(7), **sizes)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, 290, 200)


@pytest.fixture(scope="module")
def one(path):
    """Without slots: where experts lie changes nothing, as other tests show."""
    with HybridRunner(path, is_reproducible=True) as runner:
        yield runner


@pytest.fixture(scope="module")
def several(path):
    runners = {split: HybridRunner(path, num_gpu_experts=9, is_reproducible=True, gpu_layers=split) for split in SPLITS}
    yield runners
    for runner in runners.values():
        runner.transformer.close()


def config_of(path: Path) -> ModelConfig:
    return ModelConfig.from_metadata(GGUFStore.open(path).metadata)


def make_batch(ids: np.ndarray, start: int, pages: np.ndarray) -> Batch:
    positions = np.arange(start, start + len(ids), dtype=np.int32)
    wants = np.ones(len(ids), bool)
    return Batch(ids.astype(np.int32), positions, wants, (SequenceSlice(0, len(ids), pages),))


def stop_at(number: int) -> Callable[[], bool]:
    """True the `number`th time it is asked."""
    answers = iter([False] * number)
    return lambda: next(answers, True)


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(SPLITS),
    st.lists(st.tuples(st.integers(1, 70), st.sampled_from(["plain", "stream", "cancel"])), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_several_equal_one(one, several, ids, split, steps, seed):
    """Bit for bit: steps, prompts by rows and streamed, passes cancelled at any layer, promotions at random."""
    runner, rng, start = several[split], np.random.default_rng(seed), 0
    for length, kind in steps:
        tokens = ids[start : start + length]
        for part in runner.transformer.parts:
            if part.experts is not None:
                part.experts.costs.cpu_s, part.experts.costs.stream_s = (1e9, 1.0) if kind == "stream" else (1.0, 1e9)
            part._adaptive._budget.budget = int(rng.integers(0, 5))
        if kind == "cancel" and len(tokens) > 16:
            batch, stop = make_batch(tokens, start, runner.pages), stop_at(int(rng.integers(0, NUM_LAYERS)))
            with pytest.raises(Cancelled):
                runner.transformer.forward(batch, stop)
        assert np.array_equal(runner.prefill(tokens, start), one.prefill(tokens, start)), (split, start, length, kind)
        start += len(tokens)
        if start >= len(ids):
            break


def test_all_of_it_happened(several):
    """What the stories above are about: slots on every GPU, promotions, streams."""
    counters = [runner.transformer.counters() for runner in several.values()]
    assert all(each["gpu_expert_slots"] == 9 for each in counters)
    for name in ("gpu_expert_hits", "gpu_expert_misses", "expert_promotions", "stream_s"):
        assert sum(each[name] for each in counters) > 0, name


@pytest.mark.parametrize("split", [(1, 3), (2, 2), (2, 1, 1)])
def test_experts_from_disk(path, ids, one, split):
    """Each part has slots in RAM for its own."""
    with HybridRunner(path, num_gpu_experts=6, is_reproducible=True, gpu_layers=split, ram_expert_bytes=400_000) as own:
        assert np.array_equal(own.prefill(ids[:60]), one.prefill(ids[:60]))
        assert np.array_equal(own.decode(ids[60:80], 60), one.decode(ids[60:80], 60))
        assert own.transformer.counters()["expert_misses"] > 0


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_record_of_routing(path, ids, tmp_path, is_cancelled):
    """The same file as of one GPU, with nothing of a pass that was given up in the second's layers."""
    traces = []
    for name, split in (("one", ()), ("two", (2, 2))):
        recorder = RoutingRecorder(tmp_path / name, config_of(path))
        with HybridRunner(path, recorder=recorder, gpu_layers=split, num_gpu_experts=4, is_reproducible=True) as runner:
            runner.prefill(ids[:50])
            if is_cancelled:
                with pytest.raises(Cancelled):
                    runner.transformer.forward(make_batch(ids[50:90], 50, runner.pages), stop_at(3))
            runner.prefill(ids[50:90], 50)
            runner.decode(ids[90:95], 90)
        traces.append(read_trace(tmp_path / name))
    assert np.array_equal(traces[0].ids, traces[1].ids) and np.array_equal(traces[0].starts, traces[1].starts)
    assert traces[0].starts.tolist() == [0, 50, 90, *range(91, 96)]


def test_one_file_of_heat(path, ids, tmp_path):
    """Every part writes its own layers, and reads them again."""
    file = tmp_path / "heat.npz"
    with HybridRunner(path, num_gpu_experts=6, heat_file=file, gpu_layers=(2, 2)) as runner:
        runner.decode(ids[:20])
        heat = runner.transformer.heat()
    assert (heat[1:].sum(axis=1) > 0).all() and heat[0].sum() == 0
    saved = load_heat(file, (3, *heat.shape))
    assert np.allclose(saved.sum(axis=0), heat)
    with HybridRunner(path, num_gpu_experts=6, heat_file=file, gpu_layers=(2, 2)) as runner:
        assert np.allclose(runner.transformer.heat(), heat)
        assert [part.experts.slots.policy.num_resident for part in runner.transformer.parts] == [2, 4]


class Poor(StandInKernels):
    """The second GPU has memory for so many rows."""

    most = 1000

    def rms_norm(self, x, *args, **more):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().rms_norm(x, *args, **more)


def test_memory_that_ends_on_the_second(path, ids, one, tmp_path):
    """Half a prompt at a time, through both; what is recorded is what came through."""
    recorder = RoutingRecorder(tmp_path / "trace", config_of(path))
    with HybridRunner(path, gpu_layers=(2, 2), is_reproducible=True, recorder=recorder) as runner:
        poor = Poor()
        for layer in runner.transformer.parts[1].layers:
            layer._kernels = poor
        poor.most = 60
        want = [one.prefill(ids[:50]), one.prefill(ids[50:100], 50)]
        assert np.array_equal(runner.prefill(ids[:100]), np.concatenate(want))
        poor.most = 8
        with pytest.raises(GpuMemoryEnded):
            runner.prefill(ids[:100])
        poor.most = 1000
        assert np.array_equal(runner.prefill(ids[100:120], 100), one.prefill(ids[100:120], 100))
    assert read_trace(tmp_path / "trace").starts.tolist() == [0, 50, 100, 120]


def test_a_gpu_that_broke_is_the_end_of_all(path, ids):
    with HybridRunner(path, gpu_layers=(2, 2)) as runner:
        runner.transformer.parts[1]._streams.failure = GpuBroken.silent(1.0)
        with pytest.raises(KimiLiteError):
            runner.prefill(ids[:20])
        assert runner.transformer.counters()["decode_steps"] == 0


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8"])
def test_pages_over_several_gpus(dtype):
    """Pages that leave, return, are copied in part and are saved: as in one storage."""
    rng, stories = np.random.default_rng(2), []
    whole = KVCache(5, 32, 6, dtype)
    tensor = (
        torch.from_numpy(whole.storage) if dtype != "bf16" else torch.zeros(whole.storage.shape, dtype=torch.bfloat16)
    )
    for storage in (tensor.clone(), SplitPages([tensor[:2].clone(), tensor[2:3].clone(), tensor[3:].clone()])):
        kv, rng, found = KVCache(5, 32, 6, dtype, storage=storage, num_host_pages=4), np.random.default_rng(3), []
        for _ in range(25):
            tokens = np.concatenate([np.full(64, rng.integers(3)), rng.integers(0, 2, rng.integers(1, 200))]).tolist()
            sequence = kv.open(tokens)
            assert kv.reserve(sequence, len(tokens))
            found.append(sequence.num_computed)
            for layer in range(5):
                content = torch.from_numpy(rng.integers(0, 100, tuple(storage.shape[2:])))
                kv.storage[layer][int(sequence.pages[-1])] = content.to(storage.dtype)
            kv.advance(sequence, tokens[sequence.num_computed :])
            kv.release(sequence)
        content = [storage[layer].float().numpy() for layer in range(5)]
        stories.append((found, np.stack(content), kv.num_spilled, kv.num_returned))
    (found, content, spilled, returned), (found2, content2, spilled2, returned2) = stories
    assert found == found2 and np.array_equal(content, content2)
    assert spilled == spilled2 > 0 and returned == returned2 > 0 and max(found) > 64


def test_engine_on_two_gpus(tmp_path, monkeypatch):
    """The way of a front end: the same tokens as on the CPU, and pages of the cache that are found again."""
    monkeypatch.setattr(loader, "choose_device", lambda wanted: "cpu:0,cpu:1" if wanted == "cuda:0,cuda:1" else "cpu")
    monkeypatch.setattr(loader, "find_gpu", lambda device: None if device == "cpu" else GPU)
    monkeypatch.setattr(load, "TritonKernels", StandInKernels)
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    shared = {"context_length": 512, "kv_dtype": "f32", "num_threads": 1, "dense_type": "file"}
    prompt = tuple(np.random.default_rng(1).integers(0, 250, 90).tolist())
    with loader.load(path, Options(device="cpu", **shared)) as engine:
        want = answer(engine, prompt, "a")
        more = answer(engine, (*prompt, *want, 7), "b")
    for options in ({"device": "cuda:0,cuda:1"}, {"vram_bytes": (8 << 30, 4 << 30)}):
        with loader.load(path, Options(num_gpu_experts=4, **shared, **options)) as engine:
            assert isinstance(engine.model, HybridParts) and len(engine.plan.gpu_parts) == 2
            assert answer(engine, prompt, "a") == want
            assert answer(engine, (*prompt, *want, 7), "b") == more
            assert engine.counters()["gpu_expert_slots"] == 4


def test_counters_of_all():
    parts = [{"a": 1.0, "expert_threads": 2, "cpu_expert_s": 0.5}, {"a": 2.0, "expert_threads": 4, "cpu_expert_s": 0.7}]
    assert joined_counters([*parts, {"a": 4.0}]) == {"a": 7.0, "expert_threads": 4, "cpu_expert_s": 0.6}
