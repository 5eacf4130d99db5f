"""Full attention in int8, for towers whose matrices are int8 too: what `full_attention` does in float32.

Queries and keys are rounded row by row, values column by column of a block of keys. Weights of a block are rounded to
unsigned bytes against the block's own largest score, so that what a block loses is small against what it adds
(SageAttention, arXiv 2410.02367, rounds queries and keys so); sums are float32.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from kimi_lite.native.cpu.activations import aligned_zeros
from kimi_lite.native.cpu.compiler import FASTMATH, kernel
from kimi_lite.native.cpu.dense import Span, quantize_row, round_up, span_count, span_first, span_scratch
from kimi_lite.native.cpu.dense_tiles import GROUP, TILE_ROWS, TILE_VECTORS, byte_score_tile, byte_value_tile
from kimi_lite.native.cpu.full_attention import BLOCK_KEYS, LOWEST, TASK_QUERIES, store_context, turn_row
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.cpu.threads import next_task
from kimi_lite.native.cpu.vector_math import exp_f32x16
from kimi_lite.native.simd import (
    divide_f32x16,
    f32_bits,
    f32_from_bits,
    f32_to_i32x16,
    largest_f32x16,
    load_f32,
    load_f32x16,
    load_i8x64,
    load_i64,
    max_f32x16,
    max_i32x16,
    narrow_i32x16,
    round_f32x16,
    splat_f32x16,
    store_f32,
    store_f32x16,
    store_i8x16,
    store_i32x16,
    sum_f32x16,
    transpose_16x16,
    transpose_biased,
    zero_f32x16,
    zero_i32x16,
)
from kimi_lite.native.simd_dot import HAS_FULL_UNSIGNED_DOT, MAX_UNSIGNED, dot_u8x64
from kimi_lite.native.vectors import i8x64, maker

_FAST = {"fastmath": FASTMATH, "error_model": "numpy"}
MAX_HEAD = GROUP  # values of a head whose queries have one scale
_WORDS = BLOCK_KEYS // 4
_STARTS_BIAS = -128 if HAS_FULL_UNSIGNED_DOT else 0
_ones = maker(i8x64, 1)


class ByteHeads(NamedTuple):
    """Codes and scales of every row: queries (H, capacity, 128) and a scale a row; keys in panels (H, capacity / 16,
    words, 16, 4), a scale and a start a row; values (H, blocks, 32, W, 4), W scales a block."""

    queries: np.ndarray
    query_scales: np.ndarray
    keys: np.ndarray
    key_scales: np.ndarray
    key_starts: np.ndarray
    values: np.ndarray
    value_scales: np.ndarray
    head_dim: int

    @classmethod
    def make(cls, num_rows: int, num_heads: int, head_dim: int) -> "ByteHeads":
        assert head_dim <= MAX_HEAD, head_dim
        capacity, width = round_up(num_rows, 3 * BLOCK_KEYS), round_up(head_dim, 16)
        rows, blocks = (num_heads, capacity), capacity // BLOCK_KEYS
        return cls(
            aligned_zeros((*rows, GROUP), np.uint8),
            aligned_zeros(rows, np.float32),
            aligned_zeros((num_heads, capacity // 16, round_up(width // 4, 16), 16, 4), np.int8),
            aligned_zeros(rows, np.float32),
            aligned_zeros(rows, np.int32),
            aligned_zeros((num_heads, blocks, _WORDS, width, 4), np.int8),
            aligned_zeros((num_heads, blocks, width), np.float32),
            head_dim,
        )

    @property
    def width(self) -> int:
        return self.values.shape[3]


def byte_attention_scratch_bytes(head_dim: int) -> int:
    """A thread's: scores and weights of a tile, state of a task's queries; or a panel of keys and scales of values."""
    width = round_up(head_dim, 16)
    return TILE_ROWS * (5 * BLOCK_KEYS + 64) + 4 * TASK_QUERIES * (width + 16) + 32 * GROUP + 16 * width + 4096


@njit(**_FAST)
def _pack_values(x, stride, rows, width, codes, scales, inverses):
    """A block of values, float32 rows at x: codes (32, W, 4), a scale for each of W columns."""
    for i in range(0, 4 * width, 64):
        largest = zero_i32x16()
        for row in range(rows):
            largest = max_i32x16(largest, f32_bits(load_f32x16(x + row * stride + i)) & 0x7FFFFFFF)
        peak = f32_from_bits(largest)
        store_f32x16(scales + i, peak * (1 / 127))
        smallest = splat_f32x16(types.float32(1e-30))
        store_f32x16(inverses + i, divide_f32x16(splat_f32x16(types.float32(127)), max_f32x16(peak, smallest)))
    for word in range(-(-rows // 4)):
        for i in range(0, 4 * width, 64):
            inverse, joined = load_f32x16(inverses + i), zero_i32x16()
            for key in range(4):
                row = 4 * word + key
                if row < rows:
                    value = round_f32x16(load_f32x16(x + row * stride + i) * inverse)
                    joined = joined | ((f32_to_i32x16(value) & 255) << (8 * key))
            store_i32x16(codes + 4 * width * word + i, joined)


@njit(**_FAST)
def _pack_keys(stage, panel, starts, num_words):
    """16 quantized keys, 128 bytes each, as a panel; starts: int32, what makes up for the queries' bias."""
    for i in range(0, num_words, 16):
        if HAS_FULL_UNSIGNED_DOT:
            transpose_biased(stage + 4 * i, GROUP, panel + 64 * i, 128)
        else:
            transpose_16x16(stage + 4 * i, GROUP, panel + 64 * i)
    total = zero_i32x16()
    for i in range(num_words):
        total = dot_u8x64(total, _ones(), load_i8x64(panel + 64 * i))
    store_i32x16(starts, total * _STARTS_BIAS)


@kernel
def _split_kernel(args, thread, team):
    span, qkv, stride, cos = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
    sin, heads, head_dim, width = (
        load_i64(args + 32),
        load_i64(args + 40),
        load_i64(args + 48),
        load_i64(args + 56),
    )
    capacity, scale = load_i64(args + 64), splat_f32x16(load_f32(args + 72))
    queries, query_scales, keys, key_scales = (
        load_i64(args + 80),
        load_i64(args + 88),
        load_i64(args + 96),
        load_i64(args + 104),
    )
    key_starts, values, value_scales = load_i64(args + 112), load_i64(args + 120), load_i64(args + 128)
    first, count, stage = span_first(span), span_count(span), span_scratch(span, thread)
    turned, inverses = stage + 16 * GROUP, stage + 16 * GROUP + 4 * GROUP
    one, num_words = splat_f32x16(types.float32(1)), -(-width // 64) * 16
    num_blocks = -(-count // BLOCK_KEYS)
    task = next_task(team)
    while task < heads * num_blocks:
        head, begin = task // num_blocks, task % num_blocks * BLOCK_KEYS
        rows = min(BLOCK_KEYS, count - begin)
        source = qkv + begin * stride + 4 * head * head_dim
        for panel in range(-(-rows // 16)):
            for i in range(0, 16 * GROUP, 64):
                store_f32x16(stage + i, zero_f32x16())
            place = head * capacity + first + begin + 16 * panel
            for r in range(min(16, rows - 16 * panel)):
                at = source + (16 * panel + r) * stride
                row = first + begin + 16 * panel + r
                c, s = cos + 4 * row * width, sin + 4 * row * width
                turn_row(at, c, s, width, scale, turned)
                quantize_row(turned, width, queries + GROUP * (place + r), query_scales + 4 * (place + r))
                turn_row(at + 4 * heads * head_dim, c, s, width, one, turned)
                quantize_row(turned, width, stage + GROUP * r, key_scales + 4 * (place + r))
            _pack_keys(stage, keys + 4 * num_words * place, key_starts + 4 * place, num_words)
        block = head * (capacity // BLOCK_KEYS) + (first + begin) // BLOCK_KEYS
        at = values + BLOCK_KEYS * width * block
        _pack_values(source + 8 * heads * head_dim, stride, rows, width, at, value_scales + 4 * width * block, inverses)
        task = next_task(team)


def byte_split_op(
    span: Span, qkv: np.ndarray, num_heads: int, cos: np.ndarray, sin: np.ndarray, heads: ByteHeads
) -> Op:
    """As `native.cpu.full_attention.split_op`; `first` is a multiple of BLOCK_KEYS."""
    width, capacity = heads.width, heads.queries.shape[1]
    assert cos.shape[1] == sin.shape[1] == width and cos.dtype == sin.dtype == np.float32, (cos.shape, cos.dtype)
    sizes = (num_heads, heads.head_dim, width, capacity, float(heads.head_dim**-0.5))
    return Op.of(_split_kernel, span, qkv, qkv.strides[0], cos, sin, *sizes, *heads[:7])


def _score_block(vectors, queries, query_scales, keys, key_bytes, scales, starts, words, scores):
    """scores (TILE_ROWS, BLOCK_KEYS) of a tile of queries and a block of keys."""


@overload(_score_block, prefer_literal=True)
def _choose_score_block(vectors, queries, query_scales, keys, key_bytes, scales, starts, words, scores):
    tile = byte_score_tile(TILE_VECTORS, TILE_ROWS)

    def score_block(vectors, queries, query_scales, keys, key_bytes, scales, starts, words, scores):
        for panel in range(0, BLOCK_KEYS // 16, TILE_VECTORS):
            at, of_panel = keys + key_bytes * panel, 64 * panel
            of_keys, begin, out = scales + of_panel, starts + of_panel, scores + of_panel
            tile(at, key_bytes, of_keys, begin, queries, GROUP, query_scales, words, out, 4 * BLOCK_KEYS)

    return score_block


def _add_values(vectors, weights, factors, values, scales, words, state):
    """state (TILE_ROWS, W) += factors * weights (TILE_ROWS, BLOCK_KEYS) @ values."""


@overload(_add_values, prefer_literal=True)
def _choose_add_values(vectors, weights, factors, values, scales, words, state):
    count = vectors.literal_value
    most = max(1, TILE_VECTORS * TILE_ROWS // count)
    rows = max(divisor for divisor in range(1, TILE_ROWS + 1) if TILE_ROWS % divisor == 0 and divisor <= most)
    tile, width = byte_value_tile(count, rows), 16 * count

    def add_values(vectors, weights, factors, values, scales, words, state):
        for row in range(0, TILE_ROWS, rows):
            x, of_rows, out = weights + BLOCK_KEYS * row, factors + 4 * row, state + 4 * width * row
            tile(values, scales, x, BLOCK_KEYS, of_rows, 4, words, out, 4 * width)

    return add_values


@njit(**_FAST)
def _weigh_row(scores, codes):
    """Scores of a block become bytes, MAX_UNSIGNED for the largest; returns (the largest score, the sum of bytes)."""
    largest = load_f32x16(scores)
    for i in range(64, 4 * BLOCK_KEYS, 64):
        largest = max_f32x16(largest, load_f32x16(scores + i))
    peak = largest_f32x16(largest)
    shift, total = splat_f32x16(peak), zero_f32x16()
    for i in range(0, BLOCK_KEYS, 16):
        weight = round_f32x16(exp_f32x16(load_f32x16(scores + 4 * i) - shift) * MAX_UNSIGNED)
        store_i8x16(codes + i, narrow_i32x16(f32_to_i32x16(weight)))
        total = total + weight
    return peak, sum_f32x16(total)


@cache
def _attention_kernel(vectors: int):
    """Of heads whose width is `vectors` registers."""

    def attend(args, thread, team):
        span, heads, head_dim, capacity = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
        out, stride, key_bytes = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
        queries, query_scales = load_i64(args + 56), load_i64(args + 64)
        keys, key_scales, key_starts = load_i64(args + 72), load_i64(args + 80), load_i64(args + 88)
        values, value_scales = load_i64(args + 96), load_i64(args + 104)
        width, count, words = 16 * vectors, span_count(span), -(-head_dim // 4)
        scores = span_scratch(span, thread)
        codes = scores + 4 * TILE_ROWS * BLOCK_KEYS
        factors = codes + TILE_ROWS * BLOCK_KEYS
        state = factors + 64 * TILE_ROWS
        peaks = state + 4 * TASK_QUERIES * width  # largest score and sum of each query
        num_blocks = -(-count // TASK_QUERIES)
        task = next_task(team)
        while task < heads * num_blocks:
            head, first = task // num_blocks, task % num_blocks * TASK_QUERIES
            rows = min(TASK_QUERIES, count - first)
            for i in range(0, 4 * TASK_QUERIES * width, 64):
                store_f32x16(state + i, zero_f32x16())
            for row in range(TASK_QUERIES):
                store_f32(peaks + 8 * row, LOWEST)
                store_f32(peaks + 8 * row + 4, types.float32(0))
            for key in range(0, count, BLOCK_KEYS):
                num_keys, place = min(BLOCK_KEYS, count - key), head * capacity + key
                panel, of_keys, begin = keys + key_bytes * (place // 16), key_scales + 4 * place, key_starts + 4 * place
                block = place // BLOCK_KEYS
                for row in range(0, rows, TILE_ROWS):
                    query = head * capacity + first + row
                    of_rows = query_scales + 4 * query
                    line = queries + GROUP * query
                    _score_block(vectors, line, of_rows, panel, key_bytes, of_keys, begin, words, scores)
                    for r in range(TILE_ROWS):
                        line, at = scores + 4 * BLOCK_KEYS * r, peaks + 8 * (row + r)
                        for i in range(num_keys, BLOCK_KEYS):
                            store_f32(line + 4 * i, LOWEST)
                        before, total = load_f32(at), load_f32(at + 4)
                        largest, added = _weigh_row(line, codes + BLOCK_KEYS * r)
                        peak = max(before, largest)
                        factor = np.exp(largest - peak) / types.float32(MAX_UNSIGNED)
                        store_f32(factors + 4 * r, factor)
                        store_f32(at, peak)
                        correction = np.exp(before - peak)
                        store_f32(at + 4, total * correction + added * factor)
                        if correction != 1:
                            for i in range(0, 4 * width, 64):
                                context = state + 4 * width * (row + r) + i
                                store_f32x16(context, load_f32x16(context) * splat_f32x16(correction))
                    at, of_values = values + BLOCK_KEYS * width * block, value_scales + 4 * width * block
                    target = state + 4 * width * row
                    _add_values(vectors, codes, factors, at, of_values, -(-num_keys // 4), target)
            for row in range(rows):
                target = out + (first + row) * stride + 4 * head * head_dim
                store_context(state + 4 * width * row, load_f32(peaks + 8 * row + 4), target, head_dim)
            task = next_task(team)

    return kernel(attend)


def byte_attention_op(span: Span, heads: ByteHeads, out: np.ndarray) -> Op:
    """As `native.cpu.full_attention.full_attention_op`."""
    num_heads, capacity = heads.queries.shape[:2]
    assert out.dtype == np.float32 and out.shape[1] >= num_heads * heads.head_dim, (out.dtype, out.shape)
    sizes = (num_heads, heads.head_dim, capacity, out, out.strides[0], heads.keys.strides[1])
    return Op.of(_attention_kernel(heads.width // 16), span, *sizes, *heads[:7])
