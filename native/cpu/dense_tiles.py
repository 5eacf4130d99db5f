"""Register tiles of dense products: 16 V rows of a packed matrix times T rows of activations, V x T sums in registers.

    float_tile(dtype, ...)    float32 rows times panels of float32, float16 or bfloat16
    byte_tile(...)            int8 rows times int8 panels, scaled by group into float32
    byte_score_tile(...)      int8 queries times int8 keys, each with a scale
    byte_value_tile(...)      unsigned weights times int8 values, added to float32

A panel holds 16 rows of a matrix side by side, K after K (`native.cpu.dense`). Generated against LLVM, because V and T
are what fits the registers of an ISA: with AVX-512 24 sums of 32 registers, elsewhere 6 sums of two registers each.
"""

from collections.abc import Callable
from functools import cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kimi_lite.native.cpu.tiles import shifted
from kimi_lite.native.half import widen_half
from kimi_lite.native.isa import AVX512_VNNI, isa
from kimi_lite.native.simd_dot import dot_of, unsigned_dot_of
from kimi_lite.native.vectors import Vec, call_llvm, f32x16, i8x64, i16x16, i32x16, splat

TILE_VECTORS, TILE_ROWS = (2, 12) if isa().name == AVX512_VNNI else (1, 6)
GROUP = 128  # columns of int8 that share a scale
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


def _load(builder, address, llvm_type, align: int = 1):
    value = builder.load(builder.inttoptr(address, llvm_type.as_pointer()))
    value.align = align
    return value


def _store(builder, address, value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def _weights(builder, address, dtype: str):
    """16 weights as float32 lanes."""
    if dtype == "F16":
        return widen_half(builder, _load(builder, address, Vec("f16", 16).llvm))
    if dtype == "BF16":
        words = builder.zext(_load(builder, address, i16x16.llvm), i32x16.llvm)
        return builder.bitcast(builder.shl(words, ir.Constant(i32x16.llvm, [16] * 16)), f32x16.llvm)
    return _load(builder, address, f32x16.llvm)


@cache
def float_tile(dtype: str, vectors: int, rows: int, is_added: bool) -> Callable:
    """`tile(weights, step, panel_bytes, x, x_stride, k, out, out_stride)`: out[r, 16 v + lane] = or += the sum over k
    of weights[v][k][lane] * x[r][k].

    weights: 16 of dtype at every multiple of `step` bytes, and those of the next v `panel_bytes` further; x, out:
    float32, `rows` rows. Strides in bytes.
    """

    @intrinsic
    def tile(typingctx, weights, step, panel_bytes, x, x_stride, k, out, out_stride):
        def codegen(context, builder, sig, args):
            panels, step, panel_bytes, x, x_stride, k, out, out_stride = args
            places = [(r, v) for r in range(rows) for v in range(vectors)]
            at = {(r, v): shifted(builder, out, (out_stride, r), 64 * v) for r, v in places}
            zero = ir.Constant(f32x16.llvm, [0.0] * 16)
            start = {p: _load(builder, at[p], f32x16.llvm) if is_added else zero for p in places}
            sums = {p: cgutils.alloca_once_value(builder, start[p]) for p in places}
            bases = [shifted(builder, panels, (panel_bytes, v)) for v in range(vectors)]
            inputs = [shifted(builder, x, (x_stride, r)) for r in range(rows)]
            with cgutils.for_range(builder, k, intp=_I64) as loop:
                offset = builder.mul(loop.index, step)
                weights = [_weights(builder, builder.add(b, offset), dtype) for b in bases]
                for r in range(rows):
                    value = splat(builder, f32x16, _load(builder, shifted(builder, inputs[r], (loop.index, 4)), _F32))
                    for v in range(vectors):
                        total = builder.load(sums[r, v])
                        fused = call_llvm(builder, "llvm.fma.v16f32", f32x16.llvm, (weights[v], value, total))
                        builder.store(fused, sums[r, v])
            for p in places:
                _store(builder, at[p], builder.load(sums[p]))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile


def _byte_sums(builder, num_words, weights, step, inputs, starts, emit) -> dict:
    """int32 sums {(row, vector): 16 lanes}: starts[v] + products of 4 bytes a lane, over `num_words`.

    weights: addresses of 64 bytes for each vector, those of the next word `step` bytes further; inputs: addresses of
    each row's words.
    """
    sums = {}
    for v, start in enumerate(starts):
        for r in range(len(inputs)):
            sums[r, v] = cgutils.alloca_once(builder, i32x16.llvm)
            builder.store(start, sums[r, v])
    with cgutils.for_range(builder, num_words, intp=_I64) as loop:
        columns = [_load(builder, shifted(builder, each, (loop.index, step)), i8x64.llvm) for each in weights]
        for r, line in enumerate(inputs):
            word = _load(builder, shifted(builder, line, (loop.index, 4)), _I32)
            value = builder.bitcast(splat(builder, i32x16, word), i8x64.llvm)
            for v, column in enumerate(columns):
                builder.store(emit(builder, builder.load(sums[r, v]), value, column), sums[r, v])
    return {place: builder.load(total) for place, total in sums.items()}


@cache
def byte_tile(vectors: int, rows: int) -> Callable:
    """`tile(panels, panel_bytes, scales, starts, x, x_scales, num_groups, out)`: out[r, 16 v + lane] = the sum over
    groups of scale * x_scale * (start + the sum of products of the group).

    panels: (K / 4, 16, 4) int8 each; scales, starts: float32 and int32 (K / GROUP, 16), those of the next panel behind
    them; x: (rows, K) bytes and x_scales: float32 (rows, K / GROUP), as `native.cpu.dense.quantize_row` writes them.
    out: float32 (rows, 16 * vectors), contiguous.
    """
    places = [(r, v) for r in range(rows) for v in range(vectors)]

    @intrinsic
    def tile(typingctx, panels, panel_bytes, scales, starts, x, x_scales, num_groups, out):
        def codegen(context, builder, sig, args):
            panels, panel_bytes, scales, starts, x, x_scales, num_groups, out = args
            outputs = {(r, v): shifted(builder, out, 64 * (r * vectors + v)) for r, v in places}
            for at in outputs.values():
                _store(builder, at, ir.Constant(f32x16.llvm, [0.0] * 16))
            k = builder.mul(num_groups, ir.Constant(_I64, GROUP))
            bases = [shifted(builder, panels, (panel_bytes, v)) for v in range(vectors)]
            inputs = [shifted(builder, x, (k, r)) for r in range(rows)]
            with cgutils.for_range(builder, num_groups, intp=_I64) as group:
                of_group = [shifted(builder, group.index, (num_groups, i)) for i in range(max(rows, vectors))]
                beginnings = [
                    _load(builder, shifted(builder, starts, (of_group[v], 64)), i32x16.llvm) for v in range(vectors)
                ]
                sums = _byte_sums(
                    builder,
                    ir.Constant(_I64, GROUP // 4),
                    [shifted(builder, base, (group.index, 16 * GROUP)) for base in bases],
                    64,
                    [shifted(builder, line, (group.index, GROUP)) for line in inputs],
                    beginnings,
                    dot_of,
                )
                scale = [
                    _load(builder, shifted(builder, scales, (of_group[v], 64)), f32x16.llvm) for v in range(vectors)
                ]
                for r, v in places:
                    x_scale = _load(builder, shifted(builder, x_scales, (of_group[r], 4)), _F32)
                    value = builder.sitofp(sums[r, v], f32x16.llvm)
                    before = _load(builder, outputs[r, v], f32x16.llvm)
                    factor = builder.fmul(scale[v], splat(builder, f32x16, x_scale))
                    after = call_llvm(builder, "llvm.fma.v16f32", f32x16.llvm, (value, factor, before))
                    _store(builder, outputs[r, v], after)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile


@cache
def byte_score_tile(vectors: int, rows: int) -> Callable:
    """`tile(keys, key_bytes, scales, starts, x, x_stride, x_scales, words, out, out_stride)`: out[r, 16 v + lane] =
    scale[v][lane] * x_scale[r] * (start[v][lane] + the products of 4 * words bytes).

    keys: (words, 16, 4) int8 for each vector, `key_bytes` apart; scales, starts: float32 and int32, 16 for each vector;
    x: rows as `native.cpu.dense.quantize_row` writes them, x_scales: float32, one a row.
    """

    @intrinsic
    def tile(typingctx, keys, key_bytes, scales, starts, x, x_stride, x_scales, words, out, out_stride):
        def codegen(context, builder, sig, args):
            keys, key_bytes, scales, starts, x, x_stride, x_scales, words, out, out_stride = args
            at = range(vectors)
            sums = _byte_sums(
                builder,
                words,
                [shifted(builder, keys, (key_bytes, v)) for v in at],
                64,
                [shifted(builder, x, (x_stride, r)) for r in range(rows)],
                [_load(builder, shifted(builder, starts, 64 * v), i32x16.llvm) for v in at],
                dot_of,
            )
            scale = [_load(builder, shifted(builder, scales, 64 * v), f32x16.llvm) for v in at]
            for r in range(rows):
                x_scale = splat(builder, f32x16, _load(builder, shifted(builder, x_scales, 4 * r), _F32))
                for v in at:
                    value = builder.fmul(builder.sitofp(sums[r, v], f32x16.llvm), builder.fmul(scale[v], x_scale))
                    _store(builder, shifted(builder, out, (out_stride, r), 64 * v), value)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return tile


@cache
def byte_value_tile(vectors: int, rows: int) -> Callable:
    """`tile(values, scales, x, x_stride, x_scales, x_scale_stride, words, out, out_stride)`: out[r, 16 v + lane] +=
    scale[v][lane] * x_scale[r] * the products of 4 * words bytes.

    values: (words, 16 * vectors, 4) int8; scales: float32 (16 * vectors,); x: unsigned bytes up to MAX_UNSIGNED.
    """

    @intrinsic
    def tile(typingctx, values, scales, x, x_stride, x_scales, x_scale_stride, words, out, out_stride):
        def codegen(context, builder, sig, args):
            values, scales, x, x_stride, x_scales, x_scale_stride, words, out, out_stride = args
            at = range(vectors)
            sums = _byte_sums(
                builder,
                words,
                [shifted(builder, values, 64 * v) for v in at],
                64 * vectors,
                [shifted(builder, x, (x_stride, r)) for r in range(rows)],
                [ir.Constant(i32x16.llvm, [0] * 16)] * vectors,
                unsigned_dot_of,
            )
            scale = [_load(builder, shifted(builder, scales, 64 * v), f32x16.llvm) for v in at]
            for r in range(rows):
                place = shifted(builder, x_scales, (x_scale_stride, r))
                x_scale = splat(builder, f32x16, _load(builder, place, _F32))
                for v in at:
                    target = shifted(builder, out, (out_stride, r), 64 * v)
                    value = builder.sitofp(sums[r, v], f32x16.llvm)
                    arguments = (value, builder.fmul(scale[v], x_scale), _load(builder, target, f32x16.llvm))
                    _store(builder, target, call_llvm(builder, "llvm.fma.v16f32", f32x16.llvm, arguments))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return tile
