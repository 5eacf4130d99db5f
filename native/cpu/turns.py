"""Operations that wait for a GPU inside a program, and answer it, through `native.turn_cells`.

All threads of the team look for themselves, so that each goes on as soon as it sees the GPU's cell and none has to be
woken. They spin for a moment, which is as long as a GPU's part of a layer, then let other threads of the machine in
between two looks, and sleep between them where the GPU takes longer than any layer.
"""

import ctypes
import sys
import time

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kimi_lite.native.calls import atomic_load, atomic_store, pause, read_clock, stack_1024
from kimi_lite.native.cpu.compiler import Kernel, kernel
from kimi_lite.native.cpu.program import Argument, Op
from kimi_lite.native.cpu.run import NUM_TOKENS, RunTable
from kimi_lite.native.cpu.threads import give_way
from kimi_lite.native.simd import load_i64, store_i64
from kimi_lite.native.turn_cells import ANSWERED, CHOICES_POSTED, STOP, X_POSTED

_PATIENCE = 8192  # spins of 25 to 50 ns, 0.2 to 0.4 ms: longer than a GPU's attention and router
_AWAKE_NS, _NAP_NS = 2_000_000, 50_000  # after a wait this long, sleep this long between two looks
_SPINS_BETWEEN = 8  # looks: a turn of the scheduler costs as much when no other thread wants the core

# int64 cells of a turn table: what is the same for all operations of a step
_FIRST, _LIMIT_NS, _LATE, _CLOCK, _CLOCK_ID, _NANOSLEEP, _NAP = (8 * i for i in range(7))  # _NAP: a timespec
_NUM_TABLE_CELLS = 8
_CLOCK_NUMBER = getattr(time, "CLOCK_MONOTONIC", 0)


class TurnTable:
    """What the waiting operations of a step share."""

    def __init__(self, cells: np.ndarray, num_turns: int) -> None:
        """cells: int64 (turn_cells.NUM_CELLS,), which the GPU sees too."""
        self.cells = cells
        self._times_ns = np.zeros((num_turns, 2), np.int64)  # when the choices came, when the rows were there
        self._table = np.zeros(_NUM_TABLE_CELLS, np.int64)
        self._table[_CLOCK // 8], self._table[_CLOCK_ID // 8] = _address_of("clock_gettime"), _CLOCK_NUMBER
        self._table[_NANOSLEEP // 8], self._table[_NAP // 8 + 1] = _address_of("nanosleep"), _NAP_NS

    @property
    def address(self) -> int:
        return self._table.ctypes.data

    def begin(self, first: int, limit_s: float) -> None:
        """A step whose turns are numbered first + 1, first + 2, ...; no turn may keep the team waiting for longer."""
        self.cells[ANSWERED], self.cells[STOP] = first, 0
        self._table[_FIRST // 8], self._table[_LIMIT_NS // 8], self._table[_LATE // 8] = first, int(limit_s * 1e9), 0
        self._begun_ns = time.monotonic_ns()

    def times_s(self, turn: int) -> tuple[float, float]:
        """How long the team waited for the GPU in this turn (from 1), and computed for it."""
        chosen_ns, answered_ns = self._times_ns[turn - 1].tolist()
        before_ns = self._begun_ns if turn == 1 else int(self._times_ns[turn - 2, 1])
        return (chosen_ns - before_ns) * 1e-9, (answered_ns - chosen_ns) * 1e-9

    @property
    def computed_ns(self) -> np.ndarray:
        """int64 (turns, 2): when the team began to compute in each turn of the last step and when it had answered, on
        the clock of `time.monotonic_ns`."""
        return self._times_ns.copy()

    def op(self, kernel: Kernel, turn: int, *others: Argument) -> Op:
        """An operation of this turn, from 1."""
        assert 1 <= turn <= len(self._times_ns), (turn, len(self._times_ns))
        return Op.of(kernel, self, self.cells, turn, self._times_ns, *others)

    @property
    def late(self) -> int:
        """The turn, counted from 1, that the GPU let the team wait for in vain; 0: none."""
        return int(self._table[_LATE // 8])


def _address_of(name: str) -> int:
    """Of a function of libc; 0 where there is none."""
    if sys.platform == "win32":
        return 0
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0


@njit
def _now_ns(table):
    """0 on a machine without the clock."""
    if load_i64(table + _CLOCK) == 0:
        return 0
    target = stack_1024()
    read_clock(load_i64(table + _CLOCK), load_i64(table + _CLOCK_ID), target)
    return load_i64(target) * 1_000_000_000 + load_i64(target + 8)


@intrinsic
def _nap(typingctx, function, duration):
    """nanosleep(duration, NULL) through its address."""

    def codegen(context, builder, sig, args):
        i64 = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [i64, i64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], ir.Constant(i64, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@njit
def _wait_for(table, cells, cell, number, turn, thread, team):
    """True when the cell has reached the number, False when the step is given up."""
    spins, since_ns = 0, 0
    while atomic_load(cells + 8 * cell) < number:
        if atomic_load(cells + 8 * STOP) != 0:
            return False
        spins += 1
        pause()
        if spins > _PATIENCE and spins % _SPINS_BETWEEN == 0:
            now_ns = _now_ns(table)
            if since_ns == 0:
                since_ns = now_ns
            if thread == 0 and now_ns - since_ns > load_i64(table + _LIMIT_NS):
                store_i64(table + _LATE, turn)
                atomic_store(cells + 8 * STOP, 1)
            if now_ns - since_ns > _AWAKE_NS and load_i64(table + _NANOSLEEP) != 0:
                _nap(load_i64(table + _NANOSLEEP), table + _NAP)
            else:
                give_way(team)
    return True


@kernel
def _answer_kernel(args, thread, team):
    """Behind the barrier that ends the operations of a turn."""
    table, cells, turn, times = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
    if thread == 0 and atomic_load(cells + 8 * STOP) == 0:
        atomic_store(cells + 8 * ANSWERED, load_i64(table + _FIRST) + turn)
        store_i64(times + 16 * (turn - 1) + 8, _now_ns(table))


@kernel
def _wait_kernel(args, thread, team):
    table, cells, turn, times = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
    posted, run, answers = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    first = load_i64(table + _FIRST)
    if thread == 0 and answers != 0 and atomic_load(cells + 8 * STOP) == 0:
        atomic_store(cells + 8 * ANSWERED, first + turn - 1)
        store_i64(times + 16 * (turn - 2) + 8, _now_ns(table))
    token = 0
    while token < load_i64(run + NUM_TOKENS) and _wait_for(
        table, cells, posted + token, first + turn, turn, thread, team
    ):
        token += 1
    if thread == 0:
        if atomic_load(cells + 8 * STOP) != 0:
            store_i64(run + NUM_TOKENS, 0)  # the program goes on to its end with nothing to do
        elif posted == CHOICES_POSTED:
            store_i64(times + 16 * (turn - 1), _now_ns(table))


def wait_for_x_op(run: RunTable, table: TurnTable, turn: int) -> Op:
    """Ends when the inputs of all tokens of this turn (from 1) are there; first answers the turn before."""
    return table.op(_wait_kernel, turn, X_POSTED, run, turn > 1)


def wait_for_choices_op(run: RunTable, table: TurnTable, turn: int) -> Op:
    """Ends when all tokens' choices of this turn (from 1) are there."""
    return table.op(_wait_kernel, turn, CHOICES_POSTED, run, False)


def answer_op(table: TurnTable, turn: int) -> Op:
    """Tells the GPU that the rows of this turn (from 1) are there."""
    return table.op(_answer_kernel, turn)
