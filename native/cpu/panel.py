"""Quantized weights times many tokens: unpack 16 rows once into a panel, then multiply it with every token.

A panel holds 16 weight rows side by side, so that one vector lane belongs to one row:

    codes   (K / 4, 16, 4) int8, or float32 (K, 16) for the float types
    scales  (K / group, 16) float32
    minima  (K / group, 16) float32          weight = code * scale - minimum

`panel_kernel(name)` unpacks a type into it; what multiplies it (`gemm_kernel`) depends only on the kind of activations,
the group size and the signedness, so all types share a few products.

    panel(weights, row_bytes, num_rows <= 16, k, panel)
    gemm(panel, activations, tokens, num_tokens, out, out_stride_bytes, mode)

`tokens`: int32 numbers of the activation rows; output i goes to `out + i * out_stride`; mode = number of rows, plus
ADD to add to what is there.
"""

from functools import cache

from numba import njit, types
from numba.extending import overload

from kimi_lite.native.cpu.activations import KINDS, NUM_VALUES, X_CODES, X_F32, X_SCALES, X_SUMS16, X_SUMS32
from kimi_lite.native.cpu.blocks import activation_kind, load16, row_scale, unpack
from kimi_lite.native.cpu.compiler import FASTMATH, Kernel
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.simd import (
    broadcast_f32,
    broadcast_i8x4,
    fma_f32x16,
    int_to_f32x16,
    lane_f32x16,
    load_f32,
    load_f32x16,
    load_i8x64,
    load_i32,
    load_i64,
    splat_f32x16,
    store_f32,
    store_f32x16,
    transpose_16x8,
    transpose_16x16,
    transpose_signed,
    zero_f32x16,
    zero_i32x16,
)
from kimi_lite.native.simd_dot import HAS_FULL_UNSIGNED_DOT, dot_i8x64, dot_u8x64

PANEL_SIGNATURE, GEMM_SIGNATURE = types.void(*[types.int64] * 5), types.void(*[types.int64] * 7)
PANEL_ROWS, ADD = 16, 256
_STAGE_BYTES = 8192  # 16 rows x 256 codes, then 16 x 16 scales and minima; or 16 x 16 floats


def panel_bytes(k: int) -> int:
    """Bytes of scratch that a panel of K columns takes, whatever its type: staging area, codes or floats, scales,
    minima."""
    columns = -(-k // 256) * 256
    return _STAGE_BYTES + 64 * columns + 2 * 64 * (columns // 16)


@njit
def _codes_at(panel):
    return panel + _STAGE_BYTES


@njit
def _scales_at(panel, k):
    return panel + _STAGE_BYTES + 16 * (-(-k // 256) * 256)


@njit
def _minima_at(panel, k, group):
    columns = -(-k // 256) * 256
    return panel + _STAGE_BYTES + 16 * columns + 64 * (columns // group)


# Unpacking ------------------------------------------------------------------------------------------------------------


def _float_panel(name: str, weight_bytes: int):
    def panel(weights, row_bytes, num_rows, k, panel):
        for column in range(0, k, 16):
            for row in range(num_rows):
                store_f32x16(panel + 64 * row, load16(name, weights + row * row_bytes + column * weight_bytes))
            transpose_16x16(panel, 64, _codes_at(panel) + 64 * column)

    return panel


def _block_panel(name: str, block_size: int, block_bytes: int, group: int, is_biased: bool):
    groups, header_bytes = 256 // group, BY_NAME[name].header_bytes

    def panel(weights, row_bytes, num_rows, k, panel):
        stage_scales, stage_minima = panel + 4096, panel + 4096 + 1024
        codes, scales, minima = _codes_at(panel), _scales_at(panel, k), _minima_at(panel, k, group)
        for column in range(0, k, 256):
            blocks = min(256, k - column) // block_size
            for row in range(num_rows):
                start = weights + row * row_bytes
                block = start + header_bytes + column // block_size * block_bytes
                for b in range(blocks):
                    at = b * block_size
                    to_scale, to_minimum = stage_scales + 64 * row, stage_minima + 64 * row
                    first = 4 * (at // group)
                    unpack(name, block + b * block_bytes, panel + 256 * row + at, to_scale + first, to_minimum + first)
                if header_bytes > 0:
                    for g in range(groups):
                        of_row = load_f32(stage_scales + 64 * row + 4 * g) * row_scale(name, start)
                        store_f32(stage_scales + 64 * row + 4 * g, of_row)
                if is_biased:
                    for g in range(groups):
                        store_f32(
                            stage_minima + 64 * row + 4 * g,
                            load_f32(stage_scales + 64 * row + 4 * g) * types.float32(128),
                        )
            for chunk in range(4):
                if is_biased:
                    transpose_signed(panel + 64 * chunk, 256, codes + 16 * column + 1024 * chunk)
                else:
                    transpose_16x16(panel + 64 * chunk, 256, codes + 16 * column + 1024 * chunk)
            at = 64 * (column // group)
            if groups == 8:
                transpose_16x8(stage_scales, 64, scales + at)
                transpose_16x8(stage_minima, 64, minima + at)
            else:
                transpose_16x16(stage_scales, 64, scales + at)
                transpose_16x16(stage_minima, 64, minima + at)

    return panel


def _is_biased(name: str) -> bool:
    """Signed codes become unsigned ones (+ 128) where the dot product wants that."""
    return BY_NAME[name].is_signed and HAS_FULL_UNSIGNED_DOT


@cache
def panel_kernel(name: str):
    """The compiled `panel` function of type `name`."""
    layout = BY_NAME[name]
    if layout.product == "float":
        panel = _float_panel(name, layout.block_bytes)
    else:
        panel = _block_panel(name, layout.block_size, layout.block_bytes, layout.group, _is_biased(name))
    return Kernel(panel, PANEL_SIGNATURE)


# Products -------------------------------------------------------------------------------------------------------------


@njit(fastmath=FASTMATH)
def store_results(value, out, num_rows, is_added):
    """Stores the 16 (or fewer) results of one token."""
    if num_rows == 16:
        store_f32x16(out, value + load_f32x16(out) if is_added else value)
        return
    for row in range(num_rows):
        lane = lane_f32x16(value, row)
        store_f32(out + 4 * row, lane + load_f32(out + 4 * row) if is_added else lane)


def _float_gemm(panel, activations, tokens, num_tokens, out, out_stride, mode):
    k = load_i64(activations + NUM_VALUES)
    x, weights = load_i64(activations + X_F32), _codes_at(panel)
    num_rows, is_added = mode % ADD, mode >= ADD
    for first in range(0, num_tokens, 4):
        last = num_tokens - 1
        x0 = x + 4 * k * load_i32(tokens + 4 * first)
        x1 = x + 4 * k * load_i32(tokens + 4 * min(first + 1, last))
        x2 = x + 4 * k * load_i32(tokens + 4 * min(first + 2, last))
        x3 = x + 4 * k * load_i32(tokens + 4 * min(first + 3, last))
        a0, a1, a2, a3 = zero_f32x16(), zero_f32x16(), zero_f32x16(), zero_f32x16()
        for i in range(k):
            w = load_f32x16(weights + 64 * i)
            a0 = fma_f32x16(w, broadcast_f32(x0 + 4 * i), a0)
            a1 = fma_f32x16(w, broadcast_f32(x1 + 4 * i), a1)
            a2 = fma_f32x16(w, broadcast_f32(x2 + 4 * i), a2)
            a3 = fma_f32x16(w, broadcast_f32(x3 + 4 * i), a3)
        store_results(a0, out + first * out_stride, num_rows, is_added)
        if first + 1 <= last:
            store_results(a1, out + (first + 1) * out_stride, num_rows, is_added)
        if first + 2 <= last:
            store_results(a2, out + (first + 2) * out_stride, num_rows, is_added)
        if first + 3 <= last:
            store_results(a3, out + (first + 3) * out_stride, num_rows, is_added)


@njit(fastmath=FASTMATH)
def _scaled(total, scale, minimum, x_scale, x_sum, acc):
    """acc + x_scale * (total * scale - minimum * x_sum)"""
    value = fma_f32x16(int_to_f32x16(total), scale, minimum * (types.float32(-1) * x_sum))
    return fma_f32x16(value, splat_f32x16(x_scale), acc)


def _product(signedness, acc, weights, x):
    """acc + weights * x, 4 bytes a lane."""


@overload(_product, prefer_literal=True)
def _choose_product(signedness, acc, weights, x):
    if getattr(signedness, "literal_value", None) == "signed":
        return lambda signedness, acc, weights, x: dot_i8x64(acc, weights, x)
    return lambda signedness, acc, weights, x: dot_u8x64(acc, weights, x)


def _int8_gemm(kind: int, group: int, signedness: str):
    """The product of int8 panels: `group` columns in int32, then scaled into float32."""
    words, x_sums = group // 4, X_SUMS16 if group == 16 else X_SUMS32

    def gemm(panel, activations, tokens, num_tokens, out, out_stride, mode):
        k = load_i64(activations + NUM_VALUES)
        x = load_i64(activations + kind + X_CODES)
        x_scale, x_sum = load_i64(activations + kind + X_SCALES), load_i64(activations + kind + x_sums)
        codes, scales, minima = _codes_at(panel), _scales_at(panel, k), _minima_at(panel, k, group)
        num_rows, is_added = mode % ADD, mode >= ADD
        for first in range(0, num_tokens, 4):
            last = num_tokens - 1
            t0, t1 = load_i32(tokens + 4 * first), load_i32(tokens + 4 * min(first + 1, last))
            t2, t3 = load_i32(tokens + 4 * min(first + 2, last)), load_i32(tokens + 4 * min(first + 3, last))
            x0, x1, x2, x3 = x + k * t0, x + k * t1, x + k * t2, x + k * t3
            d0, d1, d2, d3 = x_scale + k // 8 * t0, x_scale + k // 8 * t1, x_scale + k // 8 * t2, x_scale + k // 8 * t3
            step = k // group * 4
            s0, s1, s2, s3 = x_sum + step * t0, x_sum + step * t1, x_sum + step * t2, x_sum + step * t3
            a0, a1, a2, a3 = zero_f32x16(), zero_f32x16(), zero_f32x16(), zero_f32x16()
            w = codes
            for g in range(k // group):
                i0, i1, i2, i3 = zero_i32x16(), zero_i32x16(), zero_i32x16(), zero_i32x16()
                at = g * group
                for j in range(words):
                    weights = load_i8x64(w + 64 * j)
                    i0 = _product(signedness, i0, weights, broadcast_i8x4(x0 + at + 4 * j))
                    i1 = _product(signedness, i1, weights, broadcast_i8x4(x1 + at + 4 * j))
                    i2 = _product(signedness, i2, weights, broadcast_i8x4(x2 + at + 4 * j))
                    i3 = _product(signedness, i3, weights, broadcast_i8x4(x3 + at + 4 * j))
                w += 64 * words
                scale, minimum = load_f32x16(scales + 64 * g), load_f32x16(minima + 64 * g)
                b = at // 32 * 4
                a0 = _scaled(i0, scale, minimum, load_f32(d0 + b), load_f32(s0 + 4 * g), a0)
                a1 = _scaled(i1, scale, minimum, load_f32(d1 + b), load_f32(s1 + 4 * g), a1)
                a2 = _scaled(i2, scale, minimum, load_f32(d2 + b), load_f32(s2 + 4 * g), a2)
                a3 = _scaled(i3, scale, minimum, load_f32(d3 + b), load_f32(s3 + 4 * g), a3)
            store_results(a0, out + first * out_stride, num_rows, is_added)
            if first + 1 <= last:
                store_results(a1, out + (first + 1) * out_stride, num_rows, is_added)
            if first + 2 <= last:
                store_results(a2, out + (first + 2) * out_stride, num_rows, is_added)
            if first + 3 <= last:
                store_results(a3, out + (first + 3) * out_stride, num_rows, is_added)

    return gemm


@cache
def _shared_gemm(kind: int, group: int, signedness: str):
    gemm = _float_gemm if kind == 0 else _int8_gemm(kind, group, signedness)
    return Kernel(gemm, GEMM_SIGNATURE)


def gemm_kernel(name: str):
    """The compiled `gemm` function for panels of type `name`."""
    layout = BY_NAME[name]
    if layout.product == "float":
        return _shared_gemm(0, 1, "")
    is_signed = layout.is_signed and not _is_biased(name)
    return _shared_gemm(KINDS[activation_kind(name)], layout.group, "signed" if is_signed else "unsigned")
