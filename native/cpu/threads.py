"""A team of threads that runs programs of kernels, the way a GPU runs a graph.

Every thread of the team walks through a `program.Program` and calls each kernel as `kernel(args, thread, team)`; a
kernel shares its work out with `next_task`, or, where it reads long runs of memory, with `next_tasks` (`bands`), and
separates its phases with `barrier`. One call from Python thus runs a
whole transformer: no per-operation dispatch, a barrier costs well under a microsecond. Threads wait for a short while
after a program, then sleep in Python until the next one, so an idle team costs nothing.

Who waits at a barrier spins first, which costs least where every thread has a core of its own. Where that fails, cores
are shared, with other threads of the team or with other programs: then waiting threads sleep in the kernel (futex,
Linux), so that those they wait for can run; elsewhere they yield, which with a busy neighbour costs a whole turn of the
scheduler. How long spinning is worth it is learned: each failure halves it, each success makes it grow again. Where
there is a core for each thread it never falls below the wait for a norm, and grows past the longest tail of a product:
once it is short, every tail is a failure, and each barrier costs a sleep of 60 to 90 us (tools/LOG.md).

Where memory is on several nodes each thread is kept to the cores of one (`groups`): workers for good, the caller while
a program runs, as what it does in between, and the threads that it starts, are not the team's.

Threads arrive at gates of a few threads each, and a gate's last one for all of it: at one counter a hundred threads
would queue for its line, and on several sockets each for a line of another's.

Kernels raise nothing. A worker can end of an exception only between programs, in Python: before a program's first
operation all threads join, and who joins sees that one has ended. `run` then raises what ended it, once and for all:
the team is broken. A process made by fork has the team but none of its threads, and is told so.

Kernels are C functions (`compiler.kernel`): their addresses are plain numbers, so operations and tensor types combine
at run time and each is compiled (and cached on disk) once.
"""

import atexit
import ctypes
import os
import platform
import sys
import threading
from collections.abc import Sequence

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kimi_lite.native.calls import atomic_add, atomic_load, call3, pause
from kimi_lite.native.cpu.activations import aligned_zeros
from kimi_lite.native.cpu.bands import Bands, enter_phase, find_part, is_divided, take_tasks
from kimi_lite.native.cpu.compiler import function
from kimi_lite.native.cpu.nodes import ThreadGroup
from kimi_lite.native.cpu.placement import keep_to, keep_to_cores, num_allowed_cpus
from kimi_lite.native.cpu.program import Program
from kimi_lite.native.simd import load_i64, store_i64

# The team's shared memory: int64 cells, each on a cache line of its own. _PATIENCE: spins before a waiting thread gives
# its core away. _TAKEN: the epoch whose program the caller has run to its end. _BROKEN: a worker has ended.
_LINE = 64
_EPOCH, _PROGRAM, _NUM_OPS, _ARRIVED, _GENERATION, _TASK, _QUIT, _SIZE, _YIELD, _FUTEX, _SLEEPING, _PATIENCE = (
    _LINE * i for i in range(12)
)
_TAKEN, _BROKEN, _BANDS, _GATES = 12 * _LINE, 13 * _LINE, 14 * _LINE, 15 * _LINE
_NUM_LINES = 16
_NUM_GATES = _ARRIVED + 8  # whose threads must all be there; with `_ARRIVED`, of which so many are
_GATE_SIZE = 8  # bytes behind the beginning of a gate: its threads
_GATE_THREADS = 8  # at most: each waits for the line of the one before, and lines of several gates move at once

_LEAST, _MOST, _SLOWNESS = (_PATIENCE + 8 * i for i in (1, 2, 3))  # patience stays between; a success adds 1 / slowness
_OWN_CORES, _CROWDED = (256, 8192, 2), (16, 2048, 8)  # of these; spins of 25 to 50 ns
_IDLE_PATIENCE = 2  # times as long after a program: the next one often comes at once
_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98}  # Linux: the system call's number
_FUTEX_WAIT, _FUTEX_WAKE = 128, 129  # private to the process


@intrinsic
def _call_yield(typingctx, function):
    """Gives the core away: `sched_yield()` or `SwitchToThread()` through its address."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _call_futex(typingctx, function, number, address, operation, value):
    """syscall(number, address, operation, value, NULL, NULL, 0) through libc's address."""

    def codegen(context, builder, sig, args):
        i64 = ir.IntType(64)
        kind = ir.FunctionType(i64, [i64], var_arg=True)
        zero = ir.Constant(i64, 0)
        call = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(call, [*args[1:], zero, zero, zero])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@njit
def team_size(team):
    """Number of threads."""
    return load_i64(team + _SIZE)


@njit
def next_task(team):
    """The next task number of this phase, from 0: tasks go to whichever thread is free. `barrier` starts over."""
    return atomic_add(team + _TASK, 1)


@njit
def next_tasks(team, thread, num_tasks, most):
    """(first, count) of this thread's next tasks of a phase of `num_tasks`, at most `most` neighbours, from the band
    that is its own as long as that lasts; count 0: all are taken. Every thread gives the same `num_tasks`."""
    return take_tasks(load_i64(team + _BANDS), thread, num_tasks, most)


@njit
def next_panel(team, thread, num_tasks):
    """As `next_task`, of a phase of so many tasks; where memory is on several nodes the next of the thread's own band,
    whose rows are on its node, and then of others'. `num_tasks` or more: all are taken."""
    if not is_divided(load_i64(team + _BANDS)):
        return next_task(team)
    first, count = next_tasks(team, thread, num_tasks, 1)
    return first if count > 0 else num_tasks


@njit
def panels_ahead(team):
    """How many tasks further a thread goes on, probably, after one of `next_panel`."""
    return 1 if is_divided(load_i64(team + _BANDS)) else team_size(team)


@njit
def part_of_tasks(team, num_matrices, num_steps, task, count):
    """(matrix, step, count): where the next of these tasks are, as `bands.find_part` counts them."""
    return find_part(load_i64(team + _BANDS), num_matrices, num_steps, task, count)


@njit
def give_way(team):
    """Lets another thread have the core for a turn of the scheduler; returns at once where none wants it."""
    _call_yield(load_i64(team + _YIELD))


@njit
def barrier(team, thread):
    """Waits until every thread is here; what each wrote before is then visible to all."""
    _arrive(team, thread, atomic_load(team + _GENERATION))


@njit
def _join(team, thread):
    """A barrier that a worker's end opens, too: whether every thread is here."""
    generation = atomic_load(team + _GENERATION)
    if atomic_load(team + _BROKEN) == 0:  # a worker that ends later changes the generation
        _arrive(team, thread, generation)
    return atomic_load(team + _BROKEN) == 0


@njit
def _arrive(team, thread, generation):
    """The last thread at its gate arrives for all of them; the last of those begins a new generation, for which the
    others wait."""
    enter_phase(load_i64(team + _BANDS), thread)
    gate = load_i64(load_i64(team + _GATES) + 8 * thread)
    if atomic_add(gate, 1) == load_i64(gate + _GATE_SIZE) - 1:
        store_i64(gate, 0)
        num_gates = load_i64(team + _NUM_GATES)
        if num_gates == 1 or atomic_add(team + _ARRIVED, 1) == num_gates - 1:
            store_i64(team + _ARRIVED, 0)
            store_i64(team + _TASK, 0)
            atomic_add(team + _GENERATION, 1)
            _wake_sleepers(team)
            return
    _wait(team, generation)


@njit
def _wake_sleepers(team):
    """Those that `_sleep`."""
    if atomic_add(team + _SLEEPING, 0) != 0:
        futex = team + _FUTEX
        _call_futex(load_i64(futex), load_i64(futex + 8), team + _GENERATION, _FUTEX_WAKE, 0x7FFFFFFF)


@njit
def _wait(team, generation):
    """Returns when the generation has changed."""
    patience, spins = load_i64(team + _PATIENCE), 0
    while atomic_load(team + _GENERATION) == generation:
        if spins < patience:
            pause()
        else:
            _sleep(team, generation)
        spins += 1
    if spins > patience:
        store_i64(team + _PATIENCE, max(load_i64(team + _LEAST), patience // 2))
    elif patience < load_i64(team + _MOST):
        grown = patience + patience // load_i64(team + _SLOWNESS)
        store_i64(team + _PATIENCE, min(load_i64(team + _MOST), grown))


@njit
def _sleep(team, generation):
    """Until `_wake_sleepers` wakes all; where the system has no futex, a turn of the scheduler."""
    futex = team + _FUTEX
    if load_i64(futex) == 0:
        _call_yield(load_i64(team + _YIELD))
        return
    atomic_add(team + _SLEEPING, 1)  # before the kernel compares: the last to arrive changes, then looks for sleepers
    low_half = generation & 0xFFFFFFFF
    _call_futex(load_i64(futex), load_i64(futex + 8), team + _GENERATION, _FUTEX_WAIT, low_half)
    atomic_add(team + _SLEEPING, -1)


@njit
def _run_ops(team, thread):
    """Runs the published program; False, and nothing of it has run, where a worker has ended."""
    program, num_ops = load_i64(team + _PROGRAM), load_i64(team + _NUM_OPS)
    if not _join(team, thread):
        return False
    for op in range(num_ops):
        call3(load_i64(program + 16 * op), load_i64(program + 16 * op + 8), thread, team)
        barrier(team, thread)
    return True


@function("int64(int64, int64, int64)")
def _work(team, thread, seen):
    """A worker's loop: runs programs as they come. Returns the last epoch seen when there was none for a while."""
    spins = 0
    while True:
        epoch = atomic_load(team + _EPOCH)
        if epoch != seen:
            seen, spins = epoch, 0
            if atomic_load(team + _QUIT) != 0:
                return seen
            _run_ops(team, thread)
        spins += 1
        pause()
        if spins > _IDLE_PATIENCE * load_i64(team + _PATIENCE):
            return seen


@function("void(int64, int64, int64)")
def _publish(team, program, num_ops):
    store_i64(team + _PROGRAM, program)
    store_i64(team + _NUM_OPS, num_ops)
    atomic_add(team + _EPOCH, 1)


@function("void(int64)")
def _break(team):
    """A worker will not come any more: lets the others out of the join, now and later. No thread is at another barrier,
    or this one could not have ended."""
    atomic_add(team + _BROKEN, 1)
    atomic_add(team + _GENERATION, 1)
    _wake_sleepers(team)


@function("void(int64)")
def _take_part(team):
    """The caller's share of what is published, unless it has run: a signal's exception may have come between."""
    epoch = atomic_load(team + _EPOCH)
    if load_i64(team + _TAKEN) != epoch and _run_ops(team, 0):
        store_i64(team + _TAKEN, epoch)


def divide_gates(node_sizes: Sequence[int]) -> list[int]:
    """How many threads arrive at each gate, in their order: gates of one node each, as even as can be."""
    sizes = []
    for size in node_sizes:
        count = -(-size // _GATE_THREADS)
        sizes += [size * (i + 1) // count - size * i // count for i in range(count)]
    return sizes


class _Gates:
    """The memory of a team's gates: a line for each, and of each thread the address of its own."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.num_gates = len(sizes)
        self._lines = aligned_zeros((len(sizes), _LINE // 8), np.int64)
        self._lines[:, _GATE_SIZE // 8] = sizes
        self._of_thread = self._lines.ctypes.data + _LINE * np.repeat(np.arange(len(sizes)), sizes)

    @property
    def address(self) -> int:
        return self._of_thread.ctypes.data


def _yield_address() -> int:
    library = ctypes.windll.kernel32 if sys.platform == "win32" else ctypes.CDLL(None)
    function = library.SwitchToThread if sys.platform == "win32" else library.sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _futex_call() -> tuple[int, int]:
    """The address of libc's `syscall` and the number of futex; zeros where waiting threads can only yield."""
    number = _FUTEX_NUMBERS.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return 0, 0
    return ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0, number


class Team:
    """`num_threads` threads, the caller being number 0. One program runs at a time.

    RuntimeError where the system gives no more threads, and from `run` when one of them has ended.
    """

    def __init__(self, num_threads: int, groups: Sequence[ThreadGroup] = ()) -> None:
        """groups: where the threads run, as `placement.place_threads` divides so many; () where nothing is divided."""
        assert num_threads >= 1, num_threads
        assert not groups or groups[-1].stop == num_threads, (groups, num_threads)
        for each in (_work, _publish, _break, _take_part):
            each.prepare()  # here, where what goes wrong reaches the caller
        self.num_threads = num_threads
        self.groups = tuple(groups)
        self._callers_cpus = os.sched_getaffinity(0) if groups else set()
        self._memory = np.zeros(_NUM_LINES * _LINE // 8 + 8, dtype=np.int64)
        self._address = -(-self._memory.ctypes.data // _LINE) * _LINE
        nodes = [group.node for group in groups for _ in range(group.num_threads)]
        by_node = {group.node: group for group in groups}
        self._bands = (  # who is done takes from its own node's threads first
            Bands(nodes, lambda node, other: by_node[node].distance(other)) if nodes else Bands([0] * num_threads)
        )
        self._set(_BANDS, self._bands.address)
        self._gates = _Gates(divide_gates([group.num_threads for group in groups] or [num_threads]))
        self._set(_GATES, self._gates.address)
        self._set(_NUM_GATES, self._gates.num_gates)
        self._set(_SIZE, num_threads)
        self._set(_YIELD, _yield_address())
        self._set_patience(*(_OWN_CORES if num_threads <= num_allowed_cpus() else _CROWDED))
        call, number = _futex_call()
        self._set(_FUTEX, call)
        self._set(_FUTEX + 8, number)
        self._condition = threading.Condition()
        self._num_sleeping = 0
        self._process = os.getpid()
        self._ended_by: BaseException | None = None
        self._program: Program | None = None
        self._workers = [
            threading.Thread(target=self._serve, args=(thread,), daemon=True, name=f"kimi-lite-{thread}")
            for thread in range(1, num_threads)
        ]
        atexit.register(self.close)
        try:
            for worker in self._workers:
                worker.start()
        except BaseException:
            self.close()
            raise

    def _set_patience(self, least: int, most: int, slowness: int) -> None:
        for offset, value in ((_PATIENCE, most), (_LEAST, least), (_MOST, most), (_SLOWNESS, slowness)):
            self._set(offset, value)

    def _cell(self, offset: int) -> int:
        return (self._address + offset - self._memory.ctypes.data) // 8

    def _set(self, offset: int, value: int) -> None:
        self._memory[self._cell(offset)] = value

    def _epoch(self) -> int:
        return int(self._memory[self._cell(_EPOCH)])

    def _is_unfinished(self) -> bool:
        return int(self._memory[self._cell(_TAKEN)]) != self._epoch()

    def _is_closed(self) -> bool:
        return bool(self._memory[self._cell(_QUIT)])

    def _serve(self, thread: int) -> None:
        """A worker, until the team is closed."""
        try:
            self._run_programs(thread)
        except BaseException as error:  # whatever it is, the others would wait for this thread
            self._ended_by = error
            _break(self._address)

    def _stay(self, thread: int) -> None:
        """Keeps the calling thread, which is this one of the team, to its cores."""
        group = next((group for group in self.groups if group.first <= thread < group.stop), None)
        if group:
            keep_to(group.cpus)
        else:
            keep_to_cores(self.num_threads)

    def _run_programs(self, thread: int) -> None:
        self._stay(thread)
        seen = 0
        while not self._is_closed():
            seen = _work(self._address, thread, seen)
            with self._condition:
                self._num_sleeping += 1
                self._condition.wait_for(lambda seen=seen: self._is_closed() or self._epoch() != seen)
                self._num_sleeping -= 1

    def _wake(self) -> None:
        with self._condition:
            if self._num_sleeping:
                self._condition.notify_all()

    def run(self, program: Program) -> None:
        """Runs `program` to its end on all threads. Raises RuntimeError, and will again, if one has ended: nothing of
        the program has run then."""
        assert not self._is_closed()
        self._check_workers()
        if not self.groups:
            self._run(program)
            return
        self._stay(0)
        try:
            self._run(program)
        finally:
            keep_to(self._callers_cpus)

    def _run(self, program: Program) -> None:
        self._finish()
        self._program = program  # alive until the next one, also where an exception leaves it unfinished
        _publish(self._address, program.address, len(program.ops))
        if self._num_sleeping:
            self._wake()
        _take_part(self._address)
        if self._is_unfinished():
            self._check_workers()

    def _check_workers(self) -> None:
        if self._ended_by is not None:
            raise RuntimeError("A thread of the kernels' team has ended.") from self._ended_by
        if os.getpid() != self._process:
            raise RuntimeError("The threads of the kernels' team stayed in the process that made this one by fork.")

    def _finish(self) -> None:
        """Runs a program that was published and then left by an exception (a signal's handler raised): the other
        threads wait for the caller in it."""
        if self._is_unfinished():
            self._wake()
            _take_part(self._address)

    def close(self) -> None:
        """Ends the threads; the team is of no use afterwards."""
        if self._is_closed() or os.getpid() != self._process:
            return
        self._finish()
        self._set(_QUIT, 1)
        _publish(self._address, 0, 0)
        self._wake()
        for worker in self._workers:
            if worker.ident is not None:  # one that could not be started cannot be joined
                worker.join()
        atexit.unregister(self.close)
