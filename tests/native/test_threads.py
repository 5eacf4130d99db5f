"""The thread team: programs of hundreds of operations, stopping, sleeping, two teams at once, more threads than
cores."""

import ctypes
import os
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import types

from kimi_lite.native.calls import pause
from kimi_lite.native.cpu import threads
from kimi_lite.native.cpu.compiler import KERNEL, kernel
from kimi_lite.native.cpu.linear import Product, linear_op
from kimi_lite.native.cpu.matrix import Matrix
from kimi_lite.native.cpu.nodes import ThreadGroup
from kimi_lite.native.cpu.program import Op, Program
from kimi_lite.native.cpu.threads import Team, barrier, divide_gates, next_task, team_size
from kimi_lite.native.simd import load_i64, store_i64
from kimi_lite.native.types.random_blocks import hostile_rows
from tests.native.harness import activations, run_table

NUM_TASKS = 64
THREADS = (1, 2, 4)
pytestmark = pytest.mark.timeout(120, method="thread")  # a signal does not reach a thread that spins in a kernel


@kernel
def _fold(args, thread, team):
    """Task i: values[i] = 3 * values[i] + number. The order of operations shows in the values."""
    values, number = load_i64(args), load_i64(args + 8)
    task = next_task(team)
    while task < NUM_TASKS:
        store_i64(values + 8 * task, 3 * load_i64(values + 8 * task) + number)
        task = next_task(team)


@kernel
def _mirror(args, thread, team):
    """Two phases: doubles every value, then every value becomes its mirror image's, which another thread may have
    made."""
    values, doubled = load_i64(args), load_i64(args + 8)
    task = next_task(team)
    while task < NUM_TASKS:
        store_i64(doubled + 8 * task, 2 * load_i64(values + 8 * task))
        task = next_task(team)
    barrier(team, thread)
    task = next_task(team)
    while task < NUM_TASKS:
        store_i64(values + 8 * task, load_i64(doubled + 8 * (NUM_TASKS - 1 - task)))
        task = next_task(team)


@kernel
def _note_thread(args, thread, team):
    """args[1 + thread] += 1; args[0] = the number of threads."""
    at = args + 8 * (1 + thread)
    store_i64(at, load_i64(at) + 1)
    if thread == 0:
        store_i64(args, team_size(team))


@kernel
def _spin(args, thread, team):
    """Counts itself and takes a while."""
    if thread == 0:
        store_i64(args, load_i64(args) + 1)
    for _ in range(load_i64(args + 8)):
        pause()


@pytest.fixture(params=THREADS)
def team(request):
    team = Team(request.param)
    yield team
    team.close()


def fold_program(num_ops, values):
    return Program([Op.of(_fold, values, number) for number in range(num_ops)])


def folded(num_ops, values):
    values = values.copy()
    for number in range(num_ops):
        values = 3 * values + number  # wraps, as the kernel does
    return values


@pytest.mark.parametrize("num_ops", [0, 1, 2, 700])
def test_operations_run_in_order_and_every_task_once(team, num_ops):
    values = np.arange(NUM_TASKS)
    program = fold_program(num_ops, values)
    for _ in range(3):
        expected = folded(num_ops, values)
        team.run(program)
        assert np.array_equal(values, expected)


def test_phases_inside_an_operation(team):
    values, doubled = np.arange(NUM_TASKS), np.zeros(NUM_TASKS, np.int64)
    program = Program([Op.of(_mirror, values, doubled)] * 61)
    team.run(program)
    with np.errstate(over="ignore"):
        expected = np.arange(NUM_TASKS)[::-1] * 2**61
    assert np.array_equal(values, expected)


def test_every_thread_takes_part_in_every_operation(team):
    notes = np.zeros(1 + team.num_threads, np.int64)
    team.run(Program([Op(_note_thread.address, notes, ())] * 100))
    assert notes.tolist() == [team.num_threads] + [100] * team.num_threads


def test_waking_threads_that_sleep(team):
    values = np.zeros(NUM_TASKS, np.int64)
    program = fold_program(5, values)
    for _ in range(5):
        deadline = time.monotonic() + 100
        while team._num_sleeping < team.num_threads - 1:
            assert time.monotonic() < deadline, "an idle team goes to sleep"
            time.sleep(0.001)
        expected = folded(5, values)
        team.run(program)
        assert np.array_equal(values, expected)


def test_an_idle_team_costs_nothing():
    team = Team(2)
    team.run(fold_program(1, np.zeros(NUM_TASKS, np.int64)))
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05
    team.close()


def test_threads_that_wait_for_a_core_do_not_spin():
    """Many more threads than cores: CPU time, which other programs do not change, stays that of the work. Threads that
    spin at every barrier for 100 us take 0.2 to 0.6 s here, these 0.006."""
    team, values = Team(16), np.zeros(NUM_TASKS, np.int64)
    program = fold_program(300, values)
    team.run(program)
    before = time.process_time()
    team.run(program)
    used_s = time.process_time() - before
    team.close()
    assert used_s < 0.08, used_s


def test_two_teams_alive():
    """Each in a thread of its own, at the same time, and one after the other."""
    teams = [Team(2), Team(3)]
    values = [np.arange(NUM_TASKS), np.arange(NUM_TASKS) + 7]
    programs = [fold_program(300, v) for v in values]
    expected = [folded(300, v) for v in values]
    runners = [
        threading.Thread(target=team.run, args=(program,)) for team, program in zip(teams, programs, strict=True)
    ]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(120)
        assert not runner.is_alive()
    assert np.array_equal(values, expected)
    for team, program in zip(teams, programs, strict=True):
        team.run(program)
        team.close()


def test_close_twice_and_the_threads_are_gone():
    before = threading.active_count()
    team = Team(3)
    assert threading.active_count() == before + 2
    team.run(fold_program(3, np.zeros(NUM_TASKS, np.int64)))
    team.close()
    team.close()
    assert threading.active_count() == before
    with pytest.raises(AssertionError):
        team.run(fold_program(3, np.zeros(NUM_TASKS, np.int64)))


class _Stop(Exception):
    pass


@pytest.mark.parametrize("num_threads", [2, 3])
def test_an_exception_of_a_signal_leaves_no_thread_behind(num_threads):
    """It may come between publishing a program and taking part in it; then the others waited for ever."""

    def stop(number, frame):
        raise _Stop

    before, rng = signal.signal(signal.SIGUSR1, stop), np.random.default_rng(0)
    try:
        for _ in range(60):
            team, values = Team(num_threads), np.ones(NUM_TASKS, np.int64)
            program = fold_program(5, values)
            timer = threading.Timer(rng.uniform(0, 0.01), signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
            try:
                timer.start()
                while True:
                    team.run(program)
            except _Stop:
                pass
            team.run(program)  # goes on as if nothing had been
            team.close()
            assert not any(worker.is_alive() for worker in team._workers)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_program_that_was_published_and_left_is_run_first():
    values = np.ones(NUM_TASKS, np.int64)
    team = Team(2)
    first, second = (Program([Op.of(_fold, values, number)]) for number in (1, 2))
    threads._publish(team._address, first.address, len(first.ops))  # and an exception came
    team.run(second)
    assert (values == 3 * (3 * 1 + 1) + 2).all()
    threads._publish(team._address, first.address, len(first.ops))
    team.close()
    assert not any(worker.is_alive() for worker in team._workers)


def _run_without_end(team, program):
    while True:
        team.run(program)


def _what_ends(team, program):
    """Runs the program until a thread ends; every further run says so too, and closing ends all."""
    try:
        with pytest.raises(RuntimeError, match="has ended") as told:
            _run_without_end(team, program)
        with pytest.raises(RuntimeError, match="has ended"):
            team.run(program)
    finally:
        team.close()
    assert not any(worker.is_alive() for worker in team._workers)
    return told.value.__cause__


@pytest.mark.parametrize("error", [OSError("x"), MemoryError(), SystemExit(1), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["at birth", "before a program", "after a program", "going to sleep"])
@pytest.mark.parametrize(("num_threads", "which"), [(2, 1), (3, 2)])
def test_a_worker_that_ends_is_told_to_the_caller(monkeypatch, num_threads, which, where, error):
    """Whatever it raises, wherever it is: it was waited for without end."""
    name, work, count = f"kimi-lite-{which}", threads._work, [0]

    def fail():
        raise error

    def ill_work(address, thread, seen):
        before = count[0]
        count[0] += thread == which
        if thread == which and before == 2 and where == "before a program":
            fail()
        seen = work(address, thread, seen)
        if thread == which and seen and where == "after a program":
            fail()
        return seen

    class Condition(threading.Condition):
        def wait_for(self, predicate, timeout=None):
            return fail() if threading.current_thread().name == name else super().wait_for(predicate, timeout)

    monkeypatch.setattr(threads, "_work", ill_work)
    ill_work.prepare = work.prepare
    if where == "at birth":
        monkeypatch.setattr(threads, "keep_to_cores", lambda _: threading.current_thread().name == name and fail())
    if where == "going to sleep":
        monkeypatch.setattr(threads.threading, "Condition", Condition)
    values = np.zeros(NUM_TASKS, np.int64)
    assert _what_ends(Team(num_threads), fold_program(3, values)) is error
    assert len(set(values.tolist())) == 1  # whole programs only


@pytest.mark.parametrize("num_threads", [2, 3])
def test_a_worker_that_ends_while_the_others_sleep_for_it(monkeypatch, num_threads):
    """They have joined the program, and wait in the kernel."""
    work = threads._work

    def ill_work(address, thread, seen):
        if thread != 1:
            return work(address, thread, seen)
        cells = np.ctypeslib.as_array((ctypes.c_int64 * (threads._NUM_LINES * 8)).from_address(address))
        deadline = time.monotonic() + 60
        while cells[threads._SLEEPING // 8] < num_threads - 1:
            assert time.monotonic() < deadline, "the others sleep"
            time.sleep(0.001)
        raise MemoryError

    ill_work.prepare = work.prepare
    monkeypatch.setattr(threads, "_work", ill_work)
    values = np.ones(NUM_TASKS, np.int64)
    if threads._futex_call() == (0, 0):
        pytest.skip("waiting threads yield here")
    assert type(_what_ends(Team(num_threads), fold_program(3, values))) is MemoryError
    assert (values == 1).all()


def test_an_exception_from_outside_ends_a_worker():
    """As `PyThreadState_SetAsyncExc` raises it, at any moment."""
    team, values = Team(3), np.zeros(NUM_TASKS, np.int64)
    program = fold_program(3, values)
    team.run(program)
    ident = ctypes.c_ulong(team._workers[1].ident)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_Stop)) == 1
    assert type(_what_ends(team, program)) is _Stop


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_thread_that_cannot_be_started(monkeypatch, which):
    """Those that were started before end."""
    before, start = threading.active_count(), threading.Thread.start

    def refuse(thread):
        if thread.name == f"kimi-lite-{which}":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        Team(4)
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_is_told_that_it_has_no_threads():
    team, values = Team(2), np.zeros(NUM_TASKS, np.int64)
    program = fold_program(1, values)
    team.run(program)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            team.run(program)
        except RuntimeError:
            team.close()
            code = 7
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    team.run(program)
    team.close()


def test_close_right_after_birth():
    for _ in range(20):
        Team(3).close()


def test_a_team_needs_a_thread():
    with pytest.raises(AssertionError, match="0"):
        Team(0)


def test_real_work_on_more_threads_than_cores():
    """200 layers' worth of products, each adding to the same output: bit for bit as on one thread."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 256)).astype(np.float32)
    data = hostile_rows("Q8_0", 150, 256, rng)
    matrix, results = Matrix.of(data, "Q8_0", 256), []
    for num_threads in (1, 4):
        run, prepared, out = run_table(2, num_threads), activations(x, 32), np.zeros((2, 150), np.float32)
        team = Team(num_threads)
        team.run(Program([linear_op(run, prepared, Product(matrix, out, True))] * 200))
        team.close()
        results.append(out)
    assert np.array_equal(*results)
    assert np.abs(results[0]).max() > 100


def test_kernels_are_c_functions_of_three_integers():
    assert types.void(types.int64, types.int64, types.int64) == KERNEL


@pytest.mark.parametrize(("num_cpus", "limits"), [(2, (256, 8192)), (1, (16, 2048))])
def test_patience_stays_long_where_each_thread_has_a_core(monkeypatch, num_cpus, limits):
    """However often waiting failed: else one long tail after the other ends in a sleep at every barrier."""
    monkeypatch.setattr(threads, "num_allowed_cpus", lambda: num_cpus)
    team, values = Team(2), np.zeros(NUM_TASKS, np.int64)
    seen = [int(team._memory[team._cell(threads._PATIENCE)])]
    for start in (1, limits[0]):  # below the least, and at it
        team._set(threads._PATIENCE, start)
        team.run(fold_program(300, values))
        seen.append(int(team._memory[team._cell(threads._PATIENCE)]))
    team.close()
    assert seen[0] == limits[1] and limits[0] <= seen[2] <= limits[1], seen


ON_NODES = (
    ThreadGroup(node=0, memory=0, cpus=frozenset({0, 1}), first=0, stop=2),
    ThreadGroup(node=1, memory=1, cpus=frozenset({2, 3}), first=2, stop=3),
)


def test_threads_are_kept_to_their_nodes_and_the_caller_while_a_program_runs(monkeypatch):
    """A program that fails lets the caller go, too."""
    kept = []
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(threads, "keep_to", lambda cpus: kept.append((threading.current_thread().name, set(cpus))))
    caller, everywhere = threading.current_thread().name, {0, 1, 2, 3}
    team, values = Team(3, ON_NODES), np.ones(NUM_TASKS, np.int64)
    team.run(fold_program(2, values))
    assert sorted(kept)[-2:] == [("kimi-lite-1", {0, 1}), ("kimi-lite-2", {2, 3})]
    assert [cpus for name, cpus in kept if name == caller] == [{0, 1}, everywhere]
    kept.clear()
    monkeypatch.setattr(threads, "_take_part", lambda address: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        team.run(fold_program(2, values))
    assert kept == [(caller, {0, 1}), (caller, everywhere)]
    monkeypatch.undo()
    team.close()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one CPU")
def test_the_system_keeps_them(monkeypatch):
    before = os.sched_getaffinity(0)
    first, second = sorted(before)[:2]
    groups = (ThreadGroup(0, 0, frozenset({first}), 0, 1), ThreadGroup(1, 1, frozenset({second}), 1, 2))
    team = Team(2, groups)
    team.run(fold_program(2, np.ones(NUM_TASKS, np.int64)))
    assert os.sched_getaffinity(team._workers[0].native_id) == {second}
    assert os.sched_getaffinity(0) == before
    team.close()


@given(st.lists(st.integers(1, 70), min_size=1, max_size=8))
def test_gates_are_of_one_node_and_even(node_sizes):
    sizes, first = divide_gates(node_sizes), 0
    for node_size in node_sizes:
        count = -(-node_size // threads._GATE_THREADS)
        own = sizes[first : first + count]
        assert sum(own) == node_size and max(own) <= threads._GATE_THREADS and max(own) - min(own) <= 1
        first += count
    assert first == len(sizes)


@pytest.mark.parametrize("node_sizes", [(9,), (8, 9), (1, 1, 1), (2, 7, 3)])
def test_threads_at_several_gates_wait_for_all(node_sizes):
    """Results of a phase that another thread reads in the next show whether any went on too early."""
    ends = np.cumsum(node_sizes).tolist()
    cpus = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
    groups = [
        ThreadGroup(n, n, cpus, end - size, end) for n, (size, end) in enumerate(zip(node_sizes, ends, strict=True))
    ]
    team = Team(ends[-1], groups if len(groups) > 1 else ())
    values, doubled = np.arange(NUM_TASKS), np.zeros(NUM_TASKS, np.int64)
    team.run(Program([Op.of(_mirror, values, doubled)] * 61))
    notes = np.zeros(1 + team.num_threads, np.int64)
    team.run(Program([Op(_note_thread.address, notes, ())] * 20))
    team.close()
    with np.errstate(over="ignore"):
        assert np.array_equal(values, np.arange(NUM_TASKS)[::-1] * 2**61)
    assert notes.tolist() == [team.num_threads] + [20] * team.num_threads
