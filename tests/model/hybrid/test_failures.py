"""What fails on the GPU, at any operation: a sentence, threads that end, heat that is kept; the same bits afterwards
where there is an afterwards."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.model.hybrid.runner import DEVICE, HybridRunner, LazyRunner
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the lazy device stands in for a GPU")
NUM_POINTS = 12
TEXT = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("failures") / "tiny.gguf", np.random.default_rng(0))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tell(runner: HybridRunner) -> np.ndarray:
    """A prompt by rows, a few steps, a prompt that streams, one step."""
    ids, costs = np.random.default_rng(1).integers(0, 290, 120), runner.transformer.experts.costs
    costs.stream_s, costs.cpu_s = 1e9, 1e-4
    out = [runner.prefill(ids[:40]), runner.decode(ids[40:44], 40)]
    costs.stream_s, costs.cpu_s = 1e-9, 1e9
    return np.concatenate([*out, runner.prefill(ids[44:90], 44), runner.decode(ids[90:91], 90)])


class Fault:
    """Raises `error` at the operation `at`: once, or from then on as CUDA does; only on the thread that made it, where
    `is_own`; only at operations of this name."""

    def __init__(
        self, error: Callable[[], BaseException], at: int, stays: bool = False, is_own: bool = False, name: str = ""
    ) -> None:
        self._error, self._at, self._stays, self._name = error, at, stays, name
        self._thread = threading.get_ident() if is_own else None
        self.num_raised = 0

    def __call__(self, number: int, name: str) -> None:
        is_here = number >= self._at and self._name in ("", name) and self._thread in (None, threading.get_ident())
        if is_here and (self._stays or not self.num_raised):
            self.num_raised += 1
            raise self._error()


@pytest.fixture(scope="module")
def whole(model):
    """The number of operations of loading and of the story, and its result."""
    torch.set_num_threads(1)
    with LazyRunner(model, num_gpu_experts=5, group_size=2) as runner:
        first = runner.device.num_operations
        return first, runner.device.num_operations - first, tell(runner)


def points(first: int, count: int) -> list[int]:
    return [first + count * i // NUM_POINTS for i in range(NUM_POINTS)]


def own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("kimi-lite")}
