"""A torch device with what the hybrid path needs of one: pinned host memory, a stream for copies, events, graphs, free
memory.

The same code runs with a CPU device standing in as the GPU: there a copy is done when it is asked for, so streams and
events have nothing to do.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_failure import GpuBroken, no_pinned_memory
from kimi_lite.hardware.machine import CUDA_BYTES
from kimi_lite.units import gib_apart

HANG_S = 10.0  # that a wait for the GPU may take; what one wait is for is a layer, or a step of 20 to 200 ms
_HANG_TOKEN_S = 0.01  # more for each token of a prompt: a layer of 8,192 at a depth of 256 K takes seconds
_SPIN_S, _NAP_S = 500e-6, 50e-6  # a wait looks all the time, then now and then
_HOST_NAP_S = 2e-3  # while the host itself keeps the GPU waiting: its cores have other work


class Event(Protocol):
    """A point in a stream's work: `torch.cuda.Event`, or `Done` where work is done when it is asked for. The host waits
    for it by `GpuStreams.finish`."""

    def query(self) -> bool: ...


class Done:
    """The event of a device without streams: everything before it has happened."""

    def query(self) -> bool:
        return True


class Graph(Protocol):
    """Captured work of the device: `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """All of it again, behind what the current stream was given."""

    def reset(self) -> None:
        """Its memory is free again; it cannot be replayed any more."""


class GpuStreams:
    """One device; its copy stream is for uploads that run while the current stream computes.

    All streams are made here, once: torch hands out 32 a device in turn, so that of streams made now and then the 33rd
    is the first.
    """

    def __init__(self, name: str, limit_bytes: int | None = None) -> None:
        """name: "cuda", "cuda:1", or "cpu" to stand in as one. limit_bytes: of VRAM, the driver's own part included.

        Raises KimiLiteError where there is no such device, or where the limit is below what the driver needs.
        """
        self.failure: GpuBroken | None = None  # after which nothing is asked of the GPU any more
        self.device = torch.device(name)
        self.is_cuda = self.device.type == "cuda"
        self._limit_bytes: int | None = None
        if self.is_cuda:
            require_cuda(name)
            self.device = torch.device("cuda", self.device.index or 0)
            torch.cuda.set_device(self.device)
            self._set_limit(limit_bytes)
        self._copy_stream = torch.cuda.Stream(self.device) if self.is_cuda else None
        self._capture_stream = torch.cuda.Stream(self.device) if self.is_cuda else None

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that copies to and from the device go through at full speed, without a stop. Raises
        GpuMemoryEnded where the system gives none."""
        try:
            return torch.zeros(shape, dtype=dtype, pin_memory=self.is_cuda)
        except RuntimeError as error:
            refusal = no_pinned_memory(error, math.prod(shape) * dtype.itemsize)
            if refusal is None:
                raise
            raise refusal from error

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def event(self) -> Event:
        """Now, in the current stream."""
        if not self.is_cuda:
            return Done()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, event: Event) -> None:
        """What the current stream is given from now on waits for `event`; the host does not."""
        if self.is_cuda:
            torch.cuda.current_stream(self.device).wait_event(event)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """target = source, behind all that the current stream was given; the host goes on where one of them is
        pinned."""
        target.copy_(source, non_blocking=True)

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Inside, the current stream of this thread is the copy stream."""
        if self._copy_stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._copy_stream):
            yield

    def graph_memory(self) -> tuple[int, int]:
        """A pool that graphs share which never run at the same time."""
        return torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None], memory: tuple[int, int]) -> Graph:
        """What `run` asks of the device, as a graph with its memory in `memory`; nothing is done yet.

        Not `torch.cuda.graph`, which stops the device and empties the memory pool for each of a hundred graphs.
        """
        graph = torch.cuda.CUDAGraph()
        self._capture_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._capture_stream):
            graph.capture_begin(pool=memory, capture_error_mode="thread_local")  # promotions go on meanwhile
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # it says that the capture failed, which hides why
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph

    def enter_thread(self) -> None:
        """What a new thread does first: CUDA's current device is a thread's own."""
        if self.is_cuda:
            torch.cuda.set_device(self.device)

    def finish(self, event: Event, num_tokens: int = 1, host_is_over: threading.Event | None = None) -> None:
        """The host waits for `event` in a pass over so many tokens. host_is_over: until then another thread of the host
        has work that the GPU waits for, which may take any time.

        Raises GpuBroken when the GPU does not answer any more, and at once after that: who waits for one that hangs
        waits for ever. Compiling kernels is no such wait: the host does it before it asks for anything.
        """
        while host_is_over is not None and not event.query() and not host_is_over.wait(_HOST_NAP_S):
            self.require_sound()
        start_s, limit_s = time.monotonic(), HANG_S + num_tokens * _HANG_TOKEN_S
        while not event.query():
            self.require_sound()
            elapsed_s = time.monotonic() - start_s
            if elapsed_s > limit_s:
                self.failure = GpuBroken.silent(limit_s)
            else:
                time.sleep(0 if elapsed_s < _SPIN_S else _NAP_S)

    def require_sound(self) -> None:
        """Raises the GpuBroken that was met before."""
        if self.failure is not None:
            raise self.failure

    def synchronize(self) -> None:
        """The host waits for all streams. Raises as `finish`."""
        self.finish(self.event())
        with self.copying():
            copied = self.event()
        self.finish(copied)

    def give_back(self) -> None:
        """What torch holds unused goes back to the driver, so that what is free is in one piece."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def free_bytes(self) -> int | None:
        """What may still be allocated; None for a device that is no GPU."""
        if not self.is_cuda:
            return None
        allocated = torch.cuda.memory_allocated(self.device)
        driver_bytes = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - allocated
        return driver_bytes if self._limit_bytes is None else min(driver_bytes, self._limit_bytes - allocated)

    def _set_limit(self, limit_bytes: int | None) -> None:
        """torch refuses to allocate beyond it."""
        if limit_bytes is None:
            return
        total_bytes = torch.cuda.get_device_properties(self.device).total_memory
        if limit_bytes <= CUDA_BYTES:
            need, have = gib_apart(CUDA_BYTES, limit_bytes)
            raise KimiLiteError(
                f"--vram allows {have}; CUDA itself takes about {need}.", "Allow more, or try --device cpu."
            )
        self._limit_bytes = min(limit_bytes, total_bytes) - CUDA_BYTES
        torch.cuda.set_per_process_memory_fraction(self._limit_bytes / total_bytes, self.device)


def require_cuda(name: str) -> None:
    """Raise KimiLiteError unless torch can use the CUDA device `name`."""
    index = torch.device(name).index or 0
    if torch.version.cuda is None:
        hint = "Install it from https://pytorch.org/get-started/locally, or say --device cpu."
        raise KimiLiteError(f"--device {name}: this PyTorch ({torch.__version__}) is built without CUDA.", hint)
    count = torch.cuda.device_count()
    if index >= count:
        raise KimiLiteError(
            f"--device {name}: {count} CUDA devices are here.", "nvidia-smi lists them; --device cpu needs none."
        )
