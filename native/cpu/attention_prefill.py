"""Expanded multi-head latent attention, the form for prompts: keys and values of each head are made from the latents.

Per (sequence, head) task, for each page of 64 positions: the latents become float32 rows and columns, the head's keys
and values of the page are computed (W_UK, W_UV), and all the chunk's queries attend to them with an online softmax
(FlashAttention, arXiv 2205.14135). Where the chunk begins and ends does not change a query's bits. Everything a page
needs stays in the core's cache; all four products use one tile.
"""

from functools import cache

import numpy as np
from numba import njit, types

from kimi_lite.native.cpu.activations import NUM_VALUES, X_F32, Activations
from kimi_lite.native.cpu.attention import softmax_block
from kimi_lite.native.cpu.compiler import kernel
from kimi_lite.native.cpu.latent import check_storage, load_latent
from kimi_lite.native.cpu.linear import thread_scratch
from kimi_lite.native.cpu.matrix import VALUES_PADDING, Matrix, matrix_values
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.cpu.run import (
    COS,
    EXPANDED,
    NUM_EXPANDED,
    RECORD_BYTES,
    RECORD_LENGTH,
    RECORD_PAGES,
    RECORD_POSITION,
    RECORD_TOKEN,
    SIN,
    RunTable,
)
from kimi_lite.native.cpu.specialize import for_literals
from kimi_lite.native.cpu.threads import next_task
from kimi_lite.native.cpu.vector_math import rotate_pairs
from kimi_lite.native.latent_rows import GROUP_VALUES, PAGE_TOKENS, ROW_FORMS, MlaShape
from kimi_lite.native.simd import (
    broadcast_f32,
    fma_f32x16,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    splat_f32x16,
    store_f32,
    store_f32x16,
    transpose_16x16,
    zero_f32x16,
)

_FAST = {"fastmath": {"nsz", "contract"}, "error_model": "numpy"}
_RUN, _Q, _Q_STRIDE, _K_B, _V_B, _SCALE, _NUM_HEADS, _NOPE, _ROPE, _KV_LORA, _VALUE, _STORAGE, _OUT = (
    8 * i for i in range(13)
)
_LOWEST = types.float32(-1e30)
_SCORES_BYTES = 4 * 4 * PAGE_TOKENS  # a tile of 4 queries


def prefill_scratch_bytes(max_tokens: int, shape: MlaShape) -> int:
    """Scratch a thread needs for one head: its projections, one page, and the state of every query."""
    projections = shape.kv_lora * (2 * shape.nope + 2 * shape.value)
    page = PAGE_TOKENS * (2 * shape.latent + shape.nope + shape.value)
    return 4 * (projections + page + (max_tokens + 4) * (shape.value + 2)) + _SCORES_BYTES + 2 * VALUES_PADDING + 4096


@njit(**_FAST)
def _tile(a, a_stride, num_rows, b, b_stride, k, c, c_stride, is_added):
    """c[i][0:16] = or += sum_k a[i][k] * b[k][0:16], i < num_rows <= 4. Strides in bytes."""
    last = num_rows - 1
    a0, a1, a2, a3 = a, a + a_stride * min(1, last), a + a_stride * min(2, last), a + a_stride * min(3, last)
    s0, s1, s2, s3 = zero_f32x16(), zero_f32x16(), zero_f32x16(), zero_f32x16()
    if is_added:
        s0, s1 = load_f32x16(c), load_f32x16(c + c_stride * min(1, last))
        s2, s3 = load_f32x16(c + c_stride * min(2, last)), load_f32x16(c + c_stride * min(3, last))
    for i in range(k):
        row = load_f32x16(b + i * b_stride)
        s0 = fma_f32x16(row, broadcast_f32(a0 + 4 * i), s0)
        s1 = fma_f32x16(row, broadcast_f32(a1 + 4 * i), s1)
        s2 = fma_f32x16(row, broadcast_f32(a2 + 4 * i), s2)
        s3 = fma_f32x16(row, broadcast_f32(a3 + 4 * i), s3)
    store_f32x16(c, s0)
    if num_rows > 1:
        store_f32x16(c + c_stride, s1)
    if num_rows > 2:
        store_f32x16(c + 2 * c_stride, s2)
    if num_rows > 3:
        store_f32x16(c + 3 * c_stride, s3)


@njit(**_FAST)
def _transpose(source, rows, columns, target):
    """float32 (rows, columns) -> (columns, rows); both multiples of 16."""
    for r in range(0, rows, 16):
        for c in range(0, columns, 16):
            for i in range(16):
                for j in range(16):
                    value = load_f32(source + 4 * ((r + i) * columns + c + j))
                    store_f32(target + 4 * ((c + j) * rows + r + i), value)


@njit(**_FAST)
def _hide(scores, first_position, key_position, count, num_rows, value):
    """Sets what belongs to keys behind a query's position, or behind the sequence: the score to the lowest, then the
    weight to 0, so that a later token leaves no trace, however small, in an earlier one."""
    for row in range(num_rows):
        visible = min(count, first_position + row - key_position + 1)
        for p in range(max(0, visible), PAGE_TOKENS):
            store_f32(scores + 256 * row + 4 * p, value)


@for_literals
def _load_page(dtype, page, row_bytes, count, latent, rows, columns):
    """The page as float32 rows (64, latent) and as 4 panels of columns (latent, 16); missing positions are zero."""
    for p in range(PAGE_TOKENS):
        for i in range(0, latent, 16):
            value = load_latent(dtype, page + p * row_bytes, i, latent) if p < count else zero_f32x16()
            store_f32x16(rows + 4 * (p * latent + i), value)
    for panel in range(4):
        for i in range(0, latent, 16):
            transpose_16x16(rows + 4 * (16 * panel * latent + i), 4 * latent, columns + 64 * (panel * latent + i))


def _prefill_kernel(dtype: str, value_bytes: int, scale_bytes: int):
    def prefill(args, thread, team):
        run, heads, nope = load_i64(args + _RUN), load_i64(args + _NUM_HEADS), load_i64(args + _NOPE)
        rope, kv_lora, value = load_i64(args + _ROPE), load_i64(args + _KV_LORA), load_i64(args + _VALUE)
        latent, q_stride, scale = kv_lora + rope, load_i64(args + _Q_STRIDE), splat_f32x16(load_f32(args + _SCALE))
        out, storage = load_i64(args + _OUT), load_i64(args + _STORAGE)
        row_bytes = latent * value_bytes + -(-latent // GROUP_VALUES) * scale_bytes
        out_stride = 4 * load_i64(out + NUM_VALUES)
        scores = thread_scratch(run, thread)
        w_uk = scores + _SCORES_BYTES  # (nope, kv_lora)
        w_uv = w_uk + 4 * nope * kv_lora  # (kv_lora, value)
        rows = w_uv + 4 * value * kv_lora  # (64, latent)
        columns = rows + 4 * PAGE_TOKENS * latent  # 4 x (latent, 16)
        keys = columns + 4 * PAGE_TOKENS * latent  # 4 x (nope, 16)
        values = keys + 4 * PAGE_TOKENS * nope  # (64, value)
        state = values + 4 * PAGE_TOKENS * value  # (T, value) context, then largest score and sum of each query
        task = next_task(team)
        while task < load_i64(run + NUM_EXPANDED) * heads:
            record, head = load_i64(run + EXPANDED) + RECORD_BYTES * (task // heads), task % heads
            token, length = load_i64(record + RECORD_TOKEN), load_i64(record + RECORD_LENGTH)
            start, pages = load_i64(record + RECORD_POSITION), load_i64(record + RECORD_PAGES)
            peaks = state + 4 * length * value
            stage = peaks + 8 * length
            matrix_values(load_i64(args + _K_B), head * kv_lora, kv_lora, stage)
            _transpose(stage, kv_lora, nope, w_uk)
            matrix_values(load_i64(args + _V_B), head * value, value, stage)
            _transpose(stage, value, kv_lora, w_uv)
            q = load_i64(args + _Q) + token * q_stride + 4 * head * (nope + rope)
            for t in range(length):
                angles, query = 2 * rope * (token + t), q + t * q_stride
                turned = query + 4 * nope
                rotate_pairs(turned, turned, load_i64(run + COS) + angles, load_i64(run + SIN) + angles, rope // 2)
                for i in range(0, 4 * (nope + rope), 64):
                    store_f32x16(query + i, load_f32x16(query + i) * scale)
                for i in range(0, 4 * value, 64):
                    store_f32x16(state + 4 * t * value + i, zero_f32x16())
                store_f32(peaks + 8 * t, types.float32(-np.inf))
                store_f32(peaks + 8 * t + 4, types.float32(0))
            end = start + length
            for n in range(-(-end // PAGE_TOKENS)):
                page = storage + load_i32(pages + 4 * n) * PAGE_TOKENS * row_bytes
                position = n * PAGE_TOKENS
                count = min(PAGE_TOKENS, end - position)
                _load_page(dtype, page, row_bytes, count, latent, rows, columns)
                for panel in range(4):
                    c = columns + 64 * panel * latent
                    for j in range(0, nope, 4):
                        _tile(
                            w_uk + 4 * j * kv_lora,
                            4 * kv_lora,
                            4,
                            c,
                            64,
                            kv_lora,
                            keys + 64 * (panel * nope + j),
                            64,
                            False,
                        )
                for p in range(0, PAGE_TOKENS, 4):
                    for j in range(0, value, 16):
                        at = values + 4 * (p * value + j)
                        _tile(
                            rows + 4 * p * latent, 4 * latent, 4, w_uv + 4 * j, 4 * value, kv_lora, at, 4 * value, False
                        )
                for t in range(max(0, position - start) // 4 * 4, length, 4):
                    queries = min(4, length - t)
                    query = q + t * q_stride
                    for panel in range(4):
                        at, k = scores + 64 * panel, keys + 64 * panel * nope
                        _tile(query, q_stride, queries, k, 64, nope, at, 256, False)
                        shared = columns + 64 * (panel * latent + kv_lora)
                        _tile(query + 4 * nope, q_stride, queries, shared, 64, rope, at, 256, True)
                    _hide(scores, start + t, position, count, queries, _LOWEST)
                    for i in range(queries):
                        at = peaks + 8 * (t + i)
                        peak, total, factor = softmax_block(scores + 256 * i, load_f32(at), load_f32(at + 4))
                        store_f32(at, peak)
                        store_f32(at + 4, total)
                        context = state + 4 * (t + i) * value
                        for j in range(0, 4 * value, 64):
                            store_f32x16(context + j, load_f32x16(context + j) * factor)
                    _hide(scores, start + t, position, count, queries, types.float32(0))
                    for j in range(0, value, 16):
                        at = state + 4 * (t * value + j)
                        _tile(scores, 256, queries, values + 4 * j, 4 * value, count, at, 4 * value, True)
            for t in range(length):
                target = load_i64(out + X_F32) + out_stride * (token + t) + 4 * head * value
                inverse = types.float32(1) / load_f32(peaks + 8 * t + 4)
                for i in range(0, 4 * value, 64):
                    store_f32x16(target + i, load_f32x16(state + 4 * t * value + i) * inverse)
            task = next_task(team)

    return prefill


@cache
def compiled_prefill(dtype: str):
    form = ROW_FORMS[dtype]
    return kernel(_prefill_kernel(dtype, form.value_bytes, form.scale_bytes))


def prefill_attention_op(
    run: RunTable,
    q: np.ndarray,
    k_b: Matrix,
    v_b: Matrix,
    storage: np.ndarray,
    out: Activations,
    shape: MlaShape,
    softmax_scale: float,
    dtype: str,
) -> Op:
    """Attention of one layer for the expanded sequences; arguments as `attention.attention_op`. Changes q in place."""
    assert all(size % 16 == 0 for size in shape[1:]), shape
    check_storage(storage, shape, dtype)
    kernel = compiled_prefill(dtype)
    return Op.of(kernel, run, q, q.strides[0], k_b, v_b, float(softmax_scale), *shape, storage, out)
