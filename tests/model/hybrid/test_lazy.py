"""The hybrid path on a GPU that is as late as it may be (`lazy_device`): the same results whatever the order."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kimi_lite.model.batch import Batch, Cancelled, SequenceSlice
from tests.model.hybrid import test_hybrid
from tests.model.hybrid.lazy_device import POLICIES
from tests.model.hybrid.runner import DEVICE, HybridRunner, LazyRunner
from tests.model.hybrid.test_hybrid import (  # noqa: F401  these run here again, on the lazy device
    _one_thread,
    test_a_disk_that_fails_leaves_nothing_behind,
    test_batch_equals_one_by_one,
    test_cancel_between_layers,
    test_every_expert_resident,
    test_experts_from_the_disk,
    test_heat_outlives_the_process,
    test_many_sequences_that_decode_wait_for_no_upload,
    test_whatever_happens_to_slots_changes_no_result,
    test_with_cache_equals_without_exactly,
)
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the lazy device stands in for a GPU")
ORDERS = [(policy, 0) for policy in POLICIES if policy != "random"] + [("random", seed) for seed in range(5)]


@pytest.fixture(autouse=True)
def _lazily(request, monkeypatch):
    """The hybrid tests' runner is a lazy one, with a policy and a seed from the test's name."""
    number = sum(request.node.name.encode()) % len(ORDERS)
    monkeypatch.setattr(test_hybrid, "HybridRunner", partial(lazily, *ORDERS[number]))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """As the hybrid tests have it."""
    return write_tiny_gguf(tmp_path_factory.mktemp("hybrid") / "tiny.gguf", np.random.default_rng(0))


@pytest.fixture
def ids():
    return np.random.default_rng(1).integers(0, 290, 160)


def lazily(policy: str, seed: int, path: Path, **options: object) -> HybridRunner:
    """`LazyRunner`, whose options other tests give by their names."""
    return LazyRunner(path, policy, seed, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("lazy") / "tiny.gguf"
    return write_tiny_gguf(path, np.random.default_rng(4), expert_feed_forward_size=256)


def silent(runner: HybridRunner, ids: np.ndarray, start: int, should_stop: Callable[[], bool] | None = None) -> None:
    """A pass without logits: it ends with no wait for the GPU."""
    positions = np.arange(start, start + len(ids), dtype=np.int32)
    pieces = (SequenceSlice(0, len(ids), runner.pages),)
    batch = Batch(ids.astype(np.int32), positions, np.zeros(len(ids), bool), pieces)
    runner.transformer.forward(batch, should_stop)


def story(runner: HybridRunner, ids: np.ndarray, is_streamed: bool) -> list[np.ndarray]:
    """Prompts by rows or streamed, with logits and without, given up half-way, and steps of 1, 3 and 12 tokens."""
    costs = runner.transformer.experts.costs
    costs.stream_s, costs.cpu_s = (1e-9, 1e9) if is_streamed else (1e9, 1e-4)
    silent(runner, ids[:50], 0)
    out = [runner.decode(ids[50:60], 50), runner.prefill(ids[60:63], 60)]
    silent(runner, ids[63:110], 63)
    out += [runner.prefill(ids[110:150], 110), runner.decode(ids[150:156], 150)]
    calls = iter([False, False, True])
    with pytest.raises(Cancelled):
        silent(runner, ids[:80], 0, lambda: next(calls))
    out.append(runner.prefill(ids[:70]))
    pages = [np.array([i], np.int32) for i in range(12)]
    out.append(runner.forward(*[(ids[i : i + 1], 0, pages[i]) for i in range(12)]))
    return out


@pytest.fixture(scope="module")
def wanted(model):
    """The story's results on the immediate stand-in, by whether it is streamed."""
    torch.set_num_threads(1)
    results = {}
    for is_streamed in (False, True):
        with HybridRunner(model, num_gpu_experts=5, group_size=2) as runner:
            results[is_streamed] = story(runner, np.random.default_rng(1).integers(0, 290, 160), is_streamed)
    return results


def differs(have: list[np.ndarray], want: list[np.ndarray]) -> bool:
    """Rows add up in one order, wherever they come from and whenever they came."""
    return not all(np.array_equal(*pair) for pair in zip(have, want, strict=True))


@pytest.mark.parametrize(("policy", "seed"), ORDERS)
@pytest.mark.parametrize("is_streamed", [False, True], ids=["rows", "streamed"])
def test_the_same_whatever_the_order(policy, seed, is_streamed, model, ids, wanted):
    with LazyRunner(model, policy, seed, num_gpu_experts=5, group_size=2) as runner:
        have = story(runner, ids, is_streamed)
        counters = runner.transformer.counters()
        assert runner.device.num_graphs > 0 and counters["gpu_expert_hits"] and counters["expert_promotions"] > 5
        assert is_streamed == (counters["streamed_experts"] > 0)
    assert not differs(have, wanted[is_streamed])
