"""A program that takes turns with a GPU; the GPU is a thread of the test."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.linear import quantize_op
from kimi_lite.native.cpu.program import Program
from kimi_lite.native.cpu.run import RunTable
from kimi_lite.native.cpu.threads import Team
from kimi_lite.native.cpu.turns import TurnTable, answer_op, wait_for_choices_op, wait_for_x_op
from kimi_lite.native.turn_cells import ANSWERED, CHOICES_POSTED, MAX_TOKENS, NUM_CELLS, STOP, X_POSTED

WIDTH, NUM_TURNS = 32, 5


class Exchange:
    """Both halves' memory, and the CPU's program: in each turn it quantizes what the GPU posted."""

    def __init__(self) -> None:
        self.cells = np.zeros(NUM_CELLS, np.int64)
        self.x = Activations(MAX_TOKENS, WIDTH, {32})
        self.table, self.run = TurnTable(self.cells, NUM_TURNS), RunTable(MAX_TOKENS, 3, 4096)
        ops = []
        for turn in range(1, NUM_TURNS + 1):
            ops += [wait_for_x_op(self.run, self.table, turn), quantize_op(self.run, self.x)]
            ops += [wait_for_choices_op(self.run, self.table, turn)]
        self.program = Program([*ops, answer_op(self.table, NUM_TURNS)])

    def begin(self, first: int, num_tokens: int, limit_s: float = 60.0) -> None:
        self.first, self.num_tokens = first, num_tokens
        self.run.set_tokens(np.zeros(num_tokens, np.int32))
        self.table.begin(first, limit_s)

    def post(self, cell: int, turn: int) -> None:
        self.cells[cell : cell + self.num_tokens] = self.first + turn

    def wait_for(self, turn: int) -> None:
        until_s = time.monotonic() + 30
        while self.cells[ANSWERED] < self.first + turn:
            assert time.monotonic() < until_s, (turn, self.cells[ANSWERED])
            time.sleep(0)

    def play(self, inputs: np.ndarray, codes: np.ndarray) -> None:
        """The GPU's half: inputs (turns, T, WIDTH); after each answer what the CPU made of them goes into `codes`."""
        for turn, values in enumerate(inputs, 1):
            self.x.values[: self.num_tokens] = values
            self.post(X_POSTED, turn)
            self.post(CHOICES_POSTED, turn)
            self.wait_for(turn)
            codes[turn - 1] = self.x.quantized[32][0][: self.num_tokens]


@pytest.fixture(scope="module")
def exchange() -> Exchange:
    return Exchange()


@pytest.fixture(scope="module")
def teams():
    teams = [Team(count) for count in (1, 2, 3)]
    yield teams
    for team in teams:
        team.close()


def run_meanwhile(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2), st.integers(1, MAX_TOKENS), st.integers(0, 2**32 - 1))
def test_the_cpu_sees_each_turn_and_answers_it(exchange, teams, which, num_tokens, seed):
    """Programs of any team, steps of any size, one after the other, without a reset in between."""
    inputs = np.random.default_rng(seed).integers(-127, 128, (NUM_TURNS, num_tokens, WIDTH)).astype(np.float32)
    inputs[..., 0] = 127  # so that codes are the values
    codes = np.zeros(inputs.shape, np.int8)
    exchange.begin(int(exchange.cells[ANSWERED]), num_tokens)
    gpu = run_meanwhile(lambda: exchange.play(inputs, codes))
    teams[which].run(exchange.program)
    gpu.join(30)
    assert np.array_equal(codes, inputs)
    assert not exchange.table.late and exchange.cells[STOP] == 0
    times_s = [exchange.table.times_s(turn) for turn in range(1, NUM_TURNS + 1)]
    assert all(0 <= waited_s < 30 and 0 <= elapsed_s < 30 for waited_s, elapsed_s in times_s)


@pytest.mark.parametrize("posts_x", [False, True])
def test_a_gpu_that_never_comes_ends_the_program(exchange, teams, posts_x):
    """With one token of three that came."""
    exchange.begin(int(exchange.cells[ANSWERED]), 3, limit_s=0.02)
    if posts_x:
        exchange.post(X_POSTED, 1)
    exchange.cells[(CHOICES_POSTED if posts_x else X_POSTED)] = exchange.first + 1
    teams[1].run(exchange.program)
    assert exchange.table.late == 1 and exchange.cells[STOP] == 1
    assert exchange.cells[ANSWERED] == exchange.first, "nothing was answered"


def test_a_stop_ends_the_program_in_any_turn(exchange, teams):
    for turn in range(NUM_TURNS):
        exchange.begin(int(exchange.cells[ANSWERED]), 2)

        def stop_in_turn(turn: int = turn) -> None:
            codes = np.zeros((turn, 2, WIDTH), np.int8)
            exchange.play(np.ones(codes.shape, np.float32), codes)
            exchange.cells[STOP] = 1

        gpu = run_meanwhile(stop_in_turn)
        teams[2].run(exchange.program)
        gpu.join(30)
        assert exchange.cells[ANSWERED] == exchange.first + turn and not exchange.table.late
