"""Experts on their way through the GPU for a prompt: a ring of small pinned pieces, then a ring of slots in VRAM.

A few threads read gate, up or down of an expert (`experts.store`) into the next piece; the feeder's thread sends each
piece over the bus to the expert's slot. A piece is a few megabytes and the ring of them stays in the processor's cache,
so the memory's bandwidth pays for reading an expert once and for nothing else. The ring of slots is as long as the GPU
should be ahead of its products: what the next layer will want is requested while this one computes, and comes while its
attention does. Slots may be lent for a prompt and taken back after it.

    stream.request(layer, experts)  # in the order in which they are wanted
    stream.keep(layer, wanted)  # what has not begun and is not wanted after all will not come
    for group in stream.groups(layer): ...  # group.slots: rows of `memory`, which are its until the next turn

An expert that cannot be read is an error where its group is taken, and the stream goes on. Anything else that fails,
the GPU above all, ends the stream: from then on every call but `cancel` and `close` raises that error.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_streams import Event, GpuStreams
from kimi_lite.experts.memory import BLOCK_BYTES, MIN_PIECES, RING_BYTES
from kimi_lite.experts.store import ExpertStore

COPY_THREADS = 4  # that read RAM fast enough for the bus; a disk wants more
_NUM_PARTS = 3  # gate, up, down
_PATIENCE_S = 30.0  # without any progress, after which disk or GPU are taken for dead


class ExpertGroup(NamedTuple):
    """Some experts of a layer; `experts[i]` is in row `slots[i]` of the stream's memory."""

    layer: int
    experts: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Entry:
    """An expert and the slot it is given. `before`: what the slot held, until that is known to have been read;
    `consumed`: behind the last products that read this one, once it is given back."""

    expert: int
    slot: int
    before: "_Entry | None" = None
    is_dropped: bool = False  # never read: the slot still holds what it held
    is_given_back: bool = False
    consumed: Event | None = None

    def last(self) -> "_Entry":
        """Of the slot's entries up to this one, the last that was read."""
        entry = self
        while entry.is_dropped:
            entry = entry.before
        return entry


@dataclass(slots=True, eq=False)
class _Group:
    layer: int
    entries: list[_Entry]
    num_begun: int = 0  # entries of which reading has begun, or that were dropped
    num_left: int = 0  # parts on their way
    arrived: Event | None = None
    error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.num_begun == len(self.entries) and self.num_left == 0

    @property
    def present(self) -> list[_Entry]:
        return [entry for entry in self.entries if not entry.is_dropped]


@dataclass(slots=True, eq=False)
class _Piece:
    memory: torch.Tensor  # uint8, pinned, on a border of BLOCK_BYTES
    uploaded: Event | None = None  # until then the bus reads it


class _Read(NamedTuple):
    """One matrix on its way into its piece."""

    group: _Group
    entry: _Entry
    part: int
    piece: _Piece
    data: Future[np.ndarray]


class PromptStream:
    """`group_size` experts at a time. One thread requests, another may take; `close` ends the stream's own."""

    def __init__(
        self,
        streams: GpuStreams,
        store: ExpertStore,
        memory: torch.Tensor,
        slots: Sequence[int],
        group_size: int,
        num_threads: int = COPY_THREADS,
    ) -> None:
        """memory: uint8 (rows, at least vram_slot_bytes) on the device; `slots`: its rows that are the stream's, at
        least `group_size`. num_threads: that read experts into pinned memory."""
        assert 0 < group_size <= len(slots), (group_size, slots)
        self._streams, self._store, self.memory, self.group_size = streams, store, memory, group_size
        self._own = [_Entry(-1, slot, is_given_back=True) for slot in slots]
        self._ring, self._at = list(self._own), 0  # the last entry of each slot; where the next one goes
        self._pieces = make_pieces(streams, store.index.piece_bytes, num_threads)
        self._changed = threading.Condition()
        self._queue: deque[_Group] = deque()  # not begun, or not all of it
        self._waiting: deque[_Group] = deque()  # not taken
        self._dead: BaseException | None = None
        self._is_closed = False
        self._num_reads, self._seen = 0, (0, 0.0)
        self.num_streamed = self.num_bytes = 0  # experts taken; bytes over the bus
        self.busy_s = self.read_wait_s = self.bus_wait_s = 0.0  # of the feeder: in all, for memory or disk, for the bus
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="kimi-lite-stream")
        self._feeder = threading.Thread(target=self._feed, daemon=True, name="kimi-lite-stream")
        self._feeder.start()

    @property
    def num_slots(self) -> int:
        return len(self._ring)

    @property
    def num_lent(self) -> int:
        return len(self._ring) - len(self._own)

    def lend(self, slots: Sequence[int], freed: Event) -> None:
        """More rows of `memory` for the ring, to be written once `freed` has happened."""
        lent = [_Entry(-1, slot, is_given_back=True, consumed=freed) for slot in slots]
        with self._changed:
            self._ring[self._at : self._at] = lent

    def take_back(self) -> list[int]:
        """The rows that were lent: nothing writes to them any more but copies that are on their stream already, and
        products that read them are on theirs. Gives up what was not taken."""
        self.cancel()
        with self._changed:
            own = {entry.slot for entry in self._own}
            slots = [entry.slot for entry in self._ring if entry.slot not in own]
            self._own = [entry.last() for entry in self._ring if entry.slot in own]
            self._ring, self._at = list(self._own), 0
        return slots

    def request(self, layer: int, experts: Sequence[int]) -> None:
        """Begin loading these experts, behind all that was requested before."""
        with self._changed:
            self._check()
            for first in range(0, len(experts), self.group_size):
                group = _Group(layer, [self._enter(e) for e in experts[first : first + self.group_size]])
                self._waiting.append(group)
                self._queue.append(group)
            self._changed.notify_all()

    def requested(self, layer: int) -> list[tuple[int, int]]:
        """(expert, slot) of this layer's experts that will come, in that order."""
        with self._changed:
            groups = [group for group in self._waiting if group.layer == layer]
            return [(entry.expert, entry.slot) for group in groups for entry in group.present]

    def begun(self, layer: int) -> list[int]:
        """This layer's experts that have been read or are being read."""
        with self._changed:
            groups = [group for group in self._waiting if group.layer == layer]
            return [
                entry.expert for group in groups for entry in group.entries[: group.num_begun] if not entry.is_dropped
            ]

    def keep(self, layer: int, wanted: Set[int]) -> None:
        """Of this layer's experts, those that are not wanted and have not begun will not come."""
        with self._changed:
            for group in self._waiting:
                for entry in group.entries[group.num_begun :] if group.layer == layer else ():
                    entry.is_dropped |= entry.expert not in wanted
            self._changed.notify_all()

    def groups(self, layer: int) -> Iterator[ExpertGroup]:
        """This layer's groups as they arrive. A group's slots may be written once the next one is asked for. Raises
        what kept a group from coming."""
        while (group := self._take(layer)) is not None:
            try:
                if group.error is not None:
                    raise group.error
                entries = group.present
                if entries:
                    self._streams.wait(group.arrived)
                    yield ExpertGroup(layer, tuple(e.expert for e in entries), tuple(e.slot for e in entries))
            finally:
                self._give_back(group)
            self.num_streamed += len(entries)

    def cancel(self) -> None:
        """Forget every group that was not taken; what is being read ends first."""
        with self._changed:
            for group in self._waiting:
                for entry in group.entries[group.num_begun :]:
                    entry.is_dropped = True
                group.num_begun = len(group.entries)
            self._queue.clear()
            self._changed.notify_all()
            self._wait_until(lambda: all(group.is_done for group in self._waiting))
            for group in self._waiting:
                for entry in group.present:
                    entry.is_given_back = True
                    entry.is_dropped = entry.before is not None  # nothing of it could be read
            self._waiting.clear()

    def new_work(self) -> tuple[int, float]:
        """Bytes that were sent since the last call, and the seconds that took: without those in which nothing was
        wanted or no slot was free."""
        now = self.num_bytes, self.busy_s
        new = now[0] - self._seen[0], now[1] - self._seen[1]
        self._seen = now
        return new

    def counters(self) -> dict[str, float]:
        return {
            "streamed_experts": self.num_streamed,
            "stream_bus_bytes": self.num_bytes,
            "stream_busy_s": self.busy_s,
            "stream_read_wait_s": self.read_wait_s,
            "stream_bus_wait_s": self.bus_wait_s,
            "stream_slots": self.num_slots,
        }

    def close(self) -> None:
        """Ends the threads. A second call does nothing."""
        self.cancel()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._feeder.join(_PATIENCE_S)  # longer only where it hangs in the driver, with which it will end
        self._pool.shutdown(wait=not self._feeder.is_alive())

    def _enter(self, expert: int) -> _Entry:
        """The next slot of the ring, for this expert."""
        entry = _Entry(expert, self._ring[self._at].slot, self._ring[self._at])
        self._ring[self._at] = entry
        self._at = (self._at + 1) % len(self._ring)
        return entry

    def _take(self, layer: int) -> _Group | None:
        """The layer's next group once it has come, or has failed to; None where there is none left."""
        with self._changed:
            self._check()
            if not self._waiting or self._waiting[0].layer != layer:
                return None
            self._wait_until(lambda: self._waiting[0].is_done)
            self._check()
            return self._waiting.popleft()

    def _give_back(self, group: _Group) -> None:
        consumed = self._streams.event()
        with self._changed:
            for entry in group.present:
                entry.consumed, entry.is_given_back = consumed, True
            self._changed.notify_all()

    def _check(self) -> None:
        if self._dead is not None:
            raise self._dead

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        """With the lock held: until `is_so()`, or the stream is dead."""
        seen = self._num_reads
        while not is_so() and self._dead is None:
            if self._changed.wait(_PATIENCE_S):
                continue
            if self._num_reads == seen and not is_so():
                self._dead = KimiLiteError(
                    f"Experts on their way to the GPU have not moved for {_PATIENCE_S:.0f} seconds.",
                    "Look for errors of the disk or the GPU with: dmesg | tail. Then start kimi-lite again.",
                )
            seen = self._num_reads

    def _feed(self) -> None:
        """The feeder's thread: reads begin in order, as many as there are pieces; what has been read is sent on."""
        self._streams.enter_thread()
        reads: deque[_Read] = deque()
        parts: deque[tuple[_Group, _Entry, int]] = deque()
        try:
            while True:
                if not parts and (begun := self._begin_next(is_waiting=not reads)) is not None:
                    parts.extend((*begun, part) for part in range(_NUM_PARTS))
                if not parts and not reads:
                    return
                start_s = time.perf_counter()
                while reads and (not parts or len(reads) == len(self._pieces) or reads[0].data.done()):
                    self._upload(reads.popleft())
                    if not parts:
                        break  # something may be able to begin now
                if parts:
                    reads.append(self._begin_read(*parts.popleft()))
                self.busy_s += time.perf_counter() - start_s
        except BaseException as error:
            with self._changed:
                self._dead = self._dead or error
                self._changed.notify_all()

    def _begin_next(self, is_waiting: bool) -> tuple[_Group, _Entry] | None:
        """The next expert whose slot is free. None where there is none now, with `is_waiting` only at the end."""
        with self._changed:
            while (begun := self._first_that_can_begin()) is None and is_waiting and not self._is_closed:
                self._changed.wait()
            return begun

    def _first_that_can_begin(self) -> tuple[_Group, _Entry] | None:
        while self._queue:
            group = self._queue[0]
            while group.num_begun < len(group.entries):
                entry = group.entries[group.num_begun]
                if not entry.is_dropped and not entry.before.last().is_given_back:
                    return None
                group.num_begun += 1
                if not entry.is_dropped:
                    group.num_left += _NUM_PARTS
                    return group, entry
            self._queue.popleft()
            self._changed.notify_all()  # it may be done
        return None

    def _begin_read(self, group: _Group, entry: _Entry, part: int) -> _Read:
        piece = self._pieces[self._num_reads % len(self._pieces)]
        self._num_reads += 1
        if piece.uploaded is not None:
            start_s = time.perf_counter()
            self._streams.finish(piece.uploaded)
            self.bus_wait_s += time.perf_counter() - start_s
        data = self._pool.submit(self._store.read_part, group.layer, entry.expert, part, piece.memory.numpy())
        return _Read(group, entry, part, piece, data)

    def _upload(self, read: _Read) -> None:
        """From the piece to the slot on the copy stream, behind the products that read what the slot held before."""
        group, entry, part, piece, future = read
        start_s = time.perf_counter()
        try:
            data = future.result()
        except Exception as error:
            group.error = group.error or error
            self._finish_part(group)
            return
        self.read_wait_s += time.perf_counter() - start_s
        matrix = self._store.index.layers[group.layer].matrices[part]
        first = data.ctypes.data - piece.memory.data_ptr()
        with self._streams.copying():
            if entry.before is not None:
                if (consumed := entry.before.last().consumed) is not None:
                    self._streams.wait(consumed)
                entry.before = None
            self._streams.copy(
                self.memory[entry.slot, matrix.offset : matrix.end], piece.memory[first : first + matrix.num_bytes]
            )
            piece.uploaded = self._streams.event()
        self.num_bytes += matrix.num_bytes
        self._finish_part(group, piece.uploaded)

    def _finish_part(self, group: _Group, uploaded: Event | None = None) -> None:
        with self._changed:
            group.arrived = uploaded or group.arrived  # the last one's: copies keep their order
            group.num_left -= 1
            if group.is_done:
                self._changed.notify_all()


def num_pieces(piece_bytes: int, num_threads: int) -> int:
    """Of the ring: two for each thread, where so many stay in the processor's cache."""
    return min(2 * num_threads, max(MIN_PIECES, RING_BYTES // max(1, piece_bytes)))


def make_pieces(streams: GpuStreams, piece_bytes: int, num_threads: int) -> list[_Piece]:
    """One block of pinned memory in pieces of whole pages."""
    count, stride = num_pieces(piece_bytes, num_threads), -(-piece_bytes // BLOCK_BYTES) * BLOCK_BYTES
    memory = streams.pinned((count * stride + BLOCK_BYTES,), torch.uint8)
    first = -memory.data_ptr() % BLOCK_BYTES
    return [_Piece(memory[first + i * stride : first + (i + 1) * stride]) for i in range(count)]
