"""What fails on the GPU, at any operation: a sentence, threads that end, heat that is kept; the same bits afterwards
where there is an afterwards."""

import asyncio
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kimi_lite.engine import loader
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.service import EngineService, Unavailable
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_failure import GpuBroken, GpuMemoryEnded, told
from kimi_lite.experts.heat import heat_path
from kimi_lite.model.hybrid import load
from kimi_lite.options import Options
from tests.model.hybrid.lazy_device import LazyDevice, LazyKernels
from tests.model.hybrid.runner import DEVICE, HybridRunner, LazyRunner
from tests.model.hybrid.stand_in import GPU, StandInKernels
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the lazy device stands in for a GPU")
NUM_POINTS = 9
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


def run_with(fault: Fault, model: Path, heat_file: Path) -> BaseException | None:
    """The story with a fault in it, from loading to close. What it raised; all threads have ended."""
    before = own_threads()
    device = LazyDevice("late")
    device.on_operation = fault
    caught: BaseException | None = None
    try:
        with told("while the model was loaded", "Less."):
            runner = LazyRunner(model, device=device, num_gpu_experts=5, group_size=2, heat_file=heat_file)
        with runner:
            tell(runner)
    except (KimiLiteError, KeyboardInterrupt) as error:
        caught = error
    for thread in own_threads() - before:
        thread.join(20)
        assert not thread.is_alive(), thread.name
    return caught


@pytest.mark.parametrize("point", range(NUM_POINTS))
def test_an_error_of_the_gpu_is_a_sentence(point, model, whole, tmp_path):
    """CUDA's errors stay: whatever is asked of it after one raises it again, close as well."""
    first, count, _ = whole
    at = count * point // NUM_POINTS + (0 if point % 3 == 0 else first)  # some while the model is loaded
    fault = Fault(lambda: torch.AcceleratorError(TEXT), at, stays=True)
    error = run_with(fault, model, tmp_path / "heat.npz")
    assert fault.num_raised and isinstance(error, GpuBroken), error
    assert "an illegal memory access was encountered" in error.message and "\n" not in error.message
    assert (tmp_path / "heat.npz").exists() or at < first


@pytest.mark.parametrize("point", range(1, NUM_POINTS, 2))
def test_memory_that_ends_once_is_done_with_less(point, model, whole, tmp_path):
    first, count, want = whole
    with LazyRunner(model, num_gpu_experts=5, group_size=2) as runner:
        at = first + count * point // (NUM_POINTS + 2)
        fault = runner.device.on_operation = Fault(
            lambda: torch.OutOfMemoryError("CUDA out of memory."), at, name="allocate"
        )
        have = tell(runner)
        assert fault.num_raised == 1
    assert np.allclose(have, want, rtol=1e-3, atol=2e-5)


def test_memory_that_ends_for_good_is_a_sentence(model, whole):
    """And when there is memory again, it goes on."""
    with LazyRunner(model, num_gpu_experts=5, group_size=2) as runner:
        fault = Fault(lambda: torch.OutOfMemoryError("CUDA out of memory."), 0, stays=True, name="allocate")
        runner.device.on_operation = fault
        for _ in range(2):
            with pytest.raises(GpuMemoryEnded, match="The GPU ran out of memory in a pass over"):
                tell(runner)
        runner.device.on_operation = None
        assert np.allclose(tell(runner), whole[2], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_loading_that_is_ended_ends_its_threads(error, model, whole, tmp_path):
    for point in range(1, 6):
        fault = Fault(error, whole[0] * point // 6, is_own=error is KeyboardInterrupt)
        caught = run_with(fault, model, tmp_path / "heat.npz")
        assert fault.num_raised == 1 and isinstance(caught, KeyboardInterrupt | GpuMemoryEnded)


@pytest.mark.parametrize("point", range(0, NUM_POINTS, 2))
def test_ctrl_c_anywhere_leaves_nothing_behind(point, model, whole):
    first, count, want = whole
    with LazyRunner(model, num_gpu_experts=5, group_size=2) as runner:
        at = first + count * point // (NUM_POINTS + 2)
        fault = runner.device.on_operation = Fault(KeyboardInterrupt, at, is_own=True)
        with pytest.raises(KeyboardInterrupt):
            tell(runner)
        assert fault.num_raised == 1
        assert np.array_equal(tell(runner), want)


@pytest.fixture
def lazy_loading(monkeypatch):
    """`loader.load` makes a hybrid path on the device that is returned."""
    device = LazyDevice("late")
    monkeypatch.setattr(loader, "choose_device", lambda wanted: "cuda")
    monkeypatch.setattr(loader, "find_gpu", lambda device: GPU)
    monkeypatch.setattr(load, "GpuStreams", lambda name, limit_bytes: device)
    monkeypatch.setattr(load, "TritonKernels", lambda: LazyKernels(device, StandInKernels()))
    with device:
        yield device


def test_a_service_whose_gpu_breaks_says_so(model, lazy_loading, tmp_path):
    """The answer that runs ends with the sentence, who comes later hears it too, and the engine is closed: its heat is
    next to the model."""
    before = own_threads()
    path = tmp_path / "tiny.gguf"
    path.write_bytes(model.read_bytes())
    options = Options(context_length=256, kv_dtype="f32", num_threads=1, num_gpu_experts=4, dense_type="file")

    def open_engine() -> Engine:
        lazy_loading.__enter__()  # on the service's thread
        return loader.load(path, options)

    async def serve() -> tuple[list[str], EngineService]:
        service = EngineService(open_engine)
        service.start()
        await asyncio.to_thread(service.is_ready.wait)
        sentences = []
        for number in range(2):
            request = Request(str(number), tuple(range(5, 45)), SamplingParams(max_tokens=30, ignore_eos=True))
            try:
                async for _ in service.submit(request):
                    at = lazy_loading.num_operations + 20
                    lazy_loading.on_operation = Fault(lambda: torch.AcceleratorError(TEXT), at, stays=True)
            except Unavailable as error:
                sentences.append(error.message)
        await service.close(1)
        return sentences, service

    sentences, service = asyncio.run(serve())
    assert len(sentences) == 2 and service.state == "failed" and isinstance(service.failure, GpuBroken)
    assert all("The GPU reported an error in a pass over" in sentence for sentence in sentences)
    assert heat_path(path).exists()
    for thread in own_threads() - before:
        if thread.name != "kimi-lite-engine":
            thread.join(20)
            assert not thread.is_alive(), thread.name


def test_dropped_shapes_free_their_graphs_at_once(model, monkeypatch):
    """Not when a collector comes by: the graphs of a shape hold VRAM."""
    monkeypatch.setattr("kimi_lite.model.hybrid.transformer.DECODE_SHAPES", 2)
    pages = [np.array([i], np.int32) for i in range(4)]
    with LazyRunner(model, num_gpu_experts=5) as runner:
        gc.disable()
        try:
            for count in (1, 2, 4, 1, 2, 4):
                for _ in range(2):  # the second is captured
                    runner.forward(*[(np.array([i]), 0, pages[i]) for i in range(count)], num_generated=count)
            assert runner.device.num_graphs == 2
        finally:
            gc.enable()
    assert runner.device.num_graphs == 0


def test_warm_up_makes_no_expert_hot(model):
    with LazyRunner(model, num_gpu_experts=5) as runner:
        assert not runner.transformer.heat().any()
        counters = runner.transformer.counters()
        assert not counters["gpu_expert_hits"] and not counters["gpu_expert_misses"]
        runner.decode(np.arange(3))
        assert runner.transformer.heat().any()
