"""Rows of quantized weights times the activations of one token or a few: what decoding spends its time in.

`rows_kernel(name)` compiles, for one GGUF type, a C function

    rows(weights, row_bytes, num_rows, activations, tokens, num_tokens, out, out_stride)

that writes `num_rows` float32 dot products for each of `num_tokens` (`tokens`: int32 numbers of activation rows) to
`out + i * out_stride`. A product has the same bits whatever the other tokens are and however many: each has a sum of
its own that is added up in the same order. Several tokens take a block of weights four at a time, so that it is read
and decoded once for four.

The order of sums, which a GPU that computes experts with this CPU follows bit for bit (`native.gpu.exact`): lane l
of 16 has the columns 64 c + 4 l .. 64 c + 4 l + 3 of every 256, c = 0 .. 3 (Q2_0: every fourth of 16; floats: column
16 i + l). Within a lane of 256 columns products are summed as integers, with the scales of super-blocks where those
are integers; what is the same for a whole group (minima, offsets) is taken off in the lane of the group's number.
What becomes float32 then is in `native/types/*/cpu.py`, one rounding an operation, a fused multiply-add where it says
so. A lane adds up its 256s from left to right: of super-blocks times the activations' scale, fused. Last the upper
half of the lanes is added to the lower one until one is left, which the row's scale multiplies where the type has one.
Where registers are few the halves are added before a super-block is scaled, and 8 lanes are left
(`native.isa.sum_order`).

Rows are taken in order: memory is then read as the hardware prefetches best; four at a time measured 7.7 GB/s against
24 to 29 (tools/LOG.md). What comes next is asked for all the same (`_prefetch_ahead`). Rows of floats are taken four at
a time, for their activations crowd the cache, and so the next four are asked for in the order of memory. Shapes and the
meaning of `activations` are in `activations.py`.
"""

from functools import cache

from numba import njit, types

from kimi_lite.native.calls import clear_bytes, copy_bytes, prefetch_far, prefetch_near, stack_1024
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
from kimi_lite.native.cpu.blocks import dot8x32, dot256, load16, row_scale
from kimi_lite.native.cpu.compiler import IN_ORDER, Kernel
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.simd import (
    fma_f32x16,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    store_f32,
    sum_f32x16,
    zero_f32x16,
)
from kimi_lite.native.simd_dot import add_to_row, sum_row, zero_row

_NEAR_BYTES, _FAR_BYTES = 1024, 4096  # ahead of what is multiplied: into the core's first cache, into its second one
_SHARED_ROWS = 8  # that several tokens take one after the other while rows and activations are in the core's cache
ROWS_SIGNATURE = types.void(*[types.int64] * 8)


@njit
def _prefetch_ahead(address, num_bytes):
    """Asks for the memory behind a block of weights, as far ahead as a page of 4 KB, at which the hardware's own
    prefetching stops. Measured with 1 to 8 tokens: 1.1 to 2 x as fast out of cache, the same in it (tools/LOG.md)."""
    for line in range(0, num_bytes, 64):
        prefetch_near(address + _NEAR_BYTES + line)
        prefetch_far(address + _FAR_BYTES + line)


@njit
def _four(tokens, first, num_tokens):
    """The numbers of four tokens from `first` on; past the end the last one again."""
    last = num_tokens - 1
    return (
        types.int64(load_i32(tokens + 4 * first)),
        types.int64(load_i32(tokens + 4 * min(first + 1, last))),
        types.int64(load_i32(tokens + 4 * min(first + 2, last))),
        types.int64(load_i32(tokens + 4 * min(first + 3, last))),
    )


@njit
def _store_four(out, out_stride, first, num_tokens, sums):
    """Of tokens past the end nothing is stored."""
    store_f32(out + first * out_stride, sums[0])
    if first + 1 < num_tokens:
        store_f32(out + (first + 1) * out_stride, sums[1])
    if first + 2 < num_tokens:
        store_f32(out + (first + 2) * out_stride, sums[2])
    if first + 3 < num_tokens:
        store_f32(out + (first + 3) * out_stride, sums[3])


def _float_rows(name: str, block_size: int, weight_bytes: int):
    step, lines = 16 * weight_bytes, weight_bytes  # bytes of 16 weights; cache lines of 16 weights of four rows

    def rows(weights, row_bytes, num_rows, activations, tokens, num_tokens, out, out_stride):
        k, values = load_i64(activations + NUM_VALUES), load_i64(activations + X_F32)
        if num_tokens == 1:
            x, last = values + 4 * k * load_i32(tokens), num_rows - 1
            for row in range(0, num_rows, 4):
                second, third, fourth = min(row + 1, last), min(row + 2, last), min(row + 3, last)
                w0, w1 = weights + row * row_bytes, weights + second * row_bytes
                w2, w3 = weights + third * row_bytes, weights + fourth * row_bytes
                acc0, acc1, acc2, acc3 = zero_f32x16(), zero_f32x16(), zero_f32x16(), zero_f32x16()
                ahead = w0 + 4 * row_bytes
                for i in range(k // 16):
                    for line in range(lines):
                        prefetch_far(ahead + 4 * step * i + 64 * line)
                    part, at = load_f32x16(x + 64 * i), step * i
                    acc0 = fma_f32x16(load16(name, w0 + at), part, acc0)
                    acc1 = fma_f32x16(load16(name, w1 + at), part, acc1)
                    acc2 = fma_f32x16(load16(name, w2 + at), part, acc2)
                    acc3 = fma_f32x16(load16(name, w3 + at), part, acc3)
                store_f32(out + 4 * row, sum_f32x16(acc0))
                store_f32(out + 4 * second, sum_f32x16(acc1))
                store_f32(out + 4 * third, sum_f32x16(acc2))
                store_f32(out + 4 * fourth, sum_f32x16(acc3))
            return
        for top in range(0, num_rows, _SHARED_ROWS):
            for first in range(0, num_tokens, 4):
                t0, t1, t2, t3 = _four(tokens, first, num_tokens)
                x0, x1, x2, x3 = values + 4 * k * t0, values + 4 * k * t1, values + 4 * k * t2, values + 4 * k * t3
                for row in range(top, min(top + _SHARED_ROWS, num_rows)):
                    w = weights + row * row_bytes
                    acc0, acc1, acc2, acc3 = zero_f32x16(), zero_f32x16(), zero_f32x16(), zero_f32x16()
                    for i in range(k // 16):
                        part = load16(name, w + step * i)
                        acc0 = fma_f32x16(part, load_f32x16(x0 + 64 * i), acc0)
                        acc1 = fma_f32x16(part, load_f32x16(x1 + 64 * i), acc1)
                        acc2 = fma_f32x16(part, load_f32x16(x2 + 64 * i), acc2)
                        acc3 = fma_f32x16(part, load_f32x16(x3 + 64 * i), acc3)
                    sums = sum_f32x16(acc0), sum_f32x16(acc1), sum_f32x16(acc2), sum_f32x16(acc3)
                    _store_four(out + 4 * row, out_stride, first, num_tokens, sums)

    return rows


@njit
def _stage_rest(stage, scales, sums16, sums32, rest):
    """Copies scales and sums of the last `rest` blocks of 32, and zeros behind them, to 128 bytes at `stage`."""
    clear_bytes(stage, 128)
    copy_bytes(stage, scales, 4 * rest)
    copy_bytes(stage + 32, sums32, 4 * rest)
    copy_bytes(stage + 64, sums16, 8 * rest)


def _block32_rows(name: str, block_size: int, block_bytes: int):
    span_bytes = 256 // block_size * block_bytes

    def rows(weights, row_bytes, num_rows, activations, tokens, num_tokens, out, out_stride):
        k = load_i64(activations + NUM_VALUES)
        spans = k // 256
        codes = load_i64(activations + KIND32 + X_CODES)
        scales = load_i64(activations + KIND32 + X_SCALES)
        sums16 = load_i64(activations + KIND32 + X_SUMS16)
        sums32 = load_i64(activations + KIND32 + X_SUMS32)
        # Blocks that do not fill a span are followed by blocks of the next rows, times zero; behind the last rows by a
        # copy.
        stage, rest, num_spans = stack_1024(), (k - 256 * spans) // 32, -(-k // 256)
        copied, rest_bytes = stage + 512, 32 * rest // block_size * block_bytes
        num_direct = num_rows - (-(-span_bytes // row_bytes)) if rest > 0 else num_rows
        clear_bytes(copied, 512)
        if num_tokens == 1:
            t0 = types.int64(load_i32(tokens))
            x0, d0, f0, h0 = codes + k * t0, scales + k // 8 * t0, sums16 + k // 4 * t0, sums32 + k // 8 * t0
            _stage_rest(stage, d0 + 32 * spans, f0 + 64 * spans, h0 + 32 * spans, rest)
            for row in range(num_rows):
                w, acc = weights + row * row_bytes, zero_f32x16()
                for b in range(num_spans):
                    _prefetch_ahead(w + b * span_bytes, span_bytes)
                    blocks, s, s16, s32 = w + b * span_bytes, d0 + 32 * b, f0 + 64 * b, h0 + 32 * b
                    if b == spans:
                        s, s16, s32 = stage, stage + 64, stage + 32
                        if row >= num_direct:
                            copy_bytes(copied, blocks, rest_bytes)
                            blocks = copied
                    acc = acc + dot8x32(name, blocks, x0 + 256 * b, s, s16, s32)  # one call, so that it is inlined
                store_f32(out + 4 * row, sum_f32x16(acc))
            return
        for top in range(0, num_rows, _SHARED_ROWS):
            for first in range(0, num_tokens, 4):
                t0, t1, t2, t3 = _four(tokens, first, num_tokens)
                x0, d0, f0, h0 = codes + k * t0, scales + k // 8 * t0, sums16 + k // 4 * t0, sums32 + k // 8 * t0
                x1, d1, f1, h1 = codes + k * t1, scales + k // 8 * t1, sums16 + k // 4 * t1, sums32 + k // 8 * t1
                x2, d2, f2, h2 = codes + k * t2, scales + k // 8 * t2, sums16 + k // 4 * t2, sums32 + k // 8 * t2
                x3, d3, f3, h3 = codes + k * t3, scales + k // 8 * t3, sums16 + k // 4 * t3, sums32 + k // 8 * t3
                if rest > 0:
                    _stage_rest(stage, d0 + 32 * spans, f0 + 64 * spans, h0 + 32 * spans, rest)
                    _stage_rest(stage + 128, d1 + 32 * spans, f1 + 64 * spans, h1 + 32 * spans, rest)
                    _stage_rest(stage + 256, d2 + 32 * spans, f2 + 64 * spans, h2 + 32 * spans, rest)
                    _stage_rest(stage + 384, d3 + 32 * spans, f3 + 64 * spans, h3 + 32 * spans, rest)
                for row in range(top, min(top + _SHARED_ROWS, num_rows)):
                    w = weights + row * row_bytes
                    acc0, acc1, acc2, acc3 = zero_f32x16(), zero_f32x16(), zero_f32x16(), zero_f32x16()
                    for b in range(num_spans):
                        blocks, at, d, f = w + b * span_bytes, 256 * b, 32 * b, 64 * b
                        if first == 0:
                            _prefetch_ahead(blocks, span_bytes)
                        e0, e1, e2, e3 = d0 + d, d1 + d, d2 + d, d3 + d
                        g0, g1, g2, g3 = f0 + f, f1 + f, f2 + f, f3 + f
                        i0, i1, i2, i3 = h0 + d, h1 + d, h2 + d, h3 + d
                        if b == spans:
                            e0, g0, i0 = stage, stage + 64, stage + 32
                            e1, g1, i1 = stage + 128, stage + 192, stage + 160
                            e2, g2, i2 = stage + 256, stage + 320, stage + 288
                            e3, g3, i3 = stage + 384, stage + 448, stage + 416
                            if row >= num_direct:
                                copy_bytes(copied, blocks, rest_bytes)
                                blocks = copied
                        acc0 = acc0 + dot8x32(name, blocks, x0 + at, e0, g0, i0)
                        acc1 = acc1 + dot8x32(name, blocks, x1 + at, e1, g1, i1)
                        acc2 = acc2 + dot8x32(name, blocks, x2 + at, e2, g2, i2)
                        acc3 = acc3 + dot8x32(name, blocks, x3 + at, e3, g3, i3)
                    sums = sum_f32x16(acc0), sum_f32x16(acc1), sum_f32x16(acc2), sum_f32x16(acc3)
                    _store_four(out + 4 * row, out_stride, first, num_tokens, sums)

    return rows


def _block256_rows(name: str, block_size: int, block_bytes: int):
    """One row at a time: memory is read in order, which the hardware prefetches best (tools/LOG.md)."""
    header_bytes = BY_NAME[name].header_bytes

    def rows(weights, row_bytes, num_rows, activations, tokens, num_tokens, out, out_stride):
        k = load_i64(activations + NUM_VALUES)
        blocks = k // 256
        codes = load_i64(activations + KIND256 + X_CODES)
        scales = load_i64(activations + KIND256 + X_SCALES)
        sums16 = load_i64(activations + KIND256 + X_SUMS16)
        sums32 = load_i64(activations + KIND256 + X_SUMS32)
        minus16 = load_i64(activations + KIND256 + X_MINUS16)
        if num_tokens == 1:
            t = blocks * types.int64(load_i32(tokens))
            for row in range(num_rows):
                start, acc = weights + row * row_bytes, zero_row()
                w = start + header_bytes
                for b in range(blocks):
                    _prefetch_ahead(w + b * block_bytes, block_bytes)
                    at, i = w + b * block_bytes, t + b
                    values = dot256(name, at, codes + 256 * i, sums16 + 64 * i, sums32 + 32 * i, minus16 + 32 * i)
                    acc = add_to_row(acc, values, load_f32(scales + 32 * i))
                store_f32(out + 4 * row, sum_row(acc) * row_scale(name, start))
            return
        for top in range(0, num_rows, _SHARED_ROWS):
            for first in range(0, num_tokens, 4):
                t0, t1, t2, t3 = _four(tokens, first, num_tokens)
                for row in range(top, min(top + _SHARED_ROWS, num_rows)):
                    start = weights + row * row_bytes
                    w, scale = start + header_bytes, row_scale(name, start)
                    acc0, acc1, acc2, acc3 = zero_row(), zero_row(), zero_row(), zero_row()
                    for b in range(blocks):
                        at, i, j = w + b * block_bytes, blocks * t0 + b, blocks * t1 + b
                        if first == 0:
                            _prefetch_ahead(at, block_bytes)
                        m, n = blocks * t2 + b, blocks * t3 + b
                        v0 = dot256(name, at, codes + 256 * i, sums16 + 64 * i, sums32 + 32 * i, minus16 + 32 * i)
                        v1 = dot256(name, at, codes + 256 * j, sums16 + 64 * j, sums32 + 32 * j, minus16 + 32 * j)
                        v2 = dot256(name, at, codes + 256 * m, sums16 + 64 * m, sums32 + 32 * m, minus16 + 32 * m)
                        v3 = dot256(name, at, codes + 256 * n, sums16 + 64 * n, sums32 + 32 * n, minus16 + 32 * n)
                        acc0 = add_to_row(acc0, v0, load_f32(scales + 32 * i))
                        acc1 = add_to_row(acc1, v1, load_f32(scales + 32 * j))
                        acc2 = add_to_row(acc2, v2, load_f32(scales + 32 * m))
                        acc3 = add_to_row(acc3, v3, load_f32(scales + 32 * n))
                    sums = sum_row(acc0) * scale, sum_row(acc1) * scale, sum_row(acc2) * scale, sum_row(acc3) * scale
                    _store_four(out + 4 * row, out_stride, first, num_tokens, sums)

    return rows


_PRODUCTS = {"float": _float_rows, "block32": _block32_rows, "block256": _block256_rows}


@cache
def rows_kernel(name: str):
    """The compiled `rows` function of type `name` (its `.address` goes into programs); compiled once, cached on
    disk."""
    rows = _PRODUCTS[BY_NAME[name].product](name, BY_NAME[name].block_size, BY_NAME[name].block_bytes)
    return Kernel(rows, ROWS_SIGNATURE, IN_ORDER)
