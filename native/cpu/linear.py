"""Operations around the matrices: RMSNorm, quantizing, linear layers, embedding rows. All are program kernels.

Each has a function that makes it a `program.Op`. `run` is the batch's table (native.cpu.run): how many tokens there are
now.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, types

from kimi_lite.native.cpu.activations import NUM_VALUES, X_F32, Activations, quantize_token
from kimi_lite.native.cpu.compiler import kernel
from kimi_lite.native.cpu.matrix import (
    NUM_ROWS,
    TILE_KIND,
    K,
    Matrix,
    fetch_meanwhile,
    matrix_panel,
    matrix_rows,
    matrix_values,
    panel_product,
)
from kimi_lite.native.cpu.packing import PACK_TOKENS, pack_bytes, pack_tokens, packs_bytes
from kimi_lite.native.cpu.panel import ADD, PANEL_ROWS
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.cpu.run import (
    EVERY_TOKEN,
    NUM_GENERATED,
    NUM_TOKENS,
    PACKS,
    SCRATCH,
    SCRATCH_STRIDE,
    TOKEN_IDS,
    RunTable,
)
from kimi_lite.native.cpu.threads import barrier, next_panel, next_task, next_tasks, panels_ahead, team_size
from kimi_lite.native.cpu.tile_panel import TILE_PANEL_ROWS
from kimi_lite.native.simd import (
    fma_f32x16,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    splat_f32x16,
    store_f32,
    store_f32x16,
    sum_f32x16,
    zero_f32x16,
)

TASK_ROWS = 64  # at most, that a thread takes at once for few tokens
BAND_STEP = 8  # rows that are taken together there: the size of the last pieces, for which other threads may wait
TASK_TOKENS = 16  # generated tokens whose results lie in a thread's scratch at once
RESULT_BYTES = 4 * TASK_ROWS  # from token to token there


@njit
def thread_scratch(run, thread):
    """This thread's scratch memory."""
    return load_i64(run + SCRATCH) + thread * load_i64(run + SCRATCH_STRIDE)


# RMSNorm --------------------------------------------------------------------------------------------------------------


@njit(fastmath={"nsz", "contract"}, error_model="numpy")
def rms_norm(x, weight, out, k, eps):
    """out = x / sqrt(mean(x^2) + eps) * weight, float32 (K,), K a multiple of 16 (Zhang & Sennrich 2019)."""
    squares = zero_f32x16()
    for i in range(0, 4 * k, 64):
        value = load_f32x16(x + i)
        squares = fma_f32x16(value, value, squares)
    mean = sum_f32x16(squares) / types.float32(k)
    factor = splat_f32x16(
        types.float32(1) / np.sqrt(mean + eps) + (mean - mean)
    )  # an infinite mean makes NaN, not zeros
    for i in range(0, 4 * k, 64):
        store_f32x16(out + i, load_f32x16(x + i) * factor * load_f32x16(weight + i))


@kernel
def _rms_norm_kernel(args, thread, team):
    run, x, stride = load_i64(args), load_i64(args + 8), load_i64(args + 16)
    weight, out, eps = load_i64(args + 24), load_i64(args + 32), load_f32(args + 40)
    k = load_i64(out + NUM_VALUES)
    token = next_task(team)
    while token < load_i64(run + NUM_TOKENS):
        rms_norm(x + token * stride, weight, load_i64(out + X_F32) + 4 * k * token, k, eps)
        quantize_token(out, token)
        token = next_task(team)


def rms_norm_op(run: RunTable, x: np.ndarray, weight: np.ndarray, out: Activations, eps: float) -> Op:
    """out[t] = RMSNorm(x[t, :K]), quantized. x: float32 (capacity, >= K); weight: float32 (K,)."""
    assert weight.dtype == np.float32 and weight.shape == (out.k,), (weight.dtype, weight.shape, out.k)
    assert x.dtype == np.float32 and x.strides[1] == 4, (x.dtype, x.strides)
    return Op.of(_rms_norm_kernel, run, x, x.strides[0], weight, out, float(eps))


# Linear layers --------------------------------------------------------------------------------------------------------


@njit
def _add_rows(source, target, num_rows):
    row = 0
    while row + 16 <= num_rows:
        store_f32x16(target + 4 * row, load_f32x16(target + 4 * row) + load_f32x16(source + 4 * row))
        row += 16
    while row < num_rows:
        store_f32(target + 4 * row, load_f32(target + 4 * row) + load_f32(source + 4 * row))
        row += 1


@njit
def _panel_rows(num_rows, num_threads):
    """Rows of a task with matrix tiles: fewer where a small matrix must still be shared by all threads."""
    return min(TILE_PANEL_ROWS, max(16, num_rows // (4 * num_threads) // 16 * 16))


@njit
def _linear_task(run, x, matrix, first, num_rows, next_row, out, stride, is_added, scratch):
    """`num_rows` rows of one matrix for every token: the generated ones, then those of prompts. From `next_row` on this
    thread goes on, probably."""
    num_tokens, num_generated = load_i64(run + NUM_TOKENS), load_i64(run + NUM_GENERATED)
    every, target = load_i64(run + EVERY_TOKEN), out + 4 * first
    if not is_added and num_generated > 0:
        matrix_rows(matrix, first, num_rows, x, every, num_generated, target, stride)
    if is_added:
        for begin in range(0, num_generated, TASK_TOKENS):
            count = min(TASK_TOKENS, num_generated - begin)
            matrix_rows(matrix, first, num_rows, x, every + 4 * begin, count, scratch, RESULT_BYTES)
            for i in range(count):
                _add_rows(scratch + RESULT_BYTES * i, target + (begin + i) * stride, num_rows)
    if num_tokens > num_generated:
        matrix_panel(matrix, first, num_rows, scratch)
        fetch_meanwhile(scratch, matrix, next_row, num_rows)
        mode, tokens = num_rows + (ADD if is_added else 0), every + 4 * num_generated
        target += num_generated * stride
        packs = load_i64(run + PACKS)
        panel_product(matrix, scratch, x, tokens, packs, num_tokens - num_generated, target, stride, mode)


@njit
def _pack_prompt(run, x, thread, team):
    """Packs every token of prompts for matrix tiles."""
    num_generated, packs = load_i64(run + NUM_GENERATED), load_i64(run + PACKS)
    num_tokens, stride = load_i64(run + NUM_TOKENS) - num_generated, pack_bytes(x)
    first = next_task(team) * PACK_TOKENS
    while first < num_tokens:
        tokens = load_i64(run + EVERY_TOKEN) + 4 * (num_generated + first)
        pack_tokens(x, tokens, min(PACK_TOKENS, num_tokens - first), packs + first // PACK_TOKENS * stride)
        first = next_task(team) * PACK_TOKENS
    barrier(team, thread)


@njit
def _share_rows(args, thread, team):
    """Generated tokens alone: the rows of all matrices one behind the other, of which each thread has a band."""
    run, x, num_outputs, scratch = (
        load_i64(args),
        load_i64(args + 8),
        load_i64(args + 16),
        thread_scratch(load_i64(args), thread),
    )
    num_steps = 0
    for i in range(num_outputs):
        num_steps += -(-load_i64(load_i64(args + 32 + 32 * i) + NUM_ROWS) // BAND_STEP)
    first, count = next_tasks(team, thread, num_steps, TASK_ROWS // BAND_STEP)
    while count > 0:
        passed = 0
        for i in range(num_outputs):
            output = args + 32 + 32 * i
            matrix, out, stride = load_i64(output), load_i64(output + 8), load_i64(output + 16)
            num_rows = load_i64(matrix + NUM_ROWS)
            begin = max(0, first - passed) * BAND_STEP
            end = min(num_rows, (first + count - passed) * BAND_STEP)
            if begin < end:
                _linear_task(run, x, matrix, begin, end - begin, end, out, stride, load_i64(output + 24) != 0, scratch)
            passed += -(-num_rows // BAND_STEP)
        first, count = next_tasks(team, thread, num_steps, TASK_ROWS // BAND_STEP)


@njit
def _share_panels(args, thread, team):
    """With tokens of prompts: panels of rows, each to the next thread that is free; where memory is on several nodes,
    on the panel's node if any is."""
    run, x, num_outputs = load_i64(args), load_i64(args + 8), load_i64(args + 16)
    scratch = thread_scratch(run, thread)
    if load_i64(args + 24) != 0:
        _pack_prompt(run, x, thread, team)
    num_tasks = 0
    for i in range(num_outputs):
        num_tasks += _num_panels(load_i64(args + 32 + 32 * i), team)
    task = next_panel(team, thread, num_tasks)
    while task < num_tasks:
        output, panel = args + 32, task
        while panel >= _num_panels(load_i64(output), team):
            panel -= _num_panels(load_i64(output), team)
            output += 32
        matrix, out, stride = load_i64(output), load_i64(output + 8), load_i64(output + 16)
        num_rows, step = load_i64(matrix + NUM_ROWS), _panel_step(matrix, team)
        first = panel * step
        count, following = min(step, num_rows - first), first + panels_ahead(team) * step
        _linear_task(run, x, matrix, first, count, following, out, stride, load_i64(output + 24) != 0, scratch)
        task = next_panel(team, thread, num_tasks)


@njit
def _panel_step(matrix, team):
    """Rows of a task for prompts."""
    if load_i64(matrix + TILE_KIND) == 0:
        return PANEL_ROWS
    return _panel_rows(load_i64(matrix + NUM_ROWS), team_size(team))


@njit
def _num_panels(matrix, team):
    return -(-load_i64(matrix + NUM_ROWS) // _panel_step(matrix, team))


@kernel
def _linear_kernel(args, thread, team):
    run = load_i64(args)
    if load_i64(run + NUM_TOKENS) > load_i64(run + NUM_GENERATED):
        _share_panels(args, thread, team)
    else:
        _share_rows(args, thread, team)


class Product(NamedTuple):
    """out[t, :rows] = matrix @ x[t], or += it. out: float32 (capacity, >= rows)."""

    matrix: Matrix
    out: np.ndarray
    is_added: bool = False


def linear_op(run: RunTable, x: Activations, *products: Product) -> Op:
    """Products of one input with one or several matrices."""
    has_tiles = any(product.matrix.table[TILE_KIND // 8] for product in products)
    if has_tiles:
        run.reserve_packs(packs_bytes(x, -(-x.capacity // PACK_TOKENS)))
    cells: list = [run, x, len(products), has_tiles]
    for matrix, out, is_added in products:
        assert matrix.k == x.k and out.dtype == np.float32 and out.strides[1] == 4, (matrix.k, x.k, out.strides)
        assert out.shape[1] >= matrix.num_rows, (out.shape, matrix.num_rows)
        cells += [matrix, out, out.strides[0], is_added]
    return Op.of(_linear_kernel, *cells)


# Embedding rows -------------------------------------------------------------------------------------------------------


@kernel
def _embed_kernel(args, thread, team):
    run, matrix, out, stride = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
    k, scratch = load_i64(matrix + K), thread_scratch(run, thread)
    token = next_task(team)
    while token < load_i64(run + NUM_TOKENS):
        matrix_values(matrix, load_i32(load_i64(run + TOKEN_IDS) + 4 * token), 1, scratch)
        for i in range(0, 4 * k, 64):
            store_f32x16(out + token * stride + i, load_f32x16(scratch + i))
        token = next_task(team)


def embed_op(run: RunTable, matrix: Matrix, out: np.ndarray) -> Op:
    """out[t] = row token_ids[t] of the matrix, as float32 (capacity, K)."""
    return Op.of(_embed_kernel, run, matrix, out, out.strides[0])


# Quantizing what an operation left as float32
# --------------------------------------------------------------------------


@kernel
def _quantize_kernel(args, thread, team):
    run, x = load_i64(args), load_i64(args + 8)
    token = next_task(team)
    while token < load_i64(run + NUM_TOKENS):
        quantize_token(x, token)
        token = next_task(team)


def quantize_op(run: RunTable, x: Activations) -> Op:
    """Brings the int8 forms of every token up to date with its float32 values."""
    return Op.of(_quantize_kernel, run, x)
