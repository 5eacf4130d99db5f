"""Routed experts in a limited part of RAM: slots that the kernels read in place, filled from the disk by a pool of
readers.

For a machine with less memory than the model has bytes. Each layer's kernel table names the slot of every expert that
is there; what a pass of the model needs and is not there is read while what is there is computed:

    slots.begin(num_tokens)
    with slots.request(layer, ids) as request:  # pins what is there, begins to read what is not
        slots.prefetch(layer + 1, guess)        # with whatever time the disk has left
        while experts := request.take():        # some that can be computed now; waits only when there are none
            ...run the kernels on them...

Which expert must leave is `policy.HeatPolicy`'s decision; an expert in use never does. One thread uses the slots:
readers only fill them, and what they bring counts when that thread asks. `copy_part` alone may be called from any
thread. A failed read is a KimiLiteError, and its slot is free again.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.index import ExpertIndex, RoutedLayer
from kimi_lite.experts.memory import aligned_memory, lock_memory
from kimi_lite.experts.nodes import place_slots, wants_small_pages
from kimi_lite.experts.policy import HALF_LIVES, HeatPolicy
from kimi_lite.experts.reader import ExpertReader, ReadJob, read_failure
from kimi_lite.native.cpu.matrix import DATA
from kimi_lite.native.cpu.nodes import ThreadGroup
from kimi_lite.options import Options
from kimi_lite.units import gib_apart

NUM_READERS = 8  # threads: a disk needs several reads under way
SLOTS_PER_CHOICE = 2  # at least: one token's experts of a layer are read while those before are computed
_LOADED_AT_ONCE = 64  # experts, between two reports of progress
_GUESS_WORTH = len(HALF_LIVES) / 2  # a guess evicts no expert with a higher score: every second token chooses that one
_WINDOW = 32  # experts of a prompt that are read ahead: more would evict what decoding wants to keep
_GROUP = 8  # that are computed in one go: few enough to overlap, enough to keep the cores busy


@dataclass(slots=True)
class Counts:
    """Since the slots were made. An expert that a pass needs counts once, however many tokens chose it."""

    hits: int = 0  # it was there
    late: int = 0  # a guess had begun to bring it
    misses: int = 0
    guesses: int = 0  # reads that began before they were asked for
    right_guesses: int = 0
    wait_s: float = 0.0  # there was nothing to compute until the disk delivered


@dataclass(slots=True, eq=False)
class Pool:
    """Slots of one size. By slot: `jobs`, reads on their way; `broken`, what failed to come while a request waits for
    it; `owners`, the (layer, expert) whose table names the slot."""

    policy: HeatPolicy
    slot_bytes: int
    memory: np.ndarray
    jobs: dict[int, ReadJob] = field(default_factory=dict)
    broken: dict[int, OSError] = field(default_factory=dict)
    owners: dict[int, tuple[int, int]] = field(default_factory=dict)
    unproved: set[int] = field(default_factory=set)  # filled by a guess that has not come true yet

    def slot(self, number: int) -> np.ndarray:
        return self.memory[number * self.slot_bytes : (number + 1) * self.slot_bytes]


def make_pools(
    index: ExpertIndex, budget_bytes: int | None, num_choices: int, groups: Sequence[ThreadGroup] = ()
) -> dict[int, Pool]:
    """The budget, shared out by the bytes of each size's layers. groups: of the threads that will read the slots, where
    memory is on several nodes. Raises KimiLiteError for less than `num_choices` of a layer need."""
    num_layers, whole_bytes = index.num_layers, sum(size * len(layers) for size, layers in index.ram_pools.items())
    budget_bytes = index.ram_bytes if budget_bytes is None else budget_bytes
    counts = {
        size: min(len(layers) * index.num_experts, budget_bytes * len(layers) // whole_bytes)
        for size, layers in index.ram_pools.items()
    }
    least = SLOTS_PER_CHOICE * num_choices
    if min(counts.values()) < least:
        need_bytes = max(-(-least * whole_bytes // len(layers)) for layers in index.ram_pools.values())
        need, have = gib_apart(need_bytes, budget_bytes)
        raise KimiLiteError(
            f"The expert cache needs at least {need} to hold {least} experts of a layer; the budget leaves {have}.",
            f"Give {need} more than now with --ram, or a shorter context with -c.",
        )
    return {
        size: Pool(
            HeatPolicy(num_layers, index.num_experts, count, num_sharing=len(index.ram_pools[size])),
            size,
            _slot_memory(count * size, index.layers[index.ram_pools[size][0]], groups),
        )
        for size, count in counts.items()
    }


def _slot_memory(num_bytes: int, layer: RoutedLayer, groups: Sequence[ThreadGroup]) -> np.ndarray:
    """uint8: of slots like this layer's, on the nodes of the threads that will read them."""
    if not groups:
        return aligned_memory(num_bytes)
    memory = aligned_memory(num_bytes, wants_small_pages(layer, groups))
    place_slots(memory, layer, groups)
    return memory


class RamSlots:
    """Slots of at most `budget_bytes` over all routed experts of a model, None: for all of them. `close` ends the
    readers' threads."""

    def __init__(
        self,
        index: ExpertIndex,
        tables: Mapping[int, np.ndarray],
        budget_bytes: int | None,
        num_choices: int,
        num_readers: int = NUM_READERS,
        is_direct: bool = True,
        groups: Sequence[ThreadGroup] = (),
    ) -> None:
        """tables: of each layer with routed experts, int64 (at least experts, 3, 9); addresses are written into them.

        num_choices: experts that a token chooses in a layer. groups: of the team that reads the slots, where it is on
        several memory nodes. Raises KimiLiteError for a budget of less than a few tokens' worth.
        """
        self.index, self.counts = index, Counts()
        self._is_limited = budget_bytes is not None
        self._tables = {layer: table[: index.num_experts, :, DATA // 8] for layer, table in tables.items()}
        self._mapped = {layer: addresses.copy() for layer, addresses in self._tables.items()}
        self._pools = make_pools(index, budget_bytes, num_choices, groups)
        self._pool_of = {layer: self._pools[each.ram_slot_bytes] for layer, each in index.layers.items()}
        self._guesses: dict[int, list[int]] = {}  # by layer: slots that the last guess is being read into
        self._resident: dict[tuple[int, int], list[np.ndarray]] = {}  # gate, up and down of each expert that is there
        self.holds_all = False  # every expert has its slot for good, so that none ever needs to be read
        self._step = 0
        self.reader = ExpertReader(index.shards, num_readers, is_direct)

    def begin(self, num_tokens: int) -> None:
        """A pass over so many tokens begins."""
        self._step += num_tokens
        self.collect()

    def request(self, layer: int, expert_ids: np.ndarray, is_ordered: bool = False) -> "ExpertRequest":
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
        most = pool.policy.num_slots // 2 - len(pool.jobs)
        slots = self._guesses.setdefault(layer, [])
        for expert in absent[: max(0, most)]:
            slot = self._begin_read(pool, layer, expert, is_urgent=False)
            if slot < 0:
                return
            self.counts.guesses += 1
            pool.unproved.add(slot)
            slots.append(slot)

    def fill(
        self, heat: np.ndarray | None, on_load: Callable[[int, int], None] | None = None, is_locked: bool = False
    ) -> None:
        """Before the first token: every expert that fits is read (with `on_load`(bytes done, bytes in all)), or in the
        background those that `heat` says were hot in earlier runs. is_locked: the slots stay in RAM whatever else needs
        memory. Raises KimiLiteError where the disk fails or the system does not allow to lock so much."""
        if is_locked:
            lock_memory([pool.memory for pool in self._pools.values()])
        if heat is not None:
            self.import_heat(heat)
        if on_load:
            self.load_all(on_load)
        elif heat is not None:
            self.warm()

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
        """Bring in every expert that fits, layer by layer: on_progress(bytes done, bytes in all). Raises
        KimiLiteError."""
        wanted = [(layer, expert) for layer in self.index.layers for expert in range(self.index.num_experts)]
        wanted = [key for key in wanted if self._pool_of[key[0]].policy.is_absent(*key)]
        num_bytes = {layer: each.expert_bytes for layer, each in self.index.layers.items()}
        done, total = 0, sum(num_bytes[layer] for layer, _ in wanted)
        for start in range(0, len(wanted), _LOADED_AT_ONCE):
            part = wanted[start : start + _LOADED_AT_ONCE]
            part = [
                (layer, e) for layer, e in part if self._pool_of[layer].policy.num_free and self.require(layer, e) >= 0
            ]
            self._wait_for(part)
            done += sum(num_bytes[layer] for layer, _ in part)
            on_progress(done, total)
        num_resident = sum(pool.policy.num_resident for pool in self._pools.values())
        self.holds_all = num_resident == len(self.index.layers) * self.index.num_experts

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

    def copy_part(self, layer: int, expert: int, part: int, target: np.ndarray) -> bool:
        """Gate, up or down (part 0, 1 or 2) into `target` (uint8) if a slot holds the expert, and holds it still when
        it is copied: False otherwise, and what is in the target is nothing. Any thread may call this.

        An expert that comes again has another list, so the same list before and after says that no read into its slot
        had begun: nothing needs to be locked, and the thread that runs the model is never kept waiting.
        """
        found = self._resident.get((layer, expert))
        if found is None:
            return False
        np.copyto(target, found[part])
        return self._resident.get((layer, expert)) is found

    def release(self, layer: int, expert: int) -> None:
        """VRAM holds this expert from now on: its slot here is free for another."""
        pool = self._pool_of[layer]
        slot = int(pool.policy.find(layer, expert))
        if self._is_limited and slot >= 0 and not pool.policy.is_pinned(slot):
            pool.policy.evict(slot)
            self._forget_owner(pool, slot)

    def restore(self, layer: int, expert: int) -> None:
        """VRAM has given this expert up: it is read again in the background where a slot is free."""
        pool = self._pool_of[layer]
        if self._is_limited and pool.policy.num_free and pool.policy.is_absent(layer, expert):
            self._begin_read(pool, layer, expert, is_urgent=False)

    def cancel(self) -> None:
        """No pass waits any more: what has not been read yet is not read."""
        for pool in self._pools.values():
            for slot in list(pool.jobs):
                self._cancel(pool, slot)
        self._guesses.clear()

    def close(self) -> None:
        """End the readers; the tables name the mapped file again."""
        self.reader.close()
        for layer, addresses in self._tables.items():
            addresses[:] = self._mapped[layer]

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

    def residents(self, layer: int) -> np.ndarray:
        """bool (experts,)"""
        return self._pool_of[layer].policy.residents(layer)

    def counters(self) -> dict[str, float]:
        """Since the slots were made, by name."""
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
                pool.owners[slot] = (layer, expert)
                reads = self.index.layers[layer].reads(expert, pool.slot(slot))
                found = [run.inside(target) for run, target in reads]
                self._tables[layer][expert] = [data.ctypes.data for data in found]
                self._resident[layer, expert] = found

    def give_up(self, layer: int, slot: int) -> None:
        """A request lets go of an expert that failed to come."""
        pool = self._pool_of[layer]
        if pool.broken.pop(slot, None) is not None:
            self._abort(pool, slot)

    def failure(self, layer: int, expert: int, error: OSError) -> KimiLiteError:
        return read_failure(layer, expert, self.index.layers[layer].gate.shard, error)

    def _begin_read(self, pool: Pool, layer: int, expert: int, is_urgent: bool) -> int:
        slot = self._admit(pool, layer, expert, is_urgent)
        if slot >= 0:
            reads = self.index.layers[layer].reads(expert, pool.slot(slot))
            pool.jobs[slot] = self.reader.submit(reads, is_urgent, (pool, slot, layer, expert))
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
        layer, expert = pool.owners.pop(slot, (-1, -1))
        self._resident.pop((layer, expert), None)  # before the slot's next bytes are asked for: see `copy_part`
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


def heat_shape(index: ExpertIndex) -> tuple[int, int, int]:
    """(averages, layers, experts) of a model's heat."""
    return len(HALF_LIVES), index.num_layers, index.num_experts


def open_ram(
    index: ExpertIndex,
    tables: Mapping[int, np.ndarray],
    num_choices: int,
    options: Options,
    budget_bytes: int | None,
    heat: np.ndarray | None,
    on_load: Callable[[int, int], None],
    groups: Sequence[ThreadGroup] = (),
) -> RamSlots | None:
    """The slots that options and plan ask for, filled with what comes first; None where the mapped file is read.

    budget_bytes: what the plan gives experts that do not all fit; None: they do, so that `--load` decides whether they
    are all read now, and whether they are locked. heat: of earlier runs. The rest as `RamSlots` has it.
    """
    loads_all = budget_bytes is None
    if options.maps_beyond_ram or (loads_all and options.loading == "map"):
        return None
    slots = RamSlots(index, tables, budget_bytes, num_choices, options.num_readers, options.is_reading_direct, groups)
    try:
        slots.fill(heat, on_load if loads_all else None, is_locked=options.loading == "lock")
    except BaseException:
        slots.close()
        raise
    return slots


class ExpertRequest:
    """One layer's experts on their way into the kernels: what is there is pinned, what is not is read, group by group.

    A layer may need more experts than there are slots (a prompt needs nearly all of them): the request then works as a
    window that moves over the experts, so that some are read while others are computed. Use it as a context manager: at
    the end nothing is pinned, and after an exception what was not read yet is not
    read."""

    def __init__(self, slots: RamSlots, layer: int, experts: np.ndarray, is_ordered: bool) -> None:
        """experts: int (n,), ascending. is_ordered: `take` keeps to that order; otherwise what is there comes first."""
        self._slots, self._layer, self._is_ordered = slots, layer, is_ordered
        self._policy = slots.pool_of(layer).policy
        is_there = self._policy.find(layer, experts) >= 0
        order = experts if is_ordered else np.concatenate([experts[is_there], experts[~is_there]])
        self.is_all_there, self.has_some_there = bool(is_there.all()), bool(is_there.any())
        self._most = max(2, min(_WINDOW, self._policy.num_slots // 2)) if is_ordered else len(order)
        self._group = min(_GROUP, self._most // 2)
        self._waiting = deque(order.tolist())
        self._window: list[tuple[int, int]] = []  # (expert, slot): pinned, and there or on their way
        self._taken: list[tuple[int, int]] = []
        self._advance()

    def __enter__(self) -> "ExpertRequest":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        held, self._window, self._taken = self._window + self._taken, [], []
        self._policy.unpin([slot for _, slot in held])
        for _, slot in held:
            self._slots.give_up(self._layer, slot)
        self._waiting.clear()
        if kind is not None:
            self._slots.cancel()

    def take(self) -> list[int]:
        """Experts that are in their slots until the next call; none when all have been taken. Raises KimiLiteError."""
        self._policy.unpin([slot for _, slot in self._taken])
        self._taken = []
        self._slots.collect()
        self._check()
        self._advance()
        while not (ready := self._ready()) and (self._window or self._waiting):
            start_s = time.perf_counter()
            self._slots.collect(is_waiting=True)
            self._slots.counts.wait_s += time.perf_counter() - start_s
            self._check()
            self._advance()
        taken = set(ready)
        self._taken = [entry for entry in self._window if entry in taken]
        self._window = [entry for entry in self._window if entry not in taken]
        return [expert for expert, _ in self._taken]

    @property
    def num_left(self) -> int:
        """Experts that `take` has not given yet."""
        return len(self._window) + len(self._waiting)

    def _advance(self) -> None:
        """Pins or begins to read as many of the waiting experts as slots allow."""
        while self._waiting and len(self._window) < self._most:
            expert = self._waiting[0]
            slot = int(self._policy.find(self._layer, expert))
            slot = slot if slot >= 0 else self._slots.require(self._layer, expert)
            if slot < 0:
                return
            self._policy.pin([slot])
            self._window.append((self._waiting.popleft(), slot))

    def _ready(self) -> list[tuple[int, int]]:
        """Entries of the window that are there; in order, and not too few while more are coming, where order counts."""
        if not self._window:
            return []
        experts = [expert for expert, _ in self._window]
        is_there = self._policy.find(self._layer, experts) >= 0
        if not self._is_ordered:
            return [entry for entry, there in zip(self._window, is_there, strict=True) if there]
        count = len(self._window) if is_there.all() else int(np.argmin(is_there))
        return self._window[:count] if count >= min(self._group, len(self._window)) else []

    def _check(self) -> None:
        broken = self._slots.pool_of(self._layer).broken
        for expert, slot in self._window:
            if slot in broken:
                raise self._slots.failure(self._layer, expert, broken[slot])
