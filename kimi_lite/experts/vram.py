"""Experts in VRAM: slots that hold the hottest experts' bytes as in the file, and their promotion in the background.

A decode step never waits for an upload. Between two steps `begin_step` makes uploads that have arrived visible and
begins a few others; the bytes go from a slot in RAM or the file (`experts.store`) into pinned memory on a thread of
their own, and from there over the copy stream. What a slot holds changes only between steps, so the host's answer to
"where is this expert?" (`slots_of`) and the device's (`table`) are the same throughout a step, and no kernel reads a
slot that is being written:

    evicted  -> the table no longer names the slot; the copy waits for all kernels launched until now
    arrived  -> the table names the slot from the next step on

Which expert deserves a slot is `policy.HeatPolicy`'s decision. A prompt begins no promotions: it wants nearly every
expert, and what streams for it never passes through these slots; but where its own tokens routed is known afterwards,
and the first steps of the answer bring that in (`model.hybrid.adaptive`).
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Queue

import numpy as np
import torch

from kimi_lite.experts.gpu_streams import Event, GpuStreams
from kimi_lite.experts.memory import NUM_STAGINGS
from kimi_lite.experts.policy import LEAST_GAIN, SWAP_WEIGHTS, HeatPolicy, Promotion
from kimi_lite.experts.store import ExpertStore
from kimi_lite.native.turn_cells import MAX_TOKENS

_MOST_ON_WAY, _SHARE_ON_WAY = 64, 16  # promotions; and at most one slot of so many, as it is of no use meanwhile


@dataclass(slots=True, eq=False)
class _Upload:
    """One expert on its way to its slot."""

    promotion: Promotion
    freed: Event  # kernels that may read the slot have ended
    is_handled: threading.Event = field(default_factory=threading.Event)  # the copy is on its stream, or failed
    arrived: Event | None = None  # in the device's memory
    error: BaseException | None = None
    is_wanted: bool = True


class VramSlots:
    """`num_slots` experts of any layer on the device. One thread uses it; `close` ends its own."""

    def __init__(
        self,
        streams: GpuStreams,
        store: ExpertStore,
        num_slots: int,
        table: torch.Tensor | None = None,
        num_stream_slots: int = 0,
    ) -> None:
        """table: int32 (layers, experts) of -1 on the device, where others look at it before there are slots.

        num_stream_slots: rows of `slots` behind those of the cache, for what a prompt streams (`experts.stream`)."""
        index = store.index
        self._streams, self._store = streams, store
        self.policy = HeatPolicy(index.num_layers, index.num_experts, num_slots, weights=SWAP_WEIGHTS)
        num_rows = max(1, num_slots + num_stream_slots)
        self.slots = streams.zeros((num_rows, index.vram_slot_bytes), torch.uint8)
        self.table = make_table(streams, index.num_layers, index.num_experts) if table is None else table
        self._host_table = np.full((index.num_layers, index.num_experts), -1, np.int32)
        self._stagings: Queue[tuple[torch.Tensor, Event | None]] = Queue()
        for _ in range(NUM_STAGINGS):
            self._stagings.put((streams.pinned((index.vram_slot_bytes,), torch.uint8), None))
        self._queue: Queue[_Upload | None] = Queue()
        self._uploads: deque[_Upload] = deque()  # in the order of the queue
        self._most_on_way = min(_MOST_ON_WAY, max(NUM_STAGINGS, num_slots // _SHARE_ON_WAY))
        self._renamed: dict[tuple[int, int], int] = {}  # what the device's table does not say yet
        self._num_steps = 0.0
        self.num_hits = self.num_misses = self.num_promotions = self.num_cancelled = 0
        self._copier = threading.Thread(target=self._copy_queued, daemon=True, name="kimi-lite-slots")
        self._copier.start()

    @property
    def capacity(self) -> int:
        return self.policy.num_slots

    @property
    def holds_all(self) -> bool:
        """Whether there is a slot for every expert of the model."""
        index = self._store.index
        return self.capacity >= len(index.layers) * index.num_experts

    def slots_of(self, layer: int, expert_ids: np.ndarray) -> np.ndarray:
        """int32 slots of these experts in this step, -1 where the CPU must compute them (or the id is below 0)."""
        slots = self._host_table[layer][np.maximum(expert_ids, 0)]
        return np.where(expert_ids >= 0, slots, -1)

    def residents(self, layer: int) -> np.ndarray:
        """bool (E,): the layer's experts that have a slot in this step."""
        return self._host_table[layer] >= 0

    def count(self, layer: int, expert_ids: np.ndarray) -> None:
        """The step's tokens chose these experts: int32 (T, K)."""
        self.policy.touch(self._num_steps, layer, expert_ids)
        num_hits = int((self._host_table[layer][expert_ids] >= 0).sum())
        self.num_hits += num_hits
        self.num_misses += expert_ids.size - num_hits

    def begin_step(self, budget: int, num_tokens: int = 1, least_gain: float = LEAST_GAIN) -> int:
        """Between steps: what has arrived becomes visible, up to `budget` promotions begin, each of which must be
        expected to bring `least_gain` hits. Returns how many began."""
        self._num_steps += num_tokens
        if num_tokens > MAX_TOKENS:  # a prompt's pass
            self.policy.forget_swaps()
        self._publish_arrived()
        budget = min(budget, self._most_on_way - len(self._uploads))
        began = self.policy.promotions(budget, least_gain) if budget > 0 else []
        self._start(began)
        return len(began)

    def lend(self, count: int) -> tuple[list[int], Event]:
        """Up to `count` slots, the coldest, for something else until `take_back`: their experts leave the table now.
        The slots may be written once the event has happened."""
        lent = self.policy.lend(count)
        for _, key in lent:
            if key is not None:
                self._name(key, -1)
        self._write_names()
        return [slot for slot, _ in lent], self._streams.event()

    def take_back(self, slots: Sequence[int]) -> None:
        """They are empty: promotions fill them again."""
        self.policy.take_back(slots)

    def fill(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Before the first step: bring in all experts where each has a slot, else the hottest, and wait for them."""
        wanted = self._all_absent() if self.holds_all else self.policy.promotions(self.capacity, least_gain=0)
        for done, promotion in enumerate(wanted):
            if on_progress:
                on_progress(done, len(wanted))
            self._start([promotion])
            while len(self._uploads) == NUM_STAGINGS:
                self._wait_for_first()
        self.finish()
        self.policy.forget_swaps()

    def finish(self) -> None:
        """Wait for all promotions that have begun and make them visible."""
        while self._uploads:
            self._wait_for_first()

    def cancel(self) -> None:
        """Give up promotions that have begun: a slot becomes free once nothing writes to it any more."""
        for upload in self._uploads:
            upload.is_wanted = False

    def counters(self) -> dict[str, float]:
        return {
            "gpu_expert_slots": self.capacity,
            "gpu_experts": self.policy.num_resident,
            "gpu_expert_hits": self.num_hits,
            "gpu_expert_misses": self.num_misses,
            "expert_promotions": self.num_promotions,
            "expert_promotions_cancelled": self.num_cancelled,
        }

    def close(self) -> None:
        """Waits for copies on their way and ends the thread."""
        self.cancel()
        self._queue.put(None)
        self._copier.join()

    def _all_absent(self) -> list[Promotion]:
        index = self._store.index
        keys = [(layer, e) for layer in index.layers for e in range(index.num_experts)]
        absent = [key for key in keys if self.policy.is_absent(*key)]
        return [Promotion(*key, slot) for key, slot in zip(absent, self.policy.free_slots, strict=False)]

    def _start(self, promotions: Sequence[Promotion]) -> None:
        for promotion in promotions:
            evicted = self.policy.key(promotion.slot)
            if evicted is not None:
                self._name(evicted, -1)
            self.policy.begin_promotion(promotion)
        self._write_names()
        freed = self._streams.event()
        for promotion in promotions:
            upload = _Upload(promotion, freed)
            self._uploads.append(upload)
            self._queue.put(upload)

    def _name(self, key: tuple[int, int], slot: int) -> None:
        """This expert is in `slot` from now on, -1: nowhere; the device learns it with the next `_write_names`."""
        self._host_table[key] = self._renamed[key] = slot
        self._store.moved(*key, is_in_vram=slot >= 0)

    def _write_names(self) -> None:
        """Into the device's table: on the compute stream, behind the kernels that still look at the old entries."""
        if not self._renamed:
            return
        cells = [layer * self._store.index.num_experts + expert for layer, expert in self._renamed]
        names = torch.tensor([cells, list(self._renamed.values())]).to(self.table.device)
        self.table.view(-1).index_copy_(0, names[0], names[1].to(torch.int32))
        self._renamed.clear()

    def _publish_arrived(self) -> None:
        try:
            while self._uploads and self._has_ended(self._uploads[0]):
                self._publish(self._uploads.popleft())
        finally:
            self._write_names()

    def _publish(self, upload: _Upload) -> None:
        layer, expert, slot, _ = upload.promotion
        if upload.error is not None or not upload.is_wanted:
            self.policy.abort(slot)
            self.num_cancelled += 1
            if upload.error is not None:
                raise upload.error
            return
        self.policy.commit(slot)
        self.num_promotions += 1
        self._name((layer, expert), slot)

    @staticmethod
    def _has_ended(upload: _Upload) -> bool:
        return upload.is_handled.is_set() and (upload.arrived is None or upload.arrived.query())

    def _wait_for_first(self) -> None:
        """Until the oldest upload is published."""
        upload = self._uploads[0]
        upload.is_handled.wait()
        if upload.arrived is not None:
            self._streams.finish(upload.arrived)
        try:
            self._publish(self._uploads.popleft())
        finally:
            self._write_names()

    def _copy_queued(self) -> None:
        """The copier's thread, until it is given None: from the store to pinned memory, from there to the slot."""
        while (upload := self._queue.get()) is not None:
            try:
                self._copy(upload)
            except Exception as error:
                upload.error = error
            finally:
                upload.is_handled.set()

    def _copy(self, upload: _Upload) -> None:
        layer, expert, slot, _ = upload.promotion
        staging, is_free = self._stagings.get()
        try:
            if is_free is not None:
                self._streams.finish(is_free)
            num_bytes = self._store.index.layers[layer].vram_slot_bytes
            if upload.is_wanted:
                self._store.read_into(layer, expert, staging.numpy())
            with self._streams.copying():
                if upload.is_wanted:
                    self._streams.wait(upload.freed)
                    self._streams.copy(self.slots[slot, :num_bytes], staging[:num_bytes])
                is_free = upload.arrived = self._streams.event()
        finally:
            self._stagings.put((staging, is_free))


def make_table(streams: GpuStreams, num_layers: int, num_experts: int) -> torch.Tensor:
    """int32 (layers, experts) of -1 on the device: no expert has a slot yet."""
    return streams.zeros((num_layers, num_experts), torch.int32).fill_(-1)
