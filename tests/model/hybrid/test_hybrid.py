"""The hybrid path against the CPU path, and against itself: where an expert is computed changes nothing."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.experts.recorder import RoutingRecorder, read_trace
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.batch import Batch, Cancelled, SequenceSlice
from tests.model.hybrid.closeness import INT8_LIMIT, is_exact, median_limit, near, same, watch
from tests.model.hybrid.runner import DEVICE, HybridRunner
from tests.model.runner import Runner, relative_errors
from tests.tiny import write_tiny_gguf

IS_CUDA = DEVICE != "cpu"
FLOAT32 = torch.float32  # a GPU's factors when it decodes what is not behind a prompt
VARIANTS = {
    "kimi": {},
    "no query compression": {"q_lora_rank": 0, "expert_gating": "softmax", "is_expert_weights_norm": False},
    "two shared": {"num_shared_experts": 2, "is_gate_up_fused": True},
    "groups": {"num_expert_groups": 4, "num_expert_groups_used": 2, "num_shared_experts": 0},
    "joint kv_b": {"is_kv_b_joined": True, "rope_scaling": "none"},
    "all dense": {"num_dense_layers": 3},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("hybrid") / "tiny.gguf", np.random.default_rng(0))


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices this small are slower on many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _as_a_gpu_rounds():
    with watch() if IS_CUDA else nullcontext():
        yield


@pytest.fixture
def ids():
    return np.random.default_rng(1).integers(0, 290, 150)


def only_rows(runner: HybridRunner) -> HybridRunner:
    """No streaming: every batch keeps its experts where they are."""
    runner.transformer.experts.costs.stream_s = 1e9
    return runner


def only_stream(runner: HybridRunner) -> HybridRunner:
    runner.transformer.experts.costs.cpu_s = 1e9
    return runner


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_cpu_path(variant, tmp_path, ids):
    """Prompts in one pass and in chunks, and decoding, of every kind of model the family has."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(3), **VARIANTS[variant])
    with Runner(path) as cpu:
        want = cpu.prefill(ids)
    with HybridRunner(path, num_gpu_experts=6) as runner:
        assert near(runner.prefill(ids), want)
        chunks = [runner.prefill(ids[:77]), runner.prefill(ids[77:], start=77)]
        assert near(np.concatenate(chunks), want)
        assert near(runner.decode(ids[:12]), want[:12], FLOAT32)


ROUNDED = [({}, "bf16", 0.03), ({}, "q8_0", 0.03), ({"_exps": "TQ1_0"}, "q8_0", 0.06)]


@pytest.mark.parametrize(("types", "dense", "limit"), ROUNDED)
def test_rounded_weights(types, dense, limit, tmp_path, ids):
    """Dense weights as bfloat16 and Q8_0, ternary experts: as far from the CPU path as their roundings."""
    sizes = {"expert_feed_forward_size": 256} if types else {}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(3), types=types, **sizes)
    with Runner(path) as cpu:
        want = cpu.prefill(ids)
    with HybridRunner(path, dense_type=dense, num_gpu_experts=4) as runner:
        assert 0 < np.median(relative_errors(runner.prefill(ids), want)) < median_limit(limit)


@pytest.mark.parametrize("types", [{}, {"_exps": "TQ1_0"}, {"_exps": "Q4_K", "ffn_down_exps": "Q8_0"}])
def test_with_cache_equals_without_exactly(types, tmp_path, ids):
    """Bit for bit, while experts come and go: the very kernels compute a hit and a miss."""
    path = write_tiny_gguf(tmp_path / "t.gguf", np.random.default_rng(4), types=types, expert_feed_forward_size=256)
    limit = INT8_LIMIT if types else 0.0  # a GPU's hits have float activations, the CPU's misses int8 ones
    with only_rows(HybridRunner(path)) as without:
        want_prompt, want = without.prefill(ids[:40]), without.decode(ids[40:60], start=40)
    with only_rows(HybridRunner(path, num_gpu_experts=5, num_threads=2)) as runner:
        assert same(runner.prefill(ids[:40]), want_prompt, limit=limit)
        assert same(runner.decode(ids[40:60], start=40), want, limit=limit)
        counters = runner.transformer.counters()
        assert (
            counters["gpu_expert_hits"] > 0 and counters["gpu_expert_misses"] > 0 and counters["expert_promotions"] >= 5
        )


def test_whatever_happens_to_slots_changes_no_result(path, ids):
    """Random budgets and cancelled promotions between the steps: the same bits."""
    rng = np.random.default_rng(6)
    with only_rows(HybridRunner(path)) as without:
        want = without.decode(ids[:60])
    with only_rows(HybridRunner(path, num_gpu_experts=6)) as runner:
        slots, have = runner.transformer.experts.slots, []
        for i in range(60):
            have.append(runner.prefill(ids[i : i + 1], start=i))
            runner.transformer._adaptive._budget.budget = int(rng.integers(0, 5))
            if rng.random() < 0.2:
                slots.cancel()
        assert same(np.concatenate(have), want, FLOAT32)
        counters = runner.transformer.counters()
        assert (
            counters["gpu_expert_hits"]
            and counters["expert_promotions"] > 6
            and counters["expert_promotions_cancelled"]
        )


def test_every_expert_resident(path, ids):
    """A model that fits: every expert is brought in before the first token, and the CPU has nothing to do."""
    with only_rows(HybridRunner(path, num_gpu_experts=16)) as runner, only_rows(HybridRunner(path)) as without:
        want = without.decode(ids[:10])
        assert same(runner.decode(ids[:10]), want, FLOAT32)
        counters = runner.transformer.counters()
        assert counters["gpu_experts"] == 16 and counters["expert_reads_from_file"] == 16
        assert counters["gpu_expert_misses"] == 0 and counters["cpu_experts_s"] == 0
        assert counters["gpu_expert_hits"] == 10 * 2 * 2


@pytest.mark.parametrize("force", [only_rows, only_stream, lambda runner: runner])
def test_streamed_equals_cpu(force, path, ids):
    """A prompt's experts over the bus in groups, on the CPU, or divided between them."""
    with Runner(path) as cpu:
        want = cpu.prefill(ids)
    with force(HybridRunner(path, num_gpu_experts=3, group_size=3)) as runner:
        runner.decode(ids[:8])  # some experts get slots: those need no copy
        for _ in range(3):  # costs are learned: the division changes, the result does not
            assert near(runner.prefill(ids), want)
        streamed = runner.transformer.counters()["streamed_experts"]
        assert streamed == 0 if force is only_rows else streamed > 0


def test_prompt_longer_than_the_rows(tmp_path, ids, monkeypatch):
    """Beyond ROW_TOKENS the CPU goes over its share a window of tokens at a time."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(5))
    monkeypatch.setattr("kimi_lite.model.hybrid.experts.ROW_TOKENS", 64)
    monkeypatch.setattr("kimi_lite.model.hybrid.routed.ROW_TOKENS", 64)
    with Runner(path) as cpu:
        want = cpu.prefill(ids)
    with HybridRunner(path, group_size=2) as runner:
        for stream_s in (1e9, 1e-9, None):
            if stream_s:
                runner.transformer.experts.costs.stream_s = stream_s
            assert near(runner.prefill(ids), want)


def test_batch_equals_one_by_one(path, ids):
    """Sequences that share a step: decoding rows beside a prompt's chunk, padded rows, rows in both forms of
    attention."""
    a, b, c = np.array([0, 1, 2], np.int32), np.array([3, 4, 5], np.int32), np.array([6, 7], np.int32)
    with only_rows(HybridRunner(path)) as runner:
        prompt = runner.forward((ids[:100], 0, a))
        tail = runner.forward((ids[100:101], 100, a))
        other = runner.forward((ids[20:90], 0, b))
        third = runner.forward((ids[5:8], 0, c))
        runner.forward((ids[:100], 0, a))
        mixed = runner.forward((ids[100:101], 100, a), (ids[20:90], 0, b), (ids[5:8], 0, c))
        assert near(mixed, np.concatenate([tail, other, third]))
        runner.forward((ids[20:89], 0, b))
        pair = runner.forward((ids[100:101], 100, a), (ids[89:90], 69, b), (ids[5:6], 0, c))
        assert near(pair, np.concatenate([tail, other[69:], third[:1]]))
        assert len(prompt) == 100


def test_warm_up_leaves_nothing_behind(path, ids):
    with only_rows(HybridRunner(path)) as runner:
        want = runner.decode(ids[:8])
    with only_rows(HybridRunner(path)) as runner:
        stages = []
        runner.transformer.warm_up(lambda stage, done, total: stages.append((done, total)))
        assert stages == [(0, 3), (1, 3), (2, 3)] and runner.transformer.counters()["gpu_expert_misses"] == 0
        assert same(runner.decode(ids[:8]), want, FLOAT32)


def test_many_sequences_that_decode_wait_for_no_upload(path, ids):
    """Forty sequences of one token each: more than a captured step takes, and still nothing streams."""
    pages = [np.array([i], np.int32) for i in range(12)]
    parts = [
        (ids[i % 12 : i % 12 + 1], 0, pages[i % 12]) for i in range(40)
    ]  # those that share a page write the same row
    with only_stream(HybridRunner(path)) as runner:
        have = runner.forward(*parts)
        assert runner.transformer.counters()["streamed_experts"] == 0
        one_by_one = np.concatenate([runner.forward(part) for part in parts[:12]])
        assert near(have[:12], one_by_one)


def test_cancel_between_layers(path, ids):
    with only_stream(HybridRunner(path, group_size=2)) as runner:
        want = runner.prefill(ids)
        slices = (SequenceSlice(0, len(ids), runner.pages),)
        batch = Batch(ids.astype(np.int32), np.arange(len(ids), dtype=np.int32), np.ones(len(ids), bool), slices)
        calls = iter([False, False, True])
        with pytest.raises(Cancelled):
            runner.transformer.forward(batch, lambda: next(calls))
        assert same(runner.transformer.forward(batch, lambda: False), want)


def test_cache_dtypes(path, ids):
    with Runner(path) as cpu:
        want = cpu.prefill(ids)
    for dtype, limit in (("f16", 2e-3), ("bf16", 2e-2)):
        with HybridRunner(path, kv_dtype=dtype) as runner:
            assert 0 < np.median(relative_errors(runner.prefill(ids), want)) < median_limit(limit)
            assert 0 < np.median(relative_errors(runner.decode(ids[:20]), want[:20])) < median_limit(limit)


def test_heat_outlives_the_process(path, ids, tmp_path):
    """The next start begins with the hottest experts of this one in its slots."""
    heat_file = tmp_path / "model.heat"
    with only_rows(HybridRunner(path, num_gpu_experts=6, heat_file=heat_file)) as runner:
        want = runner.decode(ids[:20])
        runner.transformer.experts.count()
        hot = set(runner.transformer.experts.slots.policy.hottest(6))
    assert heat_file.exists()
    with only_rows(HybridRunner(path, num_gpu_experts=6, heat_file=heat_file)) as runner:
        slots = runner.transformer.experts.slots
        assert {(layer, int(e)) for layer in range(3) for e in np.flatnonzero(slots.residents(layer))} == hot
        assert same(runner.decode(ids[:20]), want, FLOAT32)
        assert runner.transformer.counters()["gpu_expert_hits"] > 0


def test_heat_is_told(path, ids):
    with only_rows(HybridRunner(path)) as runner:
        runner.decode(ids[:10])
        heat = runner.transformer.heat()
        assert heat.shape == (3, 8) and not heat[0].any() and (heat[1:].sum(axis=1) > 0).all()


def test_experts_from_the_disk(path, ids):
    """With room for half of the experts in RAM and a few in VRAM: the same bits as with all of them."""
    with only_rows(HybridRunner(path, num_gpu_experts=3)) as runner:
        want = [runner.prefill(ids[:60]), runner.decode(ids[60:70], start=60)]
        slot_bytes = runner.transformer.experts.store.index.vram_slot_bytes
    tier = {"ram_expert_bytes": 10 * slot_bytes, "num_readers": 2, "is_reading_direct": False}
    with only_rows(HybridRunner(path, num_gpu_experts=3, **tier)) as runner:
        assert same(runner.prefill(ids[:60]), want[0])
        assert same(runner.decode(ids[60:70], start=60), want[1])
        counters = runner.transformer.counters()
        assert counters["disk_bytes"] > 0 and counters["expert_misses"] > 0
    with only_stream(HybridRunner(path, **tier)) as runner:
        assert near(runner.prefill(ids[:60]), want[0])


def test_resident_experts_are_never_read_from_the_file(tmp_path, ids):
    """All experts are in RAM slots; then the file's experts are overwritten. Promotions and prompt streams bring the
    same bits to the GPU as before: they come from the slots."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(8), types={"_exps": "Q4_0"})
    with only_rows(HybridRunner(path, num_gpu_experts=3)) as runner:
        want = [runner.prefill(ids[:60]), runner.decode(ids[60:80], start=60)]
        index = runner.transformer.experts.store.index
    with only_stream(HybridRunner(path, num_gpu_experts=3)) as runner:
        want_streamed = runner.prefill(ids[:60])
    for force in (only_rows, only_stream):
        with force(HybridRunner(path, num_gpu_experts=3, loading="read")) as runner:
            whole = path.read_bytes()
            with path.open("r+b") as file:
                for layer in index.layers.values():
                    for matrix in layer.matrices:
                        file.seek(matrix.start)
                        file.write(b"\xff" * index.num_experts * matrix.num_bytes)
            before = runner.transformer.counters()
            assert before["expert_reads_from_file"] == 0
            prompt = runner.prefill(ids[:60])
            decoded = runner.decode(ids[60:80], start=60)
            counters = runner.transformer.counters()
            path.write_bytes(whole)
        assert same(prompt, want[0] if force is only_rows else want_streamed)
        assert force is only_stream or same(decoded, want[1])
        assert counters["expert_reads_from_file"] == 0 and counters["disk_bytes"] == before["disk_bytes"]
        assert counters["expert_promotions"] >= 3
        assert counters["expert_reads_from_ram"] >= counters["expert_promotions"] + counters["streamed_experts"]
        assert (counters["streamed_experts"] > 0) == (force is only_stream)


def test_routing_is_recorded(path, ids, tmp_path):
    """The same record as the CPU path writes, for prompts, decoding and without what was cancelled."""
    records = []
    for runner_class in (Runner, HybridRunner):
        config = ModelConfig.from_metadata(GGUFStore.open(path).metadata)
        recorder = RoutingRecorder(tmp_path / f"{runner_class.__name__}.npz", config)
        with runner_class(path, recorder=recorder) as runner:
            runner.prefill(ids[:40])
            runner.decode(ids[40:44], start=40)
        records.append(read_trace(tmp_path / f"{runner_class.__name__}.npz"))
    assert np.array_equal(records[0].starts, records[1].starts)
    agrees = (np.sort(records[0].ids) == np.sort(records[1].ids)).all(axis=(1, 2))
    assert agrees.all() if is_exact() else agrees.mean() > 0.8  # roundings choose another expert now and then


def test_a_disk_that_fails_leaves_nothing_behind(path, ids, tmp_path, monkeypatch):
    """Decoding, rows and streams: a sentence, and afterwards the same bits and a record without the failed passes."""
    config = ModelConfig.from_metadata(GGUFStore.open(path).metadata)
    slot_bytes = ExpertIndex.find(GGUFStore.open(path), config).vram_slot_bytes
    tier = {"ram_expert_bytes": 10 * slot_bytes, "num_gpu_experts": 3, "is_reading_direct": False}
    problem, records = r"expert \d+ of layer \d could not be read: Input/output", []
    for fails in (False, True):
        recorder = RoutingRecorder(tmp_path / f"{fails}.npz", config)
        with only_rows(HybridRunner(path, recorder=recorder, **tier)) as runner:
            want = [runner.decode(ids[:6]), runner.prefill(ids[6:40], start=6)]
            if fails:
                with monkeypatch.context() as patch:
                    reader = runner.transformer.experts.store.ram.reader
                    for file in reader._files.values():
                        patch.setattr(file, "read_into", fail_to_read)
                    for attempt in (lambda: runner.decode(ids[40:60]), lambda: runner.prefill(ids[:100])):
                        with pytest.raises(
                            KimiLiteError, match=r"expert \d+ of layer \d could not be read: Input/output"
                        ):
                            attempt()
                    runner.transformer.experts.costs.cpu_s = 1e9
                    with pytest.raises(KimiLiteError, match=problem):
                        runner.prefill(ids[:100])
                only_rows(runner).transformer.experts.costs.cpu_s = 1e-4
            have = [runner.decode(ids[:6]), runner.prefill(ids[6:40], start=6)]
            assert all(same(*pair) for pair in zip(have, want, strict=True))
        records.append(read_trace(tmp_path / f"{fails}.npz"))
    kept = records[1].ids[: records[1].starts[7]], records[1].ids[records[1].starts[-8] :]
    assert np.array_equal(records[0].ids, np.concatenate(kept)), "whole passes before the failures and after them"
    assert (records[1].ids[:, 1:] >= 0).all(), "no pass that ended half-way"


def fail_to_read(place, offset):
    raise OSError(5, "Input/output error")


def test_cache_bias_prefers_resident_experts(path, ids):
    """The same six experts are resident; with the bias more tokens choose them."""
    hits = []
    for cache_bias in (0.0, 0.2):
        with only_rows(HybridRunner(path, num_gpu_experts=6, cache_bias=cache_bias)) as runner:
            runner.transformer._adaptive._budget.most = 0  # nobody comes or goes
            runner.prefill(ids)
            runner.transformer.experts.count()
            runner.transformer.experts.slots.fill()
            before = runner.transformer.counters()["gpu_expert_hits"]
            runner.decode(ids[:20])
            hits.append(runner.transformer.counters()["gpu_expert_hits"] - before)
    assert hits[1] > hits[0] > 0
