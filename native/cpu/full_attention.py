"""Attention of every row to every row of an item: a vision tower's. Queries, keys and values of each head are packed
once, then blocks of queries go over blocks of keys with an online softmax (FlashAttention, arXiv 2205.14135), so the
scores of a block are all that is ever in memory.

    split_op        rotates queries and keys (RoPE) and packs what a product left as rows of [q | k | v]
    attention_op    context of every head
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from kimi_lite.native.cpu.activations import aligned_zeros
from kimi_lite.native.cpu.compiler import FASTMATH, kernel
from kimi_lite.native.cpu.dense import Span, round_up, span_count, span_first, span_scratch
from kimi_lite.native.cpu.dense_tiles import TILE_ROWS, TILE_VECTORS, float_tile
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.cpu.threads import next_task
from kimi_lite.native.cpu.vector_math import exp_f32x16
from kimi_lite.native.simd import (
    fma_f32x16,
    largest_f32x16,
    load_f32,
    load_f32x16,
    load_i64,
    max_f32x16,
    splat_f32x16,
    store_f32,
    store_f32x16,
    sum_f32x16,
    transpose_16x16,
    zero_f32x16,
)
from kimi_lite.native.vectors import f32x16, shuffler

_FAST = {"fastmath": FASTMATH, "error_model": "numpy"}
BLOCK_KEYS = 128  # of a block
TASK_QUERIES = 96  # of a task
_ROW_MULTIPLE = 384  # holds whole blocks of keys and whole tiles of queries
LOWEST = types.float32(-1e30)
_swap_pairs = shuffler(f32x16, f32x16, [lane ^ 1 for lane in range(16)])


class Heads(NamedTuple):
    """float32 queries (H, capacity, W), keys (H, capacity / 16, W, 16), values (H, capacity, W); W is the size of a
    head rounded up to 16."""

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    head_dim: int

    @classmethod
    def make(cls, num_rows: int, num_heads: int, head_dim: int) -> "Heads":
        capacity, width = round_up(num_rows, _ROW_MULTIPLE), round_up(head_dim, 16)
        flat = (num_heads, capacity, width)
        panels = (num_heads, capacity // 16, width, 16)
        return cls(
            aligned_zeros(flat, np.float32),
            aligned_zeros(panels, np.float32),
            aligned_zeros(flat, np.float32),
            head_dim,
        )

    @property
    def width(self) -> int:
        return self.queries.shape[2]

    @staticmethod
    def bytes_for(num_rows: int, num_heads: int, head_dim: int) -> int:
        """What `make` allocates."""
        return 3 * 4 * num_heads * round_up(num_rows, _ROW_MULTIPLE) * round_up(head_dim, 16)


def attention_scratch_bytes(head_dim: int) -> int:
    """A thread's: scores of a tile, state of a task's queries."""
    return 4 * (TILE_ROWS * BLOCK_KEYS + TASK_QUERIES * (round_up(head_dim, 16) + 16)) + 4096


# Splitting ------------------------------------------------------------------------------------------------------------


@njit(**_FAST)
def turn_row(x, cos, sin, width, scale, out):
    """out = x with its pairs turned by their angles, times scale; zeros where both tables are."""
    for i in range(0, 4 * width, 64):
        value = load_f32x16(x + i)
        turned = fma_f32x16(_swap_pairs(value), load_f32x16(sin + i), value * load_f32x16(cos + i))
        store_f32x16(out + i, turned * scale)


@kernel
def _split_kernel(args, thread, team):
    span, qkv, stride, cos, sin = (
        load_i64(args),
        load_i64(args + 8),
        load_i64(args + 16),
        load_i64(args + 24),
        load_i64(args + 32),
    )
    queries, keys, values, heads = load_i64(args + 40), load_i64(args + 48), load_i64(args + 56), load_i64(args + 64)
    head_dim, width, capacity = load_i64(args + 72), load_i64(args + 80), load_i64(args + 88)
    scale, one = splat_f32x16(load_f32(args + 96)), splat_f32x16(types.float32(1))
    first, count, stage = span_first(span), span_count(span), span_scratch(span, thread)
    task = next_task(team)
    while task < -(-count // 16):
        rows = min(16, count - 16 * task)
        for head in range(heads):
            for i in range(0, 64 * width, 64):
                store_f32x16(stage + i, zero_f32x16())
            for r in range(rows):
                row, at = first + 16 * task + r, qkv + (16 * task + r) * stride + 4 * head * head_dim
                c, s = cos + 4 * row * width, sin + 4 * row * width
                place = 4 * (head * capacity + row) * width
                turn_row(at, c, s, width, scale, queries + place)
                turn_row(at + 4 * heads * head_dim, c, s, width, one, stage + 4 * r * width)
                for i in range(0, 4 * width, 64):
                    store_f32x16(values + place + i, load_f32x16(at + 8 * heads * head_dim + i))
            panel = keys + 64 * width * ((head * capacity + first) // 16 + task)
            for i in range(0, width, 16):
                transpose_16x16(stage + 4 * i, 4 * width, panel + 64 * i)
        task = next_task(team)


def split_op(span: Span, qkv: np.ndarray, num_heads: int, cos: np.ndarray, sin: np.ndarray, heads: Heads) -> Op:
    """Rows `first ..` of `heads` from rows 0 .. of qkv, float32 (chunk, >= 3 H d), 64 readable bytes behind them.

    cos, sin: float32 (capacity, W), of each value's pair; sin is negative for the first of a pair, both are zero from d
    on. `first` is a multiple of 16.
    """
    width, capacity = heads.width, heads.queries.shape[1]
    assert cos.shape[1] == sin.shape[1] == width and cos.dtype == sin.dtype == np.float32, (cos.shape, cos.dtype)
    arrays = (qkv, qkv.strides[0], cos, sin, heads.queries, heads.keys, heads.values)
    return Op.of(_split_kernel, span, *arrays, num_heads, heads.head_dim, width, capacity, float(heads.head_dim**-0.5))


# Attention ------------------------------------------------------------------------------------------------------------


@njit(**_FAST)
def _softmax_row(scores, peak):
    """Scores of a block become e^(score - new peak); returns (new peak, their sum)."""
    largest = load_f32x16(scores)
    for i in range(64, 4 * BLOCK_KEYS, 64):
        largest = max_f32x16(largest, load_f32x16(scores + i))
    new_peak = max(peak, largest_f32x16(largest))
    shift, total = splat_f32x16(new_peak), zero_f32x16()
    for i in range(0, 4 * BLOCK_KEYS, 64):
        weight = exp_f32x16(load_f32x16(scores + i) - shift)
        store_f32x16(scores + i, weight)
        total = total + weight
    return new_peak, sum_f32x16(total)


@njit(**_FAST)
def store_context(context, total, target, head_dim):
    """target = context / total, float32 (head_dim,)."""
    inverse = types.float32(1) / total
    for i in range(0, head_dim // 16 * 64, 64):
        store_f32x16(target + i, load_f32x16(context + i) * splat_f32x16(inverse))
    for i in range(head_dim // 16 * 16, head_dim):
        store_f32(target + 4 * i, load_f32(context + 4 * i) * inverse)


def _score_block(vectors, query, keys, width, head_dim, scores):
    """scores (TILE_ROWS, BLOCK_KEYS) of a tile of queries and a block of keys."""


@overload(_score_block, prefer_literal=True)
def _choose_score_block(vectors, query, keys, width, head_dim, scores):
    tile = float_tile("F32", TILE_VECTORS, TILE_ROWS, False)

    def score_block(vectors, query, keys, width, head_dim, scores):
        for panel in range(0, BLOCK_KEYS // 16, TILE_VECTORS):
            at = keys + 64 * width * panel
            tile(at, 64, 64 * width, query, 4 * width, head_dim, scores + 64 * panel, 4 * BLOCK_KEYS)

    return score_block


def _add_values(vectors, weights, values, width, num_keys, state):
    """state (TILE_ROWS, W) += weights (TILE_ROWS, BLOCK_KEYS) @ values (num_keys, W)."""


@overload(_add_values, prefer_literal=True)
def _choose_add_values(vectors, weights, values, width, num_keys, state):
    count = vectors.literal_value
    most = max(1, TILE_VECTORS * TILE_ROWS // count)
    rows = max(divisor for divisor in range(1, TILE_ROWS + 1) if TILE_ROWS % divisor == 0 and divisor <= most)
    tile = float_tile("F32", count, rows, True)

    def add_values(vectors, weights, values, width, num_keys, state):
        for row in range(0, TILE_ROWS, rows):
            at = state + 4 * width * row
            tile(values, 4 * width, 64, weights + 4 * BLOCK_KEYS * row, 4 * BLOCK_KEYS, num_keys, at, 4 * width)

    return add_values


@cache
def _attention_kernel(vectors: int):
    """Of heads whose width is `vectors` registers."""

    def attend(args, thread, team):
        span, queries, keys, values = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
        heads, head_dim, capacity = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
        out, stride, width, count = load_i64(args + 56), load_i64(args + 64), 16 * vectors, span_count(span)
        scores = span_scratch(span, thread)
        state = scores + 4 * TILE_ROWS * BLOCK_KEYS
        peaks = state + 4 * TASK_QUERIES * width  # largest score and sum of each query
        num_blocks = -(-count // TASK_QUERIES)
        task = next_task(team)
        while task < heads * num_blocks:
            head, first = task // num_blocks, task % num_blocks * TASK_QUERIES
            rows = min(TASK_QUERIES, count - first)
            query = queries + 4 * width * (head * capacity + first)
            for i in range(0, 4 * TASK_QUERIES * width, 64):
                store_f32x16(state + i, zero_f32x16())
            for row in range(TASK_QUERIES):
                store_f32(peaks + 8 * row, LOWEST)
                store_f32(peaks + 8 * row + 4, types.float32(0))
            for key in range(0, count, BLOCK_KEYS):
                num_keys = min(BLOCK_KEYS, count - key)
                for row in range(0, rows, TILE_ROWS):
                    at = keys + 4 * width * (head * capacity + key)
                    _score_block(vectors, query + 4 * width * row, at, width, head_dim, scores)
                    for r in range(TILE_ROWS):
                        line, place = scores + 4 * BLOCK_KEYS * r, peaks + 8 * (row + r)
                        for i in range(num_keys, BLOCK_KEYS):
                            store_f32(line + 4 * i, LOWEST)
                        before = load_f32(place)
                        peak, total = _softmax_row(line, before)
                        factor = np.exp(before - peak)
                        store_f32(place, peak)
                        store_f32(place + 4, load_f32(place + 4) * factor + total)
                        for i in range(0, 4 * width, 64):
                            context = state + 4 * width * (row + r) + i
                            store_f32x16(context, load_f32x16(context) * splat_f32x16(factor))
                    at = values + 4 * width * (head * capacity + key)
                    _add_values(vectors, scores, at, width, num_keys, state + 4 * width * row)
            for row in range(rows):
                target = out + (first + row) * stride + 4 * head * head_dim
                store_context(state + 4 * width * row, load_f32(peaks + 8 * row + 4), target, head_dim)
            task = next_task(team)

    return kernel(attend)


def full_attention_op(span: Span, heads: Heads, out: np.ndarray) -> Op:
    """out[row, head * d :] = the context of all `count` rows of the span, which begins at 0. out: float32 (>= count, >=
    H d)."""
    queries, keys, values, head_dim = heads
    num_heads, capacity, width = queries.shape
    assert out.dtype == np.float32 and out.shape[1] >= num_heads * head_dim, (out.dtype, out.shape, queries.shape)
    sizes = (num_heads, head_dim, capacity)
    return Op.of(_attention_kernel(width // 16), span, queries, keys, values, *sizes, out, out.strides[0])
