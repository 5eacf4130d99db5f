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

from kimi_lite.native.calls import stack_1024
from kimi_lite.native.cpu.activations import KINDS, NUM_VALUES, X_CODES, X_F32, X_SCALES, X_SUMS16, X_SUMS32
from kimi_lite.native.cpu.blocks import activation_kind, load16, row_scale, unpack
from kimi_lite.native.cpu.compiler import FASTMATH, Kernel
from kimi_lite.native.cpu.panel_tile import TILE_TOKENS, PanelForm, panel_tile
from kimi_lite.native.isa import AVX2, PORTABLE, isa
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.simd import (
    broadcast_f32,
    fma_f32x16,
    lane_f32x16,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    store_f32,
    store_f32x16,
    store_i64,
    transpose_16x8,
    transpose_16x16,
    transpose_biased,
    zero_f32x16,
)
from kimi_lite.native.simd_dot import HAS_FULL_UNSIGNED_DOT

PANEL_SIGNATURE, GEMM_SIGNATURE = types.void(*[types.int64] * 5), types.void(*[types.int64] * 7)
PANEL_ROWS, ADD = 16, 256
AHEAD, AHEAD_LINES = 0, 8  # int64 cells in a panel's staging area: from where on `gemm` asks for how many cache lines
CODES = 8192  # where they begin, behind 16 rows x 256 codes, then 16 x 16 scales and minima; or 16 x 16 floats


def panel_bytes(k: int) -> int:
    """Bytes of scratch that a panel of K columns takes, whatever its type: staging area, codes or floats, scales,
    minima."""
    columns = -(-k // 256) * 256
    return CODES + 64 * columns + 2 * 64 * (columns // 16)


@njit
def _codes_at(panel):
    return panel + CODES


@njit
def _scales_at(panel, k):
    return panel + CODES + 16 * (-(-k // 256) * 256)


@njit
def _minima_at(panel, k, group):
    columns = -(-k // 256) * 256
    return panel + CODES + 16 * columns + 64 * (columns // group)


# Unpacking ------------------------------------------------------------------------------------------------------------


def _float_panel(name: str, weight_bytes: int):
    def panel(weights, row_bytes, num_rows, k, panel):
        for column in range(0, k, 16):
            for row in range(num_rows):
                store_f32x16(panel + 64 * row, load16(name, weights + row * row_bytes + column * weight_bytes))
            transpose_16x16(panel, 64, _codes_at(panel) + 64 * column)

    return panel


def _block_panel(name: str, block_size: int, block_bytes: int, group: int, bias: int):
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
                if bias != 0:
                    for g in range(groups):
                        minimum = load_f32(stage_scales + 64 * row + 4 * g) * types.float32(bias)
                        store_f32(stage_minima + 64 * row + 4 * g, minimum)
            for chunk in range(4):
                transpose_biased(panel + 64 * chunk, 256, codes + 16 * column + 1024 * chunk, bias)
            at = 64 * (column // group)
            if groups == 8:
                transpose_16x8(stage_scales, 64, scales + at)
                transpose_16x8(stage_minima, 64, minima + at)
            else:
                transpose_16x16(stage_scales, 64, scales + at)
                transpose_16x16(stage_minima, 64, minima + at)
        store_i64(panel + AHEAD_LINES, 0)

    return panel


def code_bias(name: str) -> int:
    """What is added to signed codes where the product then is cheaper: 0 if nothing."""
    layout = BY_NAME[name]
    if not layout.is_signed or isa().name == PORTABLE:
        return 0
    if HAS_FULL_UNSIGNED_DOT:
        return 128
    return layout.max_code if 2 * layout.max_code <= 128 else 0


@cache
def panel_kernel(name: str):
    """The compiled `panel` function of type `name`."""
    layout = BY_NAME[name]
    if layout.product == "float":
        panel = _float_panel(name, layout.block_bytes)
    else:
        panel = _block_panel(name, layout.block_size, layout.block_bytes, layout.group, code_bias(name))
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


def _int8_gemm(form: PanelForm):
    """The product of int8 panels."""
    kind, x_sums = KINDS[form.span], X_SUMS16 if form.group == 16 else X_SUMS32
    span, group, is_signed, has_minima, num_pairs = form
    most, half = TILE_TOKENS, TILE_TOKENS // 2

    def gemm(panel, activations, tokens, num_tokens, out, out_stride, mode):
        k = load_i64(activations + NUM_VALUES)
        x = load_i64(activations + kind + X_CODES)
        x_scale, x_sum = load_i64(activations + kind + X_SCALES), load_i64(activations + kind + x_sums)
        codes, scales, minima = _codes_at(panel), _scales_at(panel, k), _minima_at(panel, k, group)
        num_rows, is_added, stage = mode % ADD, mode >= ADD, stack_1024()
        ahead, num_lines = load_i64(panel + AHEAD), load_i64(panel + AHEAD_LINES)
        spans, tiles = k // max(span, group), (num_tokens + most - 1) // most
        lines = -(-num_lines // (spans * tiles))  # for each span of columns
        for first in range(0, num_tokens, most):
            last = num_tokens - 1 - first
            if last >= half:
                panel_tile(
                    most, span, group, is_signed, has_minima, num_pairs,
                    codes, scales, minima, x, x_scale, x_sum, tokens + 4 * first, last, k, stage, ahead, lines,
                )  # fmt: skip
            else:
                panel_tile(
                    half, span, group, is_signed, has_minima, num_pairs,
                    codes, scales, minima, x, x_scale, x_sum, tokens + 4 * first, last, k, stage, ahead, lines,
                )  # fmt: skip
            ahead, num_lines = ahead + 64 * lines * spans, num_lines - lines * spans
            if num_lines <= 0:
                lines = 0
            for i in range(min(most, last + 1)):
                store_results(load_f32x16(stage + 64 * i), out + (first + i) * out_stride, num_rows, is_added)

    return gemm


@cache
def _shared_gemm(form: PanelForm | None):
    return Kernel(_int8_gemm(form) if form else _float_gemm, GEMM_SIGNATURE)


def gemm_kernel(name: str):
    """The compiled `gemm` function for panels of type `name`."""
    layout = BY_NAME[name]
    if layout.product == "float":
        return _shared_gemm(None)
    bias = code_bias(name)
    is_signed = layout.is_signed and bias == 0
    # So many sums of two products stay within 16 bits whatever they are: activations are at most 127.
    num_pairs = max(1, (2**15 - 1) // (2 * 127 * (layout.max_code + bias))) if isa().name == AVX2 else 0
    return _shared_gemm(PanelForm(activation_kind(name), layout.group, is_signed, not is_signed, num_pairs))
