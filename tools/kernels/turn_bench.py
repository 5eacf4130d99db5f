"""What a turn costs the host: a program of `native.cpu` and a thread that plays the GPU, through the cells of
`native.turn_cells`.

    python -m tools.kernels.turn_bench --threads 1

Nothing is computed but x's int8 forms, so a turn is: flag seen, quantized, flag seen, answered, answer seen. Needs a
core for each thread and one for the GPU's part; the best of many programs counts, as others only disturb.
"""

import json
import threading
import time
from typing import Annotated

import numpy as np
import typer

from kimi_lite.arch.known import K2_5
from kimi_lite.native.calls import atomic_load, atomic_store, pause
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.compiler import function
from kimi_lite.native.cpu.linear import quantize_op
from kimi_lite.native.cpu.program import Program
from kimi_lite.native.cpu.run import RunTable
from kimi_lite.native.cpu.threads import Team
from kimi_lite.native.cpu.turns import TurnTable, answer_op, wait_for_choices_op, wait_for_x_op
from kimi_lite.native.turn_cells import ANSWERED, CHOICES_POSTED, MAX_TOKENS, NUM_CELLS, X_POSTED

_LIMIT_S = 10.0


@function("void(int64, int64, int64)")
def _play_gpu(cells, first, num_turns):
    """Posts both flags of the first token, then waits for the answer, turn after turn."""
    for number in range(first + 1, first + num_turns + 1):
        atomic_store(cells + 8 * X_POSTED, number)
        atomic_store(cells + 8 * CHOICES_POSTED, number)
        while atomic_load(cells + 8 * ANSWERED) < number:
            pause()


def seconds_a_turn(num_threads: int, num_turns: int, num_programs: int) -> list[float]:
    """Of each program, one token a turn."""
    cells, run = np.zeros(NUM_CELLS, np.int64), RunTable(MAX_TOKENS, num_threads, 4096)
    x, table = Activations(MAX_TOKENS, K2_5.hidden_size, {32, 256}), TurnTable(cells, num_turns)
    x.values[:] = np.random.default_rng(0).standard_normal(x.values.shape, np.float32)
    ops = []
    for turn in range(1, num_turns + 1):
        ops += [wait_for_x_op(run, table, turn), quantize_op(run, x), wait_for_choices_op(run, table, turn)]
    program, team, times_s = Program([*ops, answer_op(table, num_turns)]), Team(num_threads), []
    run.set_tokens(np.zeros(1, np.int32))
    _play_gpu(cells.ctypes.data, 0, 0)  # compiled
    for number in range(num_programs):
        table.begin(number * num_turns, _LIMIT_S)
        gpu = threading.Thread(target=_play_gpu, args=(cells.ctypes.data, number * num_turns, num_turns))
        gpu.start()
        start_s = time.perf_counter()
        team.run(program)
        times_s.append((time.perf_counter() - start_s) / num_turns)
        assert not table.late, table.late
        gpu.join()
    team.close()
    return times_s


def main(
    threads: Annotated[int, typer.Option(min=1)] = 1,
    turns: Annotated[int, typer.Option(help="Of a program.", min=1)] = K2_5.num_moe_layers,
    programs: Annotated[int, typer.Option(min=1)] = 200,
) -> None:
    """Microseconds of a turn in which nothing is missing."""
    times_us = np.array(seconds_a_turn(threads, turns, programs)) * 1e6
    best, median = float(times_us.min()), float(np.median(times_us))
    print(f"{threads} threads, {turns} turns a program: {best:.2f} us a turn at best, {median:.2f} in the median")
    print(json.dumps({"tool": "turn_bench", "threads": threads, "best_us": best, "median_us": median}))


if __name__ == "__main__":
    typer.run(main)
