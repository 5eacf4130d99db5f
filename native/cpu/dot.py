"""Rows of quantized weights times one activation vector: the kernel that decoding spends its time in.

`rows_kernel(name)` compiles, for one GGUF type, a C function

    rows(weights, row_bytes, num_rows, activations, token, out)

that writes `num_rows` float32 dot products to `out`. It reads every weight byte once and keeps the activations in
registers over four rows. Shapes and the meaning of `activations` are in `activations.py`.
"""

from functools import cache

from numba import cfunc, types

from native.cpu.activations import K_SLOT, KIND32, KIND256, X_CODES, X_F32, X_SCALES, X_SUMS16, X_SUMS32
from native.cpu.blocks import FORMATS, dot32, dot256, load16
from native.layouts import BY_NAME
from native.simd import (
    fma_f32x16,
    load_f32,
    load_f32x16,
    load_i64,
    splat_f32x16,
    store_f32,
    sum_f32x8,
    sum_f32x16,
    zero_f32x8,
    zero_f32x16,
)

ROWS_SIGNATURE = types.void(*[types.int64] * 6)
_FASTMATH = {"nsz", "contract"}  # NaN and infinity keep their meaning


def _float_rows(name: str, weight_bytes: int):
    step = 16 * weight_bytes

    def rows(weights, row_bytes, num_rows, activations, token, out):
        k = load_i64(activations + K_SLOT)
        x = load_i64(activations + X_F32) + 4 * k * token
        for row in range(num_rows):
            w = weights + row * row_bytes
            acc0, acc1, acc2, acc3 = zero_f32x16(), zero_f32x16(), zero_f32x16(), zero_f32x16()
            steps, i = k // 64, 0
            for _ in range(steps):
                acc0 = fma_f32x16(load16(name, w), load_f32x16(x + 64 * i), acc0)
                acc1 = fma_f32x16(load16(name, w + step), load_f32x16(x + 64 * i + 64), acc1)
                acc2 = fma_f32x16(load16(name, w + 2 * step), load_f32x16(x + 64 * i + 128), acc2)
                acc3 = fma_f32x16(load16(name, w + 3 * step), load_f32x16(x + 64 * i + 192), acc3)
                w += 4 * step
                i += 4
            for _ in range((k - 64 * steps) // 16):
                acc0 = fma_f32x16(load16(name, w), load_f32x16(x + 64 * i), acc0)
                w += step
                i += 1
            store_f32(out + 4 * row, sum_f32x16((acc0 + acc1) + (acc2 + acc3)))

    return rows


def _block32_rows(name: str, block_bytes: int):
    def rows(weights, row_bytes, num_rows, activations, token, out):
        k = load_i64(activations + K_SLOT)
        blocks = k // 32
        x = load_i64(activations + KIND32 + X_CODES) + k * token
        scales = load_i64(activations + KIND32 + X_SCALES) + 4 * blocks * token
        sums = load_i64(activations + KIND32 + X_SUMS32) + 4 * blocks * token
        row = 0
        while row + 4 <= num_rows:
            w0 = weights + row * row_bytes
            w1, w2, w3 = w0 + row_bytes, w0 + 2 * row_bytes, w0 + 3 * row_bytes
            a0, a1, a2, a3 = zero_f32x8(), zero_f32x8(), zero_f32x8(), zero_f32x8()
            c0, c1, c2, c3 = types.float32(0), types.float32(0), types.float32(0), types.float32(0)
            for b in range(blocks):
                at, xb = b * block_bytes, x + 32 * b
                scale, total = load_f32(scales + 4 * b), load_f32(sums + 4 * b)
                a0, c0 = dot32(name, w0 + at, xb, scale, total, a0, c0)
                a1, c1 = dot32(name, w1 + at, xb, scale, total, a1, c1)
                a2, c2 = dot32(name, w2 + at, xb, scale, total, a2, c2)
                a3, c3 = dot32(name, w3 + at, xb, scale, total, a3, c3)
            store_f32(out + 4 * row, sum_f32x8(a0) + c0)
            store_f32(out + 4 * row + 4, sum_f32x8(a1) + c1)
            store_f32(out + 4 * row + 8, sum_f32x8(a2) + c2)
            store_f32(out + 4 * row + 12, sum_f32x8(a3) + c3)
            row += 4
        while row < num_rows:
            w, acc, correction = weights + row * row_bytes, zero_f32x8(), types.float32(0)
            for b in range(blocks):
                scale, total = load_f32(scales + 4 * b), load_f32(sums + 4 * b)
                acc, correction = dot32(name, w + b * block_bytes, x + 32 * b, scale, total, acc, correction)
            store_f32(out + 4 * row, sum_f32x8(acc) + correction)
            row += 1

    return rows


def _block256_rows(name: str, block_bytes: int):
    def rows(weights, row_bytes, num_rows, activations, token, out):
        k = load_i64(activations + K_SLOT)
        blocks = k // 256
        x = load_i64(activations + KIND256 + X_CODES) + k * token
        scales = load_i64(activations + KIND256 + X_SCALES) + 32 * blocks * token
        sums16 = load_i64(activations + KIND256 + X_SUMS16) + 64 * blocks * token
        sums32 = load_i64(activations + KIND256 + X_SUMS32) + 32 * blocks * token
        row = 0
        while row + 4 <= num_rows:
            w0 = weights + row * row_bytes
            w1, w2, w3 = w0 + row_bytes, w0 + 2 * row_bytes, w0 + 3 * row_bytes
            a0, a1, a2, a3 = zero_f32x16(), zero_f32x16(), zero_f32x16(), zero_f32x16()
            for b in range(blocks):
                at, xb, s16, s32 = b * block_bytes, x + 256 * b, sums16 + 64 * b, sums32 + 32 * b
                scale = splat_f32x16(load_f32(scales + 32 * b))
                a0 = fma_f32x16(dot256(name, w0 + at, xb, s16, s32), scale, a0)
                a1 = fma_f32x16(dot256(name, w1 + at, xb, s16, s32), scale, a1)
                a2 = fma_f32x16(dot256(name, w2 + at, xb, s16, s32), scale, a2)
                a3 = fma_f32x16(dot256(name, w3 + at, xb, s16, s32), scale, a3)
            store_f32(out + 4 * row, sum_f32x16(a0))
            store_f32(out + 4 * row + 4, sum_f32x16(a1))
            store_f32(out + 4 * row + 8, sum_f32x16(a2))
            store_f32(out + 4 * row + 12, sum_f32x16(a3))
            row += 4
        while row < num_rows:
            w, acc = weights + row * row_bytes, zero_f32x16()
            for b in range(blocks):
                values = dot256(name, w + b * block_bytes, x + 256 * b, sums16 + 64 * b, sums32 + 32 * b)
                acc = fma_f32x16(values, splat_f32x16(load_f32(scales + 32 * b)), acc)
            store_f32(out + 4 * row, sum_f32x16(acc))
            row += 1

    return rows


_FAMILIES = {"float": _float_rows, "block32": _block32_rows, "block256": _block256_rows}


@cache
def rows_kernel(name: str):
    """The compiled `rows` function of type `name` (its `.address` goes into programs); compiled once, cached on disk."""
    rows = _FAMILIES[FORMATS[name].family](name, BY_NAME[name].block_bytes)
    return cfunc(ROWS_SIGNATURE, cache=True, fastmath=_FASTMATH, error_model="numpy")(rows)
