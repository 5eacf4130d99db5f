"""Adds the products of single choices to the output, in the order in which `native.cpu.experts` would have added them.

Experts that lie in several places are computed when and where they can be; each leaves its product in the row of its
choice (`experts_op(per_choice=...)`). The sum over a token's rows runs in expert order, so the result has the same bits
as if all experts had lain in one place, however they came.
"""

import numpy as np
from numba import njit, types

from kimi_lite.native.cpu.compiler import kernel
from kimi_lite.native.cpu.experts import add_scaled
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.cpu.run import NUM_TOKENS, RunTable
from kimi_lite.native.cpu.threads import next_task
from kimi_lite.native.simd import load_f32, load_i32, load_i64

_TASK_COLUMNS = 1024  # a multiple of 16, so that the last columns are added as in the experts' kernel


@njit
def _next_choice(ids, top_k, expert, choice):
    """The choice after (expert, choice) in order of experts, -1 behind the last one. Absent choices (id < 0) never
    come."""
    best, best_expert = -1, 0
    for i in range(top_k):
        candidate = load_i32(ids + 4 * i)
        is_later = candidate > expert or (candidate == expert and i > choice)
        if candidate >= 0 and is_later and (best < 0 or candidate < best_expert):
            best, best_expert = i, candidate
    return best


@kernel
def _join_kernel(args, thread, team):
    run, rows, row_bytes, ids = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
    weights, top_k, num_always = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    out, stride, width = load_i64(args + 56), load_i64(args + 64), load_i64(args + 72)
    blocks = -(-width // _TASK_COLUMNS)
    task = next_task(team)
    while task < blocks * load_i64(run + NUM_TOKENS):
        token, first = task // blocks, task % blocks * _TASK_COLUMNS
        count, target = min(_TASK_COLUMNS, width - first), out + token * stride + 4 * first
        row = rows + token * (top_k + num_always) * row_bytes + 4 * first
        chosen, factors = ids + 4 * top_k * token, weights + 4 * top_k * token
        choice = _next_choice(chosen, top_k, -1, -1)
        while choice >= 0:
            add_scaled(row + choice * row_bytes, load_f32(factors + 4 * choice), target, count)
            choice = _next_choice(chosen, top_k, load_i32(chosen + 4 * choice), choice)
        for i in range(top_k, top_k + num_always):
            add_scaled(row + i * row_bytes, types.float32(1), target, count)
        task = next_task(team)


def join_op(
    run: RunTable, per_choice: np.ndarray, ids: np.ndarray, weights: np.ndarray, num_always: int, out: np.ndarray
) -> Op:
    """out[t] += sum over the choices of weight * row, in expert order; choices with id -1 are left out.

    per_choice: float32 (capacity * (top_k + num_always), N), filled by `experts_op`; out: float32 (capacity, >= N).
    """
    assert ids.shape == weights.shape and ids.dtype == np.int32 and weights.dtype == np.float32, (
        ids.shape,
        weights.shape,
    )
    assert per_choice.dtype == out.dtype == np.float32 and per_choice.strides[1] == out.strides[1] == 4, (
        per_choice.strides
    )
    rows, row_bytes = per_choice, per_choice.strides[0]
    sizes = (out.strides[0], per_choice.shape[1])
    return Op.of(_join_kernel, run, rows, row_bytes, ids, weights, ids.shape[1], num_always, out, *sizes)
