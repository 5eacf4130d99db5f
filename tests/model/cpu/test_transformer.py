"""The forward pass against itself: prompts and decoding, both forms of attention, shared prefixes, several
sequences."""

from functools import partial

import numpy as np
import pytest

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.batch import Batch, Cancelled, SequenceSlice
from kimi_lite.model.cpu import weights as weights_module
from kimi_lite.model.cpu.weights import check_types
from tests.model.runner import Runner, relative_error, relative_errors
from tests.tiny import write_tiny_gguf

F32_LIMIT = 2e-5  # the same sums in another order
INT8_LIMIT = (
    0.06  # of the median row: roundings to 8 bits differ, and where one flips a router's choice, a whole row does
)


@pytest.fixture(scope="module")
def f32_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("f32") / "tiny.gguf"
    write_tiny_gguf(path, np.random.default_rng(0))
    with Runner(path) as runner:
        yield runner


@pytest.fixture(scope="module")
def q8_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("q8") / "tiny.gguf"
    write_tiny_gguf(path, np.random.default_rng(0), types={".weight": "Q8_0"}, expert_feed_forward_size=64)
    with Runner(path, kv_dtype="f16") as runner:
        yield runner


def difference(have: np.ndarray, want: np.ndarray, limit: float) -> float:
    """The worst row in exact arithmetic, the median row where activations are rounded."""
    return relative_error(have, want) if limit == F32_LIMIT else float(np.median(relative_errors(have, want)))


@pytest.fixture
def ids():
    return np.random.default_rng(1).integers(0, 290, 150)


@pytest.mark.parametrize(("model", "limit"), [("f32_model", F32_LIMIT), ("q8_model", INT8_LIMIT)])
def test_prefill_equals_decode(model, limit, ids, request):
    runner = request.getfixturevalue(model)
    want = runner.decode(ids)
    assert difference(runner.prefill(ids), want, limit) < limit
    first = runner.prefill(ids[:77])
    second = runner.prefill(ids[77:], start=77)  # a chunk that begins inside a page
    assert np.array_equal(np.concatenate([first, second]), runner.prefill(ids))


def test_absorbed_equals_expanded(f32_model, ids, monkeypatch):
    """A prompt whose first 70 positions attend in the expanded form has the other rows' absorbed."""
    expanded, prepare = f32_model.prefill(ids), f32_model.transformer._layers.prepare
    for expanded_until in (0, 70):
        monkeypatch.setattr(f32_model.transformer._layers, "prepare", partial(prepare, expanded_until=expanded_until))
        assert relative_error(f32_model.prefill(ids), expanded) < F32_LIMIT


@pytest.mark.parametrize("model", ["f32_model", "q8_model"])
def test_restored_prefix_equals_fresh(model, ids, request):
    """A second sequence that shares whole pages of the first gets what it would have computed itself, bit by bit."""
    runner = request.getfixturevalue(model)
    other = np.concatenate([ids[:128], np.random.default_rng(5).integers(0, 290, 20)])
    fresh = runner.forward((other, 0, np.array([8, 9, 10], np.int32)))[128:]
    runner.forward((ids, 0, np.array([0, 1, 2], np.int32)))
    shared = runner.forward((other[128:], 128, np.array([0, 1, 11], np.int32)))
    assert np.array_equal(shared, fresh)


@pytest.mark.parametrize("model", ["f32_model", "q8_model"])
def test_batch_equals_one_by_one(model, request):
    """Two decoding sequences, a prompt and chunks of others together: every row has the bits that it has alone."""
    runner = request.getfixturevalue(model)
    rng = np.random.default_rng(2)
    a, b, c, d = (rng.integers(0, 290, n) for n in (90, 20, 66, 3))
    pages = [np.array(p, np.int32) for p in ([0, 1], [2], [3, 4], [5])]
    parts = [(c[65:], 65, pages[2]), (d[2:], 2, pages[3]), (a, 0, pages[0]), (b, 0, pages[1])]
    runner.forward((c[:65], 0, pages[2]))
    runner.forward((d[:2], 0, pages[3]))
    alone = np.concatenate([runner.forward(part, num_generated=int(i < 2)) for i, part in enumerate(parts)])
    assert np.array_equal(runner.forward(*parts, num_generated=2), alone)


def test_threads_do_not_change_the_result(tmp_path, ids):
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, np.random.default_rng(0), types={".weight": "Q8_0"})
    results = []
    for num_threads in (1, 3):
        with Runner(path, num_threads=num_threads) as runner:
            results.append(np.concatenate([runner.prefill(ids), runner.decode(ids[:5], start=150)]))
    assert np.array_equal(*results)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8"])
def test_cache_dtypes(dtype, f32_model, ids):
    """Smaller caches change the logits by their rounding and no more."""
    with Runner(f32_model.store.path, kv_dtype=dtype) as runner:
        error = difference(runner.prefill(ids), f32_model.prefill(ids), INT8_LIMIT)
        again = difference(runner.decode(ids), f32_model.prefill(ids), INT8_LIMIT)
    limit = 2e-3 if dtype == "f16" else 2e-2
    assert 0 < error < limit
    assert 0 < again < limit


def test_cancel_between_layers(f32_model, ids):
    want = f32_model.prefill(ids)
    batch = Batch(
        ids.astype(np.int32),
        np.arange(len(ids), dtype=np.int32),
        np.ones(len(ids), bool),
        (SequenceSlice(0, len(ids), f32_model.pages),),
    )
    calls = iter([False, True])
    with pytest.raises(Cancelled):
        f32_model.transformer.forward(batch, lambda: next(calls))
    assert np.array_equal(f32_model.transformer.forward(batch, lambda: False), want)


def test_types_without_a_kernel_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, np.random.default_rng(0), types={"_exps": "Q8_0"})
    monkeypatch.setattr(weights_module, "is_implemented", lambda name: name != "Q8_0")
    with pytest.raises(KimiLiteError, match="Q8_0, which this version cannot multiply"):
        check_types(GGUFStore.open(path))
