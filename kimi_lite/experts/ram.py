"""Routed experts in a limited part of RAM: slots that the kernels read in place, filled from the disk by a pool of
readers.

For a machine with less memory than the model has bytes. Each layer's kernel table names the slot of every expert that
is there; what a pass of the model needs and is not there is read while what is there is computed:

    cache.begin(num_tokens)
    with cache.request(layer, ids) as request:  # pins what is there, begins to read what is not
        cache.prefetch(layer + 1, guess)        # with whatever time the disk has left
        while experts := request.take():        # some that can be computed now; waits only when there are none
            ...run the kernels on them...

Which expert must leave is `policy.HeatPolicy`'s decision; an expert in use never does. One thread uses the cache:
readers only fill slots, and what they bring counts when that thread asks. A failed read is a KimiLiteError, and its
slot is free again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.lock import lock_memory
from kimi_lite.experts.places import ExpertPlaces
from kimi_lite.experts.policy import HALF_LIVES
from kimi_lite.experts.pools import Pool, make_pools
from kimi_lite.experts.reader import ExpertReader, release_memory
from kimi_lite.experts.request import ExpertRequest
from kimi_lite.native.cpu.matrix import DATA

_LOADED_AT_ONCE = 64  # experts, between two reports of progress
_GUESS_WORTH = (
    len(HALF_LIVES) / 2
)  # a guess evicts nobody whose score is higher: such an expert is chosen by every second token


@dataclass(slots=True)
class Counts:
    """Since the cache was made. An expert that a pass needs counts once, however many tokens chose it."""

    hits: int = 0  # it was there
    late: int = 0  # a guess had begun to bring it
    misses: int = 0
    guesses: int = 0  # reads that began before anybody asked
    right_guesses: int = 0
    wait_s: float = 0.0  # there was nothing to compute until the disk delivered


class ExpertCache:
    """The disk tier: slots of at most `budget_bytes` over all routed experts of a model. `close` ends its threads."""

    def __init__(
        self,
        places: ExpertPlaces,
        tables: Mapping[int, np.ndarray],
        budget_bytes: int,
        num_choices: int,
        num_readers: int = 8,
        is_direct: bool = True,
    ) -> None:
        """tables: of each layer with routed experts, int64 (at least experts, 3, 8); the cache writes addresses into
        them.

        num_choices: experts that a token chooses in a layer. Raises KimiLiteError for a budget of less than a few
        tokens' worth.
        """
        self.places, self.counts = places, Counts()
        self._tables = {layer: table[: places.num_experts, :, DATA // 8] for layer, table in tables.items()}
        self._mapped = {layer: addresses.copy() for layer, addresses in self._tables.items()}
        self._pools = make_pools(places, budget_bytes, num_choices)
        self._pool_of = {layer: self._pools[each.slot_bytes] for layer, each in places.layers.items()}
        self._guesses: dict[int, list[int]] = {}  # by layer: slots that the last guess is being read into
        self._step = 0
        self.reader = ExpertReader(places.shards, num_readers, is_direct)

    # What a pass of the model does --------------------------------------------------------------------------------

    def begin(self, num_tokens: int) -> None:
        """A pass over so many tokens begins."""
        self._step += num_tokens
        self.collect()

    def request(self, layer: int, expert_ids: np.ndarray, is_ordered: bool = False) -> ExpertRequest:
        """The experts of one layer that these choices name; reading begins now. is_ordered: to be taken in ascending
        order."""
        pool = self._pool_of[layer]
        pool.policy.touch(self._step, layer, expert_ids)
        self.collect()
        experts = np.unique(expert_ids)
        self._drop_wrong_guesses(pool, layer, experts)
        for expert in experts.tolist():
            self._count(pool, layer, expert)
        return ExpertRequest(self, layer, experts, is_ordered)

    def prefetch(self, layer: int, expert_ids: np.ndarray) -> None:
        """A guess of what a layer will need: read while nothing else is, into slots that are free or cold."""
        pool = self._pool_of[layer]
        absent = [e for e in np.unique(expert_ids).tolist() if pool.policy.is_absent(layer, e)]
        room = pool.policy.num_slots // 2 - len(pool.jobs)
        slots = self._guesses.setdefault(layer, [])
        for expert in absent[: max(0, room)]:
            slot = self._begin_read(pool, layer, expert, is_urgent=False)
            if slot < 0:
                return
            self.counts.guesses += 1
            pool.unproved.add(slot)
            slots.append(slot)

    def warm(self) -> int:
        """Bring the hottest experts into free slots, in the background: those that the heat remembers. Returns how
        many."""
        count = 0
        for pool in self._pools.values():
            for layer, expert in pool.policy.hottest(pool.policy.num_free):
                if pool.policy.is_absent(layer, expert):
                    count += self._begin_read(pool, layer, expert, is_urgent=False) >= 0
        return count

    def load_all(self, on_progress: Callable[[int, int], None]) -> None:
        """Bring in every expert that has room, layer by layer: on_progress(bytes done, bytes in all). Raises
        KimiLiteError."""
        wanted = [(layer, expert) for layer in self.places.layers for expert in range(self.places.num_experts)]
        wanted = [key for key in wanted if self._pool_of[key[0]].policy.is_absent(*key)]
        num_bytes = {layer: each.expert_bytes for layer, each in self.places.layers.items()}
        done, total = 0, sum(num_bytes[layer] for layer, _ in wanted)
        for start in range(0, len(wanted), _LOADED_AT_ONCE):
            part = wanted[start : start + _LOADED_AT_ONCE]
            part = [
                (layer, e) for layer, e in part if self._pool_of[layer].policy.num_free and self.require(layer, e) >= 0
            ]
            self._wait_for(part)
            done += sum(num_bytes[layer] for layer, _ in part)
            on_progress(done, total)

    def _wait_for(self, keys: Sequence[tuple[int, int]]) -> None:
        """Until these reads have ended. Raises KimiLiteError for one that failed."""
        slots = [
            (self._pool_of[layer], self._pool_of[layer].policy.loading_slot(layer, e), layer, e) for layer, e in keys
        ]
        for pool, slot, _, _ in slots:
            pool.policy.pin([slot])
        try:
            while any(slot in pool.jobs for pool, slot, _, _ in slots):
                self.collect(is_waiting=True)
            for pool, slot, layer, expert in slots:
                if slot in pool.broken:
                    raise self.failure(layer, expert, pool.broken[slot])
        finally:
            for pool, slot, layer, _ in slots:
                pool.policy.unpin([slot])
                self.give_up(layer, slot)

    def lock(self) -> None:
        """Keep the slots in RAM whatever else needs memory. Raises KimiLiteError where the system does not allow it."""
        lock_memory([pool.memory for pool in self._pools.values()])

    @property
    def holds_all(self) -> bool:
        """Whether every expert is there, so that nothing ever needs to be read."""
        return (
            sum(pool.policy.num_resident for pool in self._pools.values())
            == len(self.places.layers) * self.places.num_experts
        )

    def resize(self, budget_bytes: int) -> None:
        """Another budget, of at most the first one's slots: cold experts go, or slots come back. Slots in use stay."""
        whole_bytes = sum(len(pool.memory) for pool in self._pools.values())
        for pool in self._pools.values():
            most = len(pool.memory) // pool.slot_bytes
            for slot in pool.policy.resize(min(most, int(most * budget_bytes / whole_bytes))):
                self._forget_owner(pool, slot)
                release_memory(pool.memory, slot * pool.slot_bytes, pool.slot_bytes)

    def cancel(self) -> None:
        """Nobody waits any more: what has not been read yet is not read."""
        for pool in self._pools.values():
            for slot in list(pool.jobs):
                self._cancel(pool, slot)
        self._guesses.clear()

    def close(self) -> None:
        """End the readers; the tables name the mapped file again."""
        self.reader.close()
        for layer, addresses in self._tables.items():
            addresses[:] = self._mapped[layer]

    # What is in it ------------------------------------------------------------------------------------------------

    @property
    def num_slots(self) -> int:
        return sum(pool.policy.num_slots for pool in self._pools.values())

    def export_heat(self) -> np.ndarray:
        """float32 (H, layers, experts); see `HeatPolicy.export_heat`."""
        return sum(pool.policy.export_heat() for pool in self._pools.values())

    def import_heat(self, heat: np.ndarray) -> None:
        for pool in self._pools.values():
            own = np.zeros_like(heat)
            layers = [layer for layer, each in self._pool_of.items() if each is pool]
            own[:, layers] = heat[:, layers]
            pool.policy.import_heat(own)

    @property
    def heat_shape(self) -> tuple[int, int, int]:
        return len(HALF_LIVES), max(self.places.layers) + 1, self.places.num_experts

    def residents(self, layer: int) -> np.ndarray:
        """bool (experts,)"""
        return self._pool_of[layer].policy.residents(layer)

    def counters(self) -> dict[str, float]:
        """For people and for `tools.bench`."""
        counts, stats = self.counts, self.reader.stats
        pools = self._pools.values()
        return {
            "expert_hits": counts.hits,
            "expert_late": counts.late,
            "expert_misses": counts.misses,
            "expert_guesses": counts.guesses,
            "expert_right_guesses": counts.right_guesses,
            "expert_wait_s": counts.wait_s,
            "expert_slots": self.num_slots,
            "expert_resident_bytes": sum(pool.policy.num_resident * pool.slot_bytes for pool in pools),
            "disk_bytes": stats.num_bytes,
            "disk_busy_s": stats.busy_s,
            "disk_is_direct": float(self.reader.is_direct),  # 0: through the page cache, as the file system wants
        }

    # What requests use --------------------------------------------------------------------------------------------

    def pool_of(self, layer: int) -> Pool:
        return self._pool_of[layer]

    def require(self, layer: int, expert: int) -> int:
        """The slot to which an expert comes that must be there soon, and begins to; -1: no slot can be had now."""
        pool = self._pool_of[layer]
        slot = pool.policy.loading_slot(layer, expert)
        if slot < 0:
            return self._begin_read(pool, layer, expert, is_urgent=True)
        if slot not in pool.jobs or pool.jobs[slot].is_cancelled:
            return -1  # its last pieces are on their way to nowhere
        self.reader.hurry(pool.jobs[slot])
        return slot

    def collect(self, is_waiting: bool = False) -> None:
        """Let what has been read count; with `is_waiting`, wait until something has."""
        assert not is_waiting or any(pool.jobs for pool in self._pools.values())
        for job in self.reader.finished(is_waiting):
            pool, slot, layer, expert = job.tag
            del pool.jobs[slot]
            if job.error is not None and not job.is_cancelled and pool.policy.is_pinned(slot):
                pool.broken[slot] = job.error  # the request that waits for it says so
            elif job.error is not None or job.is_cancelled:
                self._abort(pool, slot)
            else:
                pool.policy.commit(slot)
                rooms = self.places.layers[layer].rooms(expert, pool.slot(slot))
                pool.owners[slot] = (layer, expert)
                self._tables[layer][expert] = [room.ctypes.data + run.start - run.first_block for run, room in rooms]

    def give_up(self, layer: int, slot: int) -> None:
        """A request lets go of an expert that failed to come."""
        pool = self._pool_of[layer]
        if pool.broken.pop(slot, None) is not None:
            self._abort(pool, slot)

    def failure(self, layer: int, expert: int, error: OSError) -> KimiLiteError:
        where = self.reader.shards[self.places.layers[layer].files[0]].name
        reason = error.strerror or str(error)
        return KimiLiteError(
            f"{where}: expert {expert} of layer {layer} could not be read: {reason}.",
            "Check the disk and its cable with: dmesg | tail. A copy of the file on another disk helps.",
        )

    # Details ------------------------------------------------------------------------------------------------------

    def _begin_read(self, pool: Pool, layer: int, expert: int, is_urgent: bool) -> int:
        slot = self._admit(pool, layer, expert, is_urgent)
        if slot >= 0:
            rooms = self.places.layers[layer].rooms(expert, pool.slot(slot))
            pool.jobs[slot] = self.reader.submit(rooms, is_urgent, (pool, slot, layer, expert))
        return slot

    def _admit(self, pool: Pool, layer: int, expert: int, is_urgent: bool) -> int:
        """A slot, its old expert evicted. What is needed now takes the slots of guesses that have not begun to be
        read."""
        limit = np.inf if is_urgent else _GUESS_WORTH
        slot = pool.policy.admit(layer, [expert], limit)[0]
        if slot < 0 and is_urgent and self._withdraw_guess(pool):
            slot = pool.policy.admit(layer, [expert])[0]
        if slot >= 0:
            self._forget_owner(pool, slot)
        return slot

    def _forget_owner(self, pool: Pool, slot: int) -> None:
        """An expert has left its slot: its table names the mapped file again."""
        pool.unproved.discard(slot)
        layer, expert = pool.owners.pop(slot, (0, 0))
        if layer in self._tables and pool.policy.is_absent(layer, expert):
            self._tables[layer][expert] = self._mapped[layer][expert]

    def _withdraw_guess(self, pool: Pool) -> bool:
        """Frees the slot of the last guess that has not begun to be read."""
        return any(not pool.jobs[slot].is_urgent and self._withdraw(pool, slot) for slot in list(reversed(pool.jobs)))

    def _withdraw(self, pool: Pool, slot: int) -> bool:
        if not self.reader.withdraw(pool.jobs[slot]):
            return False
        del pool.jobs[slot]
        self._abort(pool, slot)
        return True

    def _cancel(self, pool: Pool, slot: int) -> None:
        """The slot is free now, or when the pieces that are being read have come."""
        if not self._withdraw(pool, slot):
            self.reader.cancel(pool.jobs[slot])

    def _abort(self, pool: Pool, slot: int) -> None:
        pool.policy.abort(slot)
        pool.unproved.discard(slot)

    def _drop_wrong_guesses(self, pool: Pool, layer: int, experts: np.ndarray) -> None:
        for slot in self._guesses.pop(layer, []):
            key = pool.policy.key(slot)
            if slot in pool.jobs and key is not None and key[0] == layer and key[1] not in experts:
                self._cancel(pool, slot)

    def _count(self, pool: Pool, layer: int, expert: int) -> None:
        slot, late = int(pool.policy.find(layer, expert)), pool.policy.loading_slot(layer, expert)
        if slot >= 0:
            self.counts.hits += 1
        elif late >= 0:
            self.counts.late += 1
        else:
            self.counts.misses += 1
        if max(slot, late) in pool.unproved:
            pool.unproved.discard(max(slot, late))
            self.counts.right_guesses += 1
