"""A team of threads that runs programs of kernels, the way a GPU runs a graph.

A *program* is an array of (kernel address, argument address) pairs. Every thread of the team walks through it and calls
each kernel as `kernel(args, thread, team)`; a kernel shares its work out with `next_task` and separates its phases
with `barrier`. One call from Python thus runs a whole transformer: no per-operation dispatch, a barrier costs well
under a microsecond. Threads spin for a short while after a program, then sleep in Python until the next one, so an
idle team costs nothing.

Kernels are C functions (`compiler.kernel`): their addresses are plain numbers, so operations and tensor types combine
at run time and each is compiled (and cached on disk) once.
"""

import atexit
import ctypes
import sys
import threading
from collections.abc import Sequence

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kimi_lite.native.calls import atomic_add, atomic_load, atomic_store, call3, pause
from kimi_lite.native.cpu.placement import keep_to_cores
from kimi_lite.native.simd import load_i64, store_i64

# The team's shared memory, int64 slots each on a cache line of its own.
_LINE = 64
_EPOCH, _PROGRAM, _NUM_OPS, _ARRIVED, _GENERATION, _TASK, _STOP, _STOPPED, _QUIT, _SIZE, _YIELD = (
    _LINE * i for i in range(11)
)
_NUM_LINES = 11

_SPINS_BEFORE_YIELD = 4_000  # about 100 us: past that, another thread needs this core
_YIELDS_BEFORE_SLEEP = 200


@intrinsic
def _call_yield(typingctx, function):
    """Gives the core away: `sched_yield()` or `SwitchToThread()` through its address."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@njit
def team_size(team):
    """Number of threads."""
    return load_i64(team + _SIZE)


@njit
def next_task(team):
    """The next task number of this phase, from 0: tasks go to whichever thread is free. `barrier` starts over."""
    return atomic_add(team + _TASK, 1)


@njit
def barrier(team):
    """Waits until every thread is here; what each wrote before is then visible to all."""
    generation = atomic_load(team + _GENERATION)
    if atomic_add(team + _ARRIVED, 1) == team_size(team) - 1:
        store_i64(team + _ARRIVED, 0)
        store_i64(team + _TASK, 0)
        atomic_store(team + _GENERATION, generation + 1)
        return
    spins = 0
    while atomic_load(team + _GENERATION) == generation:
        pause()
        spins += 1
        if spins > _SPINS_BEFORE_YIELD:
            _call_yield(load_i64(team + _YIELD))


@njit
def _run_ops(team, thread):
    """Runs the published program; False when it was stopped between two operations."""
    program, num_ops = load_i64(team + _PROGRAM), load_i64(team + _NUM_OPS)
    for op in range(num_ops):
        stopped = (
            team + _STOPPED + 8 * (op % 2)
        )  # two places: thread 0 may be at the next operation before others have looked
        if thread == 0:
            store_i64(stopped, atomic_load(team + _STOP))
        barrier(team)
        if load_i64(stopped) != 0:
            barrier(team)  # all have looked before the next program begins
            return False
        call3(load_i64(program + 16 * op), load_i64(program + 16 * op + 8), thread, team)
    barrier(team)
    return True


@njit("int64(int64, int64, int64)", nogil=True, cache=True)
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
        if spins > _SPINS_BEFORE_YIELD:
            _call_yield(load_i64(team + _YIELD))
            if spins > _SPINS_BEFORE_YIELD + _YIELDS_BEFORE_SLEEP:
                return seen


@njit("void(int64, int64, int64)", cache=True)
def _publish(team, program, num_ops):
    store_i64(team + _PROGRAM, program)
    store_i64(team + _NUM_OPS, num_ops)
    atomic_add(team + _EPOCH, 1)


@njit("boolean(int64)", nogil=True, cache=True)
def _take_part(team):
    return _run_ops(team, 0)


def _yield_address() -> int:
    library = ctypes.windll.kernel32 if sys.platform == "win32" else ctypes.CDLL(None)
    function = library.SwitchToThread if sys.platform == "win32" else library.sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class Program:
    """Operations in order, ready to run: keeps their argument arrays alive."""

    def __init__(self, ops: Sequence[tuple[int, np.ndarray]]) -> None:
        """`ops`: (kernel address, int64 argument array) pairs."""
        self._arguments = [arguments for _, arguments in ops]
        self.table = np.array([[kernel, arguments.ctypes.data] for kernel, arguments in ops], dtype=np.int64)
        self.num_ops = len(ops)


class Team:
    """`num_threads` threads, the caller being one of them. One program runs at a time; `stop` ends it early."""

    def __init__(self, num_threads: int) -> None:
        assert num_threads >= 1, num_threads
        self.num_threads = num_threads
        self._memory = np.zeros(_NUM_LINES * _LINE // 8 + 8, dtype=np.int64)
        self._address = -(-self._memory.ctypes.data // _LINE) * _LINE
        self._slot(_SIZE, num_threads)
        self._slot(_YIELD, _yield_address())
        self._condition = threading.Condition()
        self._num_sleeping = 0
        self._workers = [
            threading.Thread(target=self._serve, args=(thread,), daemon=True, name=f"kimi-lite-{thread}")
            for thread in range(1, num_threads)
        ]
        for worker in self._workers:
            worker.start()
        atexit.register(self.close)

    def _slot(self, offset: int, value: int) -> None:
        self._memory[(self._address + offset - self._memory.ctypes.data) // 8] = value

    def _epoch(self) -> int:
        return int(self._memory[(self._address + _EPOCH - self._memory.ctypes.data) // 8])

    def _is_closed(self) -> bool:
        return bool(self._memory[(self._address + _QUIT - self._memory.ctypes.data) // 8])

    def _serve(self, thread: int) -> None:
        keep_to_cores(self.num_threads)
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

    def run(self, program: Program) -> bool:
        """Runs `program` to its end on all threads; False if `stop` was called meanwhile."""
        assert not self._is_closed()
        self._slot(_STOP, 0)
        _publish(self._address, program.table.ctypes.data, program.num_ops)
        if self._num_sleeping:
            self._wake()
        return _take_part(self._address)

    def stop(self) -> None:
        """Ends the running program before its next operation. May be called from any thread."""
        self._slot(_STOP, 1)

    def close(self) -> None:
        """Ends the threads; the team is of no use afterwards."""
        if self._is_closed():
            return
        self._slot(_QUIT, 1)
        _publish(self._address, 0, 0)
        self._wake()
        for worker in self._workers:
            worker.join()
        atexit.unregister(self.close)
