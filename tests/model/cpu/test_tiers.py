"""The disk tier against all experts in memory: the same bits, whatever came from where and in which order."""

import ctypes
import errno
from types import SimpleNamespace

import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.heat import heat_path, load_heat, save_heat
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.experts.recorder import RoutingRecorder, read_trace
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.batch import Batch, Cancelled, SequenceSlice
from tests.model.runner import Runner
from tests.tiny import write_tiny_gguf

SIZES = {"num_layers": 4, "num_experts": 24, "num_experts_used": 3, "hidden_size": 256, "expert_feed_forward_size": 256}
KINDS = {
    "F32": {},
    "Q8_0": {"types": {".weight": "Q8_0"}},
    "mixed": {"types": {"_exps": "TQ1_0", "blk.2.ffn_down_exps": "Q4_K", "_shexp": "Q8_0"}, "num_shared_experts": 2},
    "no shared experts": {"num_shared_experts": 0, "types": {"_exps": "Q4_0"}},
    "a shared expert that cannot be cut": {"num_shared_experts": 2, "expert_feed_forward_size": 128,
    "types": {"_shexp": "Q4_K"}},
    "softmax, groups, fused": {
        "expert_gating": "softmax", "num_expert_groups": 4, "num_expert_groups_used": 2, "is_gate_up_fused": True,
    },
}  # fmt: skip


def slot_bytes(path):
    """Of the largest slots, times layers: what a slot a layer costs."""
    store = GGUFStore.open(path)
    index = ExpertIndex.find(store, ModelConfig.from_metadata(store.metadata))
    return sum(size * len(layers) for size, layers in index.ram_pools.items())


@pytest.fixture(scope="module", params=KINDS)
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiers")
    return write_tiny_gguf(folder / "tiny.gguf", np.random.default_rng(0), **(SIZES | KINDS[request.param]))


@pytest.fixture(scope="module")
def f32_path(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("tiers") / "tiny.gguf", np.random.default_rng(0), **SIZES)


def every_path(runner):
    """Prompts, chunks, single tokens, small batches of two sequences."""
    ids = np.random.default_rng(1).integers(0, 290, 140)
    logits = [runner.prefill(ids[:100]), runner.decode(ids[100:112], start=100), runner.prefill(ids[112:], start=112)]
    pages = np.array([8, 9], np.int32)
    runner.forward((ids[:20], 0, pages))
    logits.append(runner.forward((ids[20:23], 20, pages), (ids[:1], 140, runner.pages)))
    return np.concatenate(logits)


def test_the_same_bits(path):
    slots_per_layer = 7  # not much more than a token's: a prompt needs all 24
    with Runner(path) as runner:
        want = every_path(runner)
    with Runner(path, ram_expert_bytes=slots_per_layer * slot_bytes(path), num_readers=3) as runner:
        have, counters = every_path(runner), runner.transformer.counters()
        again = every_path(runner)
    assert np.array_equal(have, want) and np.array_equal(again, want)
    assert counters["expert_misses"] > 0 and counters["expert_hits"] > 0 and counters["disk_bytes"] > 0
    assert counters["expert_slots"] == 3 * slots_per_layer


def test_guesses_come_true(f32_path):
    """Random weights: the next router's choice is near what it would be without this layer's experts."""
    with Runner(f32_path, ram_expert_bytes=12 * slot_bytes(f32_path)) as runner:
        runner.decode(np.random.default_rng(1).integers(0, 290, 60))
        counters = runner.transformer.counters()
    assert counters["expert_guesses"] > 0
    assert counters["expert_right_guesses"] > 0.3 * counters["expert_guesses"]


def test_cancel_and_go_on(f32_path):
    ids = np.random.default_rng(1).integers(0, 290, 100)
    with Runner(f32_path, ram_expert_bytes=6 * slot_bytes(f32_path)) as runner:
        whole = (SequenceSlice(0, len(ids), runner.pages),)
        batch = Batch(ids.astype(np.int32), np.arange(len(ids), dtype=np.int32), np.ones(len(ids), bool), whole)
        calls = []

        def stop_in_layer_2():
            calls.append(None)
            return len(calls) == 4

        with pytest.raises(Cancelled):
            runner.transformer.forward(batch, stop_in_layer_2)
        have = runner.transformer.forward(batch, lambda: calls.append(None))
        assert len(calls) == 4 + 5  # before the embedding and before each layer
    with Runner(f32_path) as runner:
        assert np.array_equal(runner.prefill(ids), have)


def test_a_disk_error_is_a_sentence_and_the_model_lives_on(f32_path, monkeypatch):
    ids = np.random.default_rng(1).integers(0, 290, 30)
    with Runner(f32_path, ram_expert_bytes=6 * slot_bytes(f32_path)) as runner:
        want = runner.decode(ids)
        (file,) = runner.transformer._tiers.slots.reader._files.values()

        def fail(place, offset):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(file, "read_into", fail)
            for run in (runner.decode, runner.prefill):
                with pytest.raises(
                    KimiLiteError, match=r"expert \d+ of layer \d could not be read: Input/output error"
                ):
                    run(ids)
        assert np.array_equal(runner.decode(ids), want)


def test_everything_loaded_at_once(path):
    """All experts in memory of our own: no steps, no reads, the same bits."""
    with Runner(path) as runner:
        want, seen = every_path(runner), []
    with Runner(path, loading="lock", on_progress=lambda *progress: seen.append(progress)) as runner:
        read_bytes = runner.transformer.counters()["disk_bytes"]
        have = every_path(runner)
        assert runner.transformer._ram.holds_all
        assert runner.transformer.counters()["disk_bytes"] == read_bytes > 0
    assert np.array_equal(have, want)
    done, totals = zip(*(progress for stage, *progress in seen if stage == "reading experts"), strict=True)
    assert done[-1] == totals[-1] > 0 and list(done) == sorted(done)


def test_memory_that_may_not_be_locked_is_a_sentence(f32_path, monkeypatch):
    library = SimpleNamespace(mlock=lambda address, num_bytes: -1)
    types = {"c_void_p": ctypes.c_void_p, "c_size_t": ctypes.c_size_t}
    fake = SimpleNamespace(CDLL=lambda *_, **__: library, get_errno=lambda: errno.ENOMEM, **types)
    monkeypatch.setattr("kimi_lite.experts.memory.ctypes", fake)
    with pytest.raises(KimiLiteError, match=r"MiB are to be locked in RAM; .*: Cannot allocate memory"):
        Runner(f32_path, loading="lock")


def test_an_error_while_loading_is_a_sentence(f32_path, monkeypatch):
    def fail(self, place, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("kimi_lite.experts.reader._File.read_into", fail)
    with pytest.raises(KimiLiteError, match="could not be read: Input/output error"):
        Runner(f32_path, is_reading_direct=False, loading="read")


def test_what_tokens_choose_is_recorded(f32_path, tmp_path):
    """By both paths, the same."""
    ids = np.random.default_rng(1).integers(0, 290, 50)
    traces = []
    for name, num_bytes in (("mapped", None), ("tiers", 6 * slot_bytes(f32_path))):
        config = ModelConfig.from_metadata(GGUFStore.open(f32_path).metadata)
        recorder = RoutingRecorder(tmp_path / f"{name}.npz", config)
        with Runner(f32_path, ram_expert_bytes=num_bytes, recorder=recorder) as runner:
            runner.prefill(ids[:40])
            runner.decode(ids[40:], start=40)
        traces.append(read_trace(tmp_path / f"{name}.npz"))
    mapped, tiers = traces
    assert mapped.starts.tolist() == [0, *range(40, 51)] and mapped.moe_layers.tolist() == [1, 2, 3]
    assert np.array_equal(mapped.ids, tiers.ids) and (mapped.ids[:, 1:] >= 0).all()
    assert all(len(set(row)) == 3 for row in mapped.ids[:, 1:].reshape(-1, 3).tolist())


def test_cache_bias_saves_reads_and_changes_results(f32_path):
    ids, found = np.random.default_rng(1).integers(0, 290, 60), {}
    for bias in (0.0, 0.05, 10.0):
        with Runner(f32_path, ram_expert_bytes=6 * slot_bytes(f32_path), cache_bias=bias) as runner:
            logits = runner.decode(ids)
            found[bias] = (runner.transformer.counters()["expert_misses"], logits)
    assert found[10.0][0] < found[0.05][0] < found[0.0][0]
    assert np.isfinite(found[10.0][1]).all()
    assert not np.array_equal(found[0.05][1], found[0.0][1])


def test_heat_outlives_the_process(f32_path, tmp_path):
    ids, path = np.random.default_rng(1).integers(0, 290, 40), tmp_path / "tiny.heat.npz"
    options = {"ram_expert_bytes": 8 * slot_bytes(f32_path), "heat_file": path}
    with Runner(f32_path, **options) as runner:
        runner.decode(ids)
        cold = runner.transformer.counters()
    assert [each.name for each in tmp_path.iterdir()] == ["tiny.heat.npz"]
    with Runner(f32_path, **options) as runner:
        cache = runner.transformer._tiers.slots
        assert cache.export_heat().sum() > 0 and any(
            pool.jobs or pool.policy.num_resident for pool in cache._pools.values()
        )
        runner.decode(ids)
        warm = runner.transformer.counters()
    assert warm["expert_misses"] < cold["expert_misses"]


def test_heat_files(tmp_path, monkeypatch):
    model = tmp_path / "kimi-00001-of-00003.gguf"
    assert heat_path(model) == tmp_path / "kimi.heat.npz"
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda *_: False)
    elsewhere = heat_path(model)
    assert elsewhere.parent == tmp_path / "cache" / "heat" and elsewhere.name.endswith("-kimi.heat.npz")
    heat = np.ones((2, 3, 4), np.float32)
    assert load_heat(elsewhere, heat.shape) is None
    assert save_heat(elsewhere, heat) and np.array_equal(load_heat(elsewhere, heat.shape), heat)
    assert load_heat(elsewhere, (2, 3, 5)) is None
    save_heat(elsewhere, -heat)
    assert load_heat(elsewhere, heat.shape) is None
    elsewhere.write_bytes(elsewhere.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is damaged; it starts empty"):
        assert load_heat(elsewhere, heat.shape) is None
    (tmp_path / "file").touch()
    assert not save_heat(tmp_path / "file" / "x", heat)
