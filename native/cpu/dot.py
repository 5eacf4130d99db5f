"""Rows of quantized weights times one activation vector: the kernel that decoding spends its time in.

`rows_kernel(name)` compiles, for one GGUF type, a C function

    rows(weights, row_bytes, num_rows, activations, token, out)

that writes `num_rows` float32 dot products to `out`. Rows are taken in order: memory is then read as the hardware
prefetches best; four side by side measured 7.7 GB/s against 24 to 29 (tools/LOG.md). Rows of floats are taken four at a
time, for their activations crowd the cache, and so the next four are asked for in the order of memory. Shapes and the
meaning of `activations` are in `activations.py`.
"""

from functools import cache

from numba import types

from kimi_lite.native.calls import clear_bytes, copy_bytes, prefetch_far, prefetch_near, stack_512
from kimi_lite.native.cpu.activations import (
    KIND32,
    KIND256,
    NUM_VALUES,
    X_CODES,
    X_F32,
    X_MINUS16,
    X_SCALES,
    X_SUMS16,
    X_SUMS32,
)
from kimi_lite.native.cpu.blocks import dot8x32, dot256, load16
from kimi_lite.native.cpu.compiler import Kernel
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.simd import fma_f32x16, load_f32, load_f32x16, load_i64, store_f32, sum_f32x16, zero_f32x16
from kimi_lite.native.simd_dot import add_scaled, sum_row, zero_row

# 256 weights in about a cache line make rows too short for the hardware to find their pace; for others it needs no
# help.
_SHORT_BYTES, _AHEAD_BYTES = 72, 2048
ROWS_SIGNATURE = types.void(*[types.int64] * 6)


def _float_rows(name: str, block_size: int, weight_bytes: int):
    step, lines = 16 * weight_bytes, weight_bytes  # bytes of 16 weights; cache lines of 16 weights of four rows

    def rows(weights, row_bytes, num_rows, activations, token, out):
        k = load_i64(activations + NUM_VALUES)
        x, last = load_i64(activations + X_F32) + 4 * k * token, num_rows - 1
        for row in range(0, num_rows, 4):
            second, third, fourth = min(row + 1, last), min(row + 2, last), min(row + 3, last)
            w0, w1 = weights + row * row_bytes, weights + second * row_bytes
            w2, w3 = weights + third * row_bytes, weights + fourth * row_bytes
            acc0, acc1, acc2, acc3 = zero_f32x16(), zero_f32x16(), zero_f32x16(), zero_f32x16()
            ahead = w0 + 4 * row_bytes
            for i in range(k // 16):
                for line in range(lines):
                    prefetch_far(ahead + 4 * step * i + 64 * line)
                values, at = load_f32x16(x + 64 * i), step * i
                acc0 = fma_f32x16(load16(name, w0 + at), values, acc0)
                acc1 = fma_f32x16(load16(name, w1 + at), values, acc1)
                acc2 = fma_f32x16(load16(name, w2 + at), values, acc2)
                acc3 = fma_f32x16(load16(name, w3 + at), values, acc3)
            store_f32(out + 4 * row, sum_f32x16(acc0))
            store_f32(out + 4 * second, sum_f32x16(acc1))
            store_f32(out + 4 * third, sum_f32x16(acc2))
            store_f32(out + 4 * fourth, sum_f32x16(acc3))

    return rows


def _block32_rows(name: str, block_size: int, block_bytes: int):
    span_bytes = 256 // block_size * block_bytes

    def rows(weights, row_bytes, num_rows, activations, token, out):
        k = load_i64(activations + NUM_VALUES)
        spans = k // 256
        x = load_i64(activations + KIND32 + X_CODES) + k * token
        scales = load_i64(activations + KIND32 + X_SCALES) + k // 8 * token
        sums16 = load_i64(activations + KIND32 + X_SUMS16) + k // 4 * token
        sums32 = load_i64(activations + KIND32 + X_SUMS32) + k // 8 * token
        # Blocks that do not fill a span are followed by blocks of the next rows, times zero; behind the last rows by a
        # copy.
        stage, rest, num_direct, num_spans = stack_512(), (k - 256 * spans) // 32, 0, -(-k // 256)
        if rest > 0:
            clear_bytes(stage, 512)
            copy_bytes(stage, scales + 32 * spans, 4 * rest)
            copy_bytes(stage + 32, sums32 + 32 * spans, 4 * rest)
            copy_bytes(stage + 64, sums16 + 64 * spans, 8 * rest)
            num_direct = num_rows - (-(-span_bytes // row_bytes))
        for row in range(num_rows):
            w, acc = weights + row * row_bytes, zero_f32x16()
            for b in range(num_spans):
                if span_bytes <= _SHORT_BYTES:
                    prefetch_near(w + b * span_bytes + _AHEAD_BYTES)
                blocks, s, s16, s32 = w + b * span_bytes, scales + 32 * b, sums16 + 64 * b, sums32 + 32 * b
                if b == spans:
                    s, s16, s32 = stage, stage + 64, stage + 32
                    if row >= num_direct:
                        copy_bytes(stage + 128, blocks, 32 * rest // block_size * block_bytes)
                        blocks = stage + 128
                acc = acc + dot8x32(name, blocks, x + 256 * b, s, s16, s32)  # one call, so that it is inlined
            store_f32(out + 4 * row, sum_f32x16(acc))

    return rows


def _block256_rows(name: str, block_size: int, block_bytes: int):
    """One row at a time: memory is read in order, which the hardware prefetches best (tools/LOG.md)."""

    def rows(weights, row_bytes, num_rows, activations, token, out):
        k = load_i64(activations + NUM_VALUES)
        blocks = k // 256
        x = load_i64(activations + KIND256 + X_CODES) + k * token
        scales = load_i64(activations + KIND256 + X_SCALES) + 32 * blocks * token
        sums16 = load_i64(activations + KIND256 + X_SUMS16) + 64 * blocks * token
        sums32 = load_i64(activations + KIND256 + X_SUMS32) + 32 * blocks * token
        minus16 = load_i64(activations + KIND256 + X_MINUS16) + 32 * blocks * token
        for row in range(num_rows):
            w, acc = weights + row * row_bytes, zero_row()
            for b in range(blocks):
                if block_bytes <= _SHORT_BYTES:
                    prefetch_near(w + b * block_bytes + _AHEAD_BYTES)
                at = w + b * block_bytes
                values = dot256(name, at, x + 256 * b, sums16 + 64 * b, sums32 + 32 * b, minus16 + 32 * b)
                acc = add_scaled(acc, values, load_f32(scales + 32 * b))
            store_f32(out + 4 * row, sum_row(acc))

    return rows


_PRODUCTS = {"float": _float_rows, "block32": _block32_rows, "block256": _block256_rows}


@cache
def rows_kernel(name: str):
    """The compiled `rows` function of type `name` (its `.address` goes into programs); compiled once, cached on
    disk."""
    rows = _PRODUCTS[BY_NAME[name].product](name, BY_NAME[name].block_size, BY_NAME[name].block_bytes)
    return Kernel(rows, ROWS_SIGNATURE)
