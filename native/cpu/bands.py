"""Bands of tasks: each thread of a team works through a run of neighbouring tasks of its own, in order, and then takes
from the ends of others' bands.

Tasks that are rows of one matrix are then, for each thread, one stream of memory from beginning to end, which the
hardware prefetches best (tools/LOG.md); yet no thread waits for one that is late: the others take its tasks. A
thread takes several tasks at once as long as much is left of a band, one at a time at its end, so that all threads end
together.

`take_tasks` needs no lock and no preparation of a phase: per band there is one number, how many tasks its thread has
taken from its beginning (low half) and how many others have from its end (high half). Adding to it is taking, and what
was there before says what was still to be had; past the end it may grow, as nothing is left then. There are two such
numbers for phases in turn: while threads are in one phase each has cleared, on its way into it, its number for that
phase, which has been out of use since the phase before the last.

Who takes from whom is a table, which `steal_order` makes: threads of the same NUMA node first, whose memory is near,
then those of nearer nodes before those of farther ones.
"""

import operator
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise

import numpy as np
from numba import njit

from kimi_lite.native.calls import atomic_add, atomic_load, atomic_store
from kimi_lite.native.cpu.activations import aligned_zeros
from kimi_lite.native.simd import load_i64, store_i64

# int64 cells: a line for all, then one for each thread. _EMPTY: the last phase in which a thread found no task left.
_SIZE, _ORDER, _BORDERS, _EMPTY = 0, 8, 16, 64
_LINE, _FIRST_BAND = 64, 128
_PHASE, _TAKEN = 0, 8  # in a thread's line: barriers passed; two counts of tasks taken
_HALF = 1 << 32
_SHARE = 4  # of what is left of a band, a thread takes the fourth part


@njit
def enter_phase(bands, thread):
    """This thread comes to the barrier before the next phase: nothing of its band is taken there."""
    band = bands + _FIRST_BAND + _LINE * thread
    phase = load_i64(band + _PHASE) + 1
    store_i64(band + _PHASE, phase)
    store_i64(band + _TAKEN + 8 * (phase & 1), 0)


@njit
def _band_begin(num_tasks, thread, num_threads):
    return num_tasks * thread // num_threads


@njit
def _num_left(taken, begin, end):
    """Tasks of a band of which so many are taken; negative at times where there are none."""
    return end - begin - (taken & (_HALF - 1)) - (taken >> 32)


@njit
def _find_fullest(bands, order, count, num_tasks, at):
    """Of `count` threads the one that has most tasks left, -1 where none has any."""
    num_threads, fullest, most = load_i64(bands + _SIZE), -1, 0
    for i in range(count):
        other = load_i64(order + 8 * i)
        begin, end = _band_begin(num_tasks, other, num_threads), _band_begin(num_tasks, other + 1, num_threads)
        left = _num_left(atomic_load(bands + _FIRST_BAND + _LINE * other + at), begin, end)
        if left > most:
            fullest, most = other, left
    return fullest


@njit
def _steal(bands, thread, num_tasks, at, most):
    """Tasks from the end of another's band: (first, count), or (0, 0) where no thread has any left."""
    num_threads = load_i64(bands + _SIZE)
    order = load_i64(bands + _ORDER) + 16 * num_threads * thread
    while True:
        count = load_i64(order)  # of threads that are equally far
        if count == 0:
            return 0, 0
        other = _find_fullest(bands, order + 8, count, num_tasks, at)
        if other < 0:
            order += 8 * (1 + count)
            continue
        begin, end = _band_begin(num_tasks, other, num_threads), _band_begin(num_tasks, other + 1, num_threads)
        counts = bands + _FIRST_BAND + _LINE * other + at
        wanted = max(1, min(most, _num_left(atomic_load(counts), begin, end) // _SHARE))
        taken = atomic_add(counts, _HALF * wanted)
        count = min(wanted, _num_left(taken, begin, end))
        if count > 0:
            return end - (taken >> 32) - count, count


@njit
def take_tasks(bands, thread, num_tasks, most):
    """(first, count): up to `most` neighbouring tasks of this phase's `num_tasks` that are this thread's from now on;
    count is 0 where all are taken. Every thread gives the same `num_tasks` throughout a phase."""
    num_threads, band = load_i64(bands + _SIZE), bands + _FIRST_BAND + _LINE * thread
    phase = load_i64(band + _PHASE)
    at = _TAKEN + 8 * (phase & 1)
    begin, end = _band_begin(num_tasks, thread, num_threads), _band_begin(num_tasks, thread + 1, num_threads)
    left = _num_left(atomic_load(band + at), begin, end)
    if left > 0:
        wanted = max(1, min(most, left // _SHARE))
        taken = atomic_add(band + at, wanted)
        count = min(wanted, _num_left(taken, begin, end))
        if count > 0:
            return begin + (taken & (_HALF - 1)), count
    if atomic_load(bands + _EMPTY) == phase:
        return 0, 0
    first, count = _steal(bands, thread, num_tasks, at, most)
    if count == 0:
        atomic_store(bands + _EMPTY, phase)
    return first, count


@njit
def is_divided(bands):
    """Whether threads are on several memory nodes."""
    return load_i64(load_i64(bands + _BORDERS)) < load_i64(bands + _SIZE)


@njit
def find_part(bands, num_matrices, num_steps, task, count):
    """Where tasks are the steps of several matrices' rows, `num_steps` of each: (matrix, its step, how many of the
    `count` tasks from `task` on follow there). Tasks count through the steps of one memory node's threads in all
    matrices before those of the next node's, so that a thread's rows lie on its node whatever the matrices are."""
    borders, num_threads = load_i64(bands + _BORDERS), load_i64(bands + _SIZE)
    start, end = 0, num_steps * load_i64(borders) // num_threads
    while task >= num_matrices * end:
        borders += 8
        start, end = end, num_steps * load_i64(borders) // num_threads
    at, size = task - num_matrices * start, end - start
    return at // size, start + at % size, min(count, size - at % size)


def node_borders(nodes: Sequence[int]) -> np.ndarray:
    """int64: of each run of threads on the same node the thread behind its last one; the last is their number."""
    ends = [thread + 1 for thread, (node, other) in enumerate(pairwise(nodes)) if node != other]
    return np.array([*ends, len(nodes)], np.int64)


def steal_order(nodes: Sequence[int], distance: Callable[[int, int], int] = operator.ne) -> np.ndarray:
    """int64 (T, 2 T): for each thread how many others are nearest, by the `distance` of their `nodes` from its own, and
    which; then how many are next; and so on to a zero. Each part begins behind the thread itself, so that not all look
    at the same one first."""
    order = np.zeros((len(nodes), 2 * len(nodes)), np.int64)
    for thread, node in enumerate(nodes):
        others = [(thread + i) % len(nodes) for i in range(1, len(nodes))]
        others.sort(key=lambda other, node=node: distance(node, nodes[other]))
        row: list[int] = []
        for _, equal in groupby(others, lambda other, node=node: distance(node, nodes[other])):
            near = list(equal)
            row += [len(near), *near]
        order[thread, : len(row)] = row
    return order


class Bands:
    """The shared memory of a team's bands."""

    def __init__(self, nodes: Sequence[int], distance: Callable[[int, int], int] = operator.ne) -> None:
        """nodes: of each thread, the NUMA node on which it runs; distance: from one node to another."""
        self.order, self.borders = steal_order(nodes, distance), node_borders(nodes)
        self._memory = aligned_zeros(((_FIRST_BAND + _LINE * len(nodes)) // 8,), np.int64)
        self._memory[_SIZE // 8], self._memory[_ORDER // 8] = len(nodes), self.order.ctypes.data
        self._memory[_BORDERS // 8], self._memory[_EMPTY // 8] = self.borders.ctypes.data, -1

    @property
    def address(self) -> int:
        return self._memory.ctypes.data
