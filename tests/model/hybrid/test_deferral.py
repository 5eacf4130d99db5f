"""Expert deferral on the hybrid path: as on the CPU path, wherever experts lie, and of decoding alone."""

import numpy as np
import pytest
import torch

from kimi_lite.errors import KimiLiteError
from tests.model.hybrid.runner import DEVICE, HybridRunner
from tests.model.hybrid.test_hybrid import only_rows
from tests.model.runner import Runner, relative_error
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="bits are compared, which the stand-in alone has in common")


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices this small are slower on many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    sizes = {"num_layers": 4, "num_experts_used": 4}
    return write_tiny_gguf(tmp_path_factory.mktemp("deferral") / "tiny.gguf", np.random.default_rng(0), **sizes)


@pytest.fixture
def ids():
    return np.random.default_rng(1).integers(0, 290, 40)


@pytest.mark.parametrize("num_deferred", [1, 3])
def test_as_on_the_cpu_path(num_deferred, path, ids):
    with Runner(path, num_deferred_experts=num_deferred, defers_on_cpu=True) as cpu, Runner(path) as plain:
        want, other = cpu.decode(ids[:16]), plain.decode(ids[:16])
    assert relative_error(other, want) > 1e-3
    for num_slots in (0, 5):
        with HybridRunner(path, num_gpu_experts=num_slots, num_deferred_experts=num_deferred) as runner:
            assert relative_error(runner.decode(ids[:16]), want) < 2e-5
            counters = runner.transformer.counters()
            assert num_slots == 0 or counters["gpu_expert_hits"] > 0


def test_with_cache_equals_without_exactly(path, ids):
    """Which experts are deferred says their rank, and not where they lie."""
    found = []
    for num_slots in (0, 7):
        with only_rows(HybridRunner(path, num_gpu_experts=num_slots, num_deferred_experts=2, num_threads=2)) as runner:
            found.append(np.concatenate([runner.prefill(ids[:20]), runner.decode(ids[20:], start=20)]))
    assert np.array_equal(*found)


def test_several_sequences_at_once(path, ids):
    """Each token of a step defers its own."""
    pages = [np.arange(6, dtype=np.int32), np.arange(6, 12, dtype=np.int32)]
    with HybridRunner(path, num_deferred_experts=1) as runner:
        alone = [[runner.forward((ids[at : at + 1], i, p), num_generated=1)[0] for i, at in enumerate((s, s + 5))]
                 for s, p in zip((0, 9), pages, strict=True)]  # fmt: skip
        for i in range(2):
            parts = [(ids[s + 5 * i : s + 5 * i + 1], i, p) for s, p in zip((0, 9), pages, strict=True)]
            both = runner.forward(*parts, num_generated=2)
            assert relative_error(both, np.stack([alone[0][i], alone[1][i]])) < 2e-5


def test_prompts_are_never_deferred(path, ids):
    """Not even their tails of a few tokens, which run as decode steps do where nothing is deferred."""
    with HybridRunner(path) as plain, HybridRunner(path, num_deferred_experts=2) as runner:
        for count in (30, 7, 1):
            assert relative_error(runner.prefill(ids[:count]), plain.prefill(ids[:count])) < 2e-5
        ends = [each.prefill(ids[7:8], start=7) for each in (plain, runner)]
        assert relative_error(*ends) < 2e-5, "the one token that a cache did not have"


def test_what_cannot_be_deferred(path, ids):
    with pytest.raises(KimiLiteError, match="--defer-experts is 4"):
        HybridRunner(path, num_deferred_experts=4)
    with HybridRunner(path, num_gpu_experts=10**6, num_deferred_experts=2) as runner:
        assert runner.transformer.experts.num_deferred == 0, "the CPU has no part in it"
