"""Experts on their way through the GPU for a prompt: groups of them pass through two pinned and two device buffers.

While the GPU multiplies one group, the next crosses the bus and the one after is copied from slots in RAM or the file
(`experts.store`) into pinned memory by a few threads. Groups may be requested before they are needed (the next
layer's, while this one still computes); they come out in the order of the requests.

    stream.request(layer, experts)
    for group in stream.groups(layer): ...  # group.data: (n, slot_bytes) uint8 on the device, valid until the next turn
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from queue import Queue
from typing import NamedTuple

import torch

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_streams import Event, GpuStreams
from kimi_lite.experts.store import ExpertStore

COPY_THREADS = 4  # that read RAM fast enough for the bus; a disk wants more
_NUM_BUFFERS = 2


class ExpertGroup(NamedTuple):
    """Some experts of a layer; row i of `data` is the slot of `experts[i]`."""

    layer: int
    experts: tuple[int, ...]
    data: torch.Tensor  # (len(experts), slot_bytes) uint8, on the device


class _Loaded(NamedTuple):
    """A group whose upload was begun, or why it failed, or neither where it was cancelled."""

    group: ExpertGroup | None
    uploaded: Event | None = None
    error: BaseException | None = None


class PromptStream:
    """`group_size` experts at a time. One thread feeds it and one takes from it; `close` ends its own threads."""

    def __init__(
        self, streams: GpuStreams, store: ExpertStore, group_size: int, num_threads: int = COPY_THREADS
    ) -> None:
        """num_threads: that copy or read experts into pinned memory."""
        assert group_size > 0, group_size
        self._streams, self._store, self.group_size = streams, store, group_size
        shape = (group_size, store.index.vram_slot_bytes)
        self._pinned = [streams.pinned(shape, torch.uint8) for _ in range(_NUM_BUFFERS)]
        self._staged = [streams.zeros(shape, torch.uint8) for _ in range(_NUM_BUFFERS)]
        self._uploaded: list[Event | None] = [None] * _NUM_BUFFERS  # until then the pinned buffer is read
        self._consumed: deque[Event] = deque()  # of the groups given back, oldest first
        self._free = threading.Semaphore(_NUM_BUFFERS)  # device buffers that were given back
        self._requests: Queue[tuple[int, int, tuple[int, ...]] | None] = Queue()
        self._loaded: Queue[_Loaded] = Queue()
        self._waiting: deque[int] = deque()  # layers of the groups not yet taken, in order
        self._num_requested = self._num_cancelled = 0
        self.num_streamed = 0
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="kimi-lite-stream")
        self._feeder = threading.Thread(target=self._feed, daemon=True, name="kimi-lite-stream")
        self._feeder.start()

    def request(self, layer: int, experts: Sequence[int]) -> None:
        """Begin loading these experts, behind all that was requested before."""
        for first in range(0, len(experts), self.group_size):
            self._waiting.append(layer)
            self._num_requested += 1
            self._requests.put((self._num_requested, layer, tuple(experts[first : first + self.group_size])))

    def has_requested(self, layer: int) -> bool:
        """Whether groups of this layer are on their way."""
        return layer in self._waiting

    def groups(self, layer: int) -> Iterator[ExpertGroup]:
        """This layer's groups as they arrive. A group's data may be overwritten once the next one is asked for."""
        while self._waiting and self._waiting[0] == layer:
            loaded = self._take()
            assert loaded.group is not None, layer
            self._streams.wait(loaded.uploaded)
            try:
                yield loaded.group
            finally:
                self._give_back()
            self.num_streamed += len(loaded.group.experts)

    def cancel(self) -> None:
        """Forget every group that was not taken."""
        self._num_cancelled = self._num_requested
        while self._waiting:
            try:
                if self._take().group is not None:
                    self._give_back()
            except KimiLiteError:  # could not be read; a later request for it will fail again
                continue

    def close(self) -> None:
        """Ends the threads."""
        self.cancel()
        self._requests.put(None)
        self._feeder.join()
        self._pool.shutdown()

    def _take(self) -> _Loaded:
        loaded = self._loaded.get()
        self._waiting.popleft()
        if loaded.error is not None:
            raise loaded.error
        return loaded

    def _give_back(self) -> None:
        self._consumed.append(self._streams.event())
        self._free.release()

    def _feed(self) -> None:
        """The feeder's thread, until it is given None: one group after the other, alternating between the buffers."""
        buffer = 0
        while (request := self._requests.get()) is not None:
            number, layer, experts = request
            if number <= self._num_cancelled:
                self._loaded.put(_Loaded(None))
                continue
            try:
                self._fill(buffer, layer, experts)
            except Exception as error:
                self._loaded.put(_Loaded(None, error=error))
                continue
            self._loaded.put(self._upload(buffer, layer, experts))
            buffer = (buffer + 1) % _NUM_BUFFERS

    def _fill(self, buffer: int, layer: int, experts: tuple[int, ...]) -> None:
        """The experts' bytes into the pinned buffer, once the upload before last has left it."""
        if (uploaded := self._uploaded[buffer]) is not None:
            uploaded.synchronize()
        rows = self._pinned[buffer].numpy()
        copies = [self._pool.submit(self._store.read_into, layer, e, rows[i]) for i, e in enumerate(experts)]
        wait(copies)  # all of them, also where one failed: the next group takes the same buffer
        for copy in copies:
            copy.result()

    def _upload(self, buffer: int, layer: int, experts: tuple[int, ...]) -> _Loaded:
        """Pinned to device on the copy stream, behind the products that still read the device buffer."""
        self._free.acquire()
        with self._streams.copying():
            if self._consumed:
                self._streams.wait(self._consumed.popleft())
            data = self._staged[buffer][: len(experts)]
            self._streams.copy(data, self._pinned[buffer][: len(experts)])
            uploaded = self._streams.event()
        self._uploaded[buffer] = uploaded
        return _Loaded(ExpertGroup(layer, experts, data), uploaded)
