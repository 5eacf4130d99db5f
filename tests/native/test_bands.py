"""Bands of tasks: every task is taken once, whatever the threads do; who takes from whom."""

import os
import threading
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.native.calls import atomic_add, pause
from kimi_lite.native.cpu.bands import Bands, enter_phase, find_part, steal_order, take_tasks
from kimi_lite.native.cpu.compiler import function, kernel
from kimi_lite.native.cpu.nodes import ThreadGroup
from kimi_lite.native.cpu.program import Op, Program
from kimi_lite.native.cpu.threads import Team, barrier, next_tasks
from kimi_lite.native.simd import load_i64

pytestmark = pytest.mark.timeout(120, method="thread")  # a signal does not reach a thread that spins in a kernel
MOST_TASKS = 200


@function("int64(int64, int64, int64, int64)")
def take(bands, thread, num_tasks, most):
    """Both numbers of `take_tasks` in one: first * 2^20 + count."""
    first, count = take_tasks(bands, thread, num_tasks, most)
    return first * (1 << 20) + count


@function("void(int64, int64)")
def enter(bands, thread):
    enter_phase(bands, thread)


class Phase:
    """One phase of bands, whose threads the test moves one at a time."""

    def __init__(self, bands, num_threads, num_tasks):
        self.bands, self.num_threads, self.num_tasks = bands, num_threads, num_tasks
        self.taken = [[] for _ in range(num_threads)]  # ranges, by thread
        for thread in range(num_threads):
            enter(bands.address, thread)

    def move(self, thread, most=8):
        """Whether this thread got something."""
        first, count = divmod(take(self.bands.address, thread, self.num_tasks, most), 1 << 20)
        assert 0 <= count <= most
        if count:
            self.taken[thread].append(range(first, first + count))
        return count > 0

    def finish(self, thread):
        while self.move(thread):
            pass

    def all_taken(self):
        return sorted(task for ranges in self.taken for each in ranges for task in each)


@given(
    num_threads=st.integers(1, 9),
    phases=st.lists(st.tuples(st.integers(0, MOST_TASKS), st.integers(1, 16)), min_size=1, max_size=5),
    data=st.data(),
)
def test_every_task_is_taken_once_in_every_phase(num_threads, phases, data):
    """In any order of the threads' steps, also where some threads do nothing in a phase but come to its end."""
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=num_threads, max_size=num_threads))
    bands = Bands(nodes)
    for num_tasks, most in phases:
        phase = Phase(bands, num_threads, num_tasks)
        for thread in data.draw(st.lists(st.integers(0, num_threads - 1), max_size=40)):
            phase.move(thread, most)
        phase.finish(data.draw(st.integers(0, num_threads - 1)))
        assert phase.all_taken() == list(range(num_tasks))
        assert not any(phase.move(thread, most) for thread in range(num_threads))


@given(num_threads=st.integers(1, 8), num_tasks=st.integers(0, MOST_TASKS))
def test_a_thread_has_its_own_tasks_in_order(num_threads, num_tasks):
    """Where all go at the same pace none takes another's, but for the last few."""
    phase = Phase(Bands([0] * num_threads), num_threads, num_tasks)
    while sum(phase.move(thread) for thread in range(num_threads)):
        pass
    for thread, ranges in enumerate(phase.taken):
        begin, end = num_tasks * thread // num_threads, num_tasks * (thread + 1) // num_threads
        own = [task for each in ranges for task in each if begin <= task < end]
        assert own == sorted(own) and len(own) >= end - begin - num_threads


def test_pieces_are_small_at_the_end():
    phase = Phase(Bands([0, 0]), 2, 128)
    phase.finish(0)
    sizes = [len(each) for each in phase.taken[0]]
    own = sizes.index(1) + 1
    assert sizes[:own] == sorted(sizes[:own], reverse=True) and sizes[0] == 8
    firsts = [each.start for each in phase.taken[0]]
    stolen = [first for first in firsts if first >= 64]
    assert stolen == sorted(stolen, reverse=True) and sizes[-1] == 1, "from the end"


@given(nodes=st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_near_threads_come_first(nodes):
    """Of nodes in a row, whose distance is that of their numbers."""
    for thread, row in enumerate(steal_order(nodes, lambda node, other: abs(node - other)).tolist()):
        others, distances, at = [], [], 0
        while row[at]:
            equal = row[at + 1 : at + 1 + row[at]]
            assert len({abs(nodes[other] - nodes[thread]) for other in equal}) == 1
            assert equal == sorted(equal, key=lambda other: (other - thread) % len(nodes))
            others += equal
            distances.append(abs(nodes[equal[0]] - nodes[thread]))
            at += 1 + row[at]
        assert sorted([thread, *others]) == list(range(len(nodes))) and not any(row[at:])
        assert distances == sorted(set(distances))


def test_far_tasks_are_taken_only_where_no_near_one_is_left():
    phase = Phase(Bands([0, 0, 1, 1]), 4, 120)
    for _ in range(200):
        phase.move(2)
    far = [any(task < 60 for task in each) for each in phase.taken[2]]
    assert far == sorted(far) and any(far) and phase.all_taken() == list(range(120))
    near = [task for each, is_far in zip(phase.taken[2], far, strict=True) if not is_far for task in each]
    assert sorted(near) == list(range(60, 120))


def test_the_fullest_band_is_taken_from():
    phase = Phase(Bands([0, 0, 0]), 3, 90)
    for _ in range(3):
        phase.move(1)
    phase.taken[0].clear()
    phase.finish(0)
    stolen = next(each for each in phase.taken[0] if each.start >= 30)
    assert stolen.start >= 60, stolen


def test_a_divided_team_takes_from_near_threads_first():
    cpus = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
    team = Team(3, (ThreadGroup(0, 0, cpus, 0, 1), ThreadGroup(1, 1, cpus, 1, 3)))
    try:
        assert (
            team._bands.order.tolist()
            == steal_order([0, 1, 1]).tolist()
            == [[2, 1, 2, 0, 0, 0], [1, 2, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
        )
    finally:
        team.close()


@function("void(int64, int64, int64, int64, int64)")
def _take_all(bands, thread, num_tasks, most, counts):
    first, count = take_tasks(bands, thread, num_tasks, most)
    while count > 0:
        for task in range(first, first + count):
            atomic_add(counts + 8 * task, 1)
        first, count = take_tasks(bands, thread, num_tasks, most)


@kernel
def _count_kernel(args, thread, team):
    """Two phases of tasks, with a delay of its own for each thread: counts[phase, task] += 1."""
    counts, delays, most = load_i64(args), load_i64(args + 8), load_i64(args + 32)
    for phase in range(2):
        num_tasks = load_i64(args + 16 + 8 * phase)
        first, count = next_tasks(team, thread, num_tasks, most)
        while count > 0:
            for task in range(first, first + count):
                atomic_add(counts + 8 * (MOST_TASKS * phase + task), 1)
                for _ in range(load_i64(delays + 8 * thread)):
                    pause()
            first, count = next_tasks(team, thread, num_tasks, most)
        barrier(team, thread)


@pytest.mark.parametrize("num_threads", [1, 2, 5, 16])
def test_threads_that_run_at_once_take_every_task_once(num_threads):
    """With more threads than CPUs, too, and threads that are held up."""
    rng, team = np.random.default_rng(num_threads), Team(num_threads)
    try:
        for _ in range(40):
            counts, delays = np.zeros((2, MOST_TASKS), np.int64), rng.integers(0, 200, num_threads)
            numbers = rng.integers(0, MOST_TASKS + 1, 2)
            op = Op.of(_count_kernel, counts, delays, *numbers.tolist(), int(rng.integers(1, 9)))
            team.run(Program([op] * 3))
            expected = (np.arange(MOST_TASKS) < numbers[:, None]) * 3
            assert np.array_equal(counts, expected)
    finally:
        team.close()


def test_tasks_of_a_thread_that_never_comes_are_done_by_the_others():
    """Two run at once through a band of a third one."""
    bands, num_tasks = Bands([0, 0, 0]), 100_000
    counts = np.zeros(num_tasks, np.int64)
    for thread in range(3):
        enter(bands.address, thread)
    _take_all.prepare()
    runners = [
        threading.Thread(target=_take_all, args=(bands.address, thread, num_tasks, 3, counts.ctypes.data))
        for thread in (0, 2)
    ]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(60)
    assert Counter(counts.tolist()) == {1: num_tasks}


@function("int64(int64, int64, int64, int64, int64)")
def part(bands, num_matrices, num_steps, task, count):
    """The three numbers of `find_part` in one."""
    matrix, step, count = find_part(bands, num_matrices, num_steps, task, count)
    return ((matrix << 20) + step << 20) + count


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    num_matrices=st.integers(1, 9),
    num_steps=st.integers(1, 50),
    most=st.integers(1, 20),
)
def test_a_nodes_steps_of_all_matrices_come_before_the_next_nodes(sizes, num_matrices, num_steps, most):
    """So a thread's band has its own node's steps, but for one of each matrix where bands and nodes round apart."""
    nodes = [node for node, size in enumerate(sizes) for _ in range(size)]
    bands, num_tasks, num_threads = Bands(nodes), num_matrices * num_steps, len(nodes)
    ends = [0, *(num_steps * end // num_threads for end in np.cumsum(sizes).tolist())]
    wanted = [
        (matrix, step, node)
        for node, (start, end) in enumerate(pairwise(ends))
        for matrix in range(num_matrices)
        for step in range(start, end)
    ]
    for task in range(num_tasks):
        found = part(bands.address, num_matrices, num_steps, task, min(most, num_tasks - task))
        matrix, step, count = found >> 40, found >> 20 & 0xFFFFF, found & 0xFFFFF
        assert 0 < count <= most
        assert [each[:2] for each in wanted[task : task + count]] == [(matrix, step + i) for i in range(count)]
    for thread, node in enumerate(nodes):
        band = wanted[num_tasks * thread // num_threads : num_tasks * (thread + 1) // num_threads]
        assert sum(each[2] != node for each in band) < num_matrices
    assert {each[2] for each in wanted} <= set(nodes)
