"""Register tiles of absorbed attention, generated for any number of heads: one reading of the cache serves them all.

    score_tile(heads)   scores[g] = q_g . row             for one cached position value_tile(heads)   context_g =
    context_g * factor_g + sum_p weight[g][p] * page[p], 32 values (a cache line) at a time

Both are written against LLVM directly because the number of accumulators is a parameter.
"""

from collections.abc import Callable
from functools import cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kimi_lite.native.half import widen_half, widen_half_bits
from kimi_lite.native.isa import AVX512_VNNI, isa
from kimi_lite.native.latent_rows import GROUP_VALUES, ROW_FORMS
from kimi_lite.native.vectors import Vec, call_llvm, f32x16, i8x16, i16x16, i32x16

MAX_HEADS = 8 if isa().name == AVX512_VNNI else 4  # twice as many accumulators as heads must fit the registers
SCORE_STRIDE = 256  # bytes between the 64 scores of one head and the next
_I64, _F32 = ir.IntType(64), ir.FloatType()
_REASSOC = ("reassoc",)  # sums in any order


def _load(builder, address, dtype: str, scales=None):
    """16 cached values as float32 lanes; `scales`: the vector that multiplies the codes of q8."""
    stored = {"f32": f32x16.llvm, "f16": Vec("f16", 16).llvm, "bf16": i16x16.llvm, "q8": i8x16.llvm}[dtype]
    value = builder.load(builder.inttoptr(address, stored.as_pointer()))
    value.align = 1
    if dtype == "q8":
        return builder.fmul(builder.sitofp(builder.sext(value, i32x16.llvm), f32x16.llvm), scales)
    if dtype == "f16":
        return widen_half(builder, value)
    if dtype == "bf16":
        bits = builder.shl(builder.zext(value, i32x16.llvm), ir.Constant(i32x16.llvm, [16] * 16))
        return builder.bitcast(bits, f32x16.llvm)
    return value


def _store(builder, address, value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def _load_scale(builder, address, dtype: str):
    """The float16 scale at an address in all lanes; nothing for dtypes without scales."""
    if not ROW_FORMS[dtype].scale_bytes:
        return None
    bits = builder.load(builder.inttoptr(address, ir.IntType(16).as_pointer()))
    bits.align = 2
    return _splat(builder, widen_half_bits(builder, bits))


def _broadcast(builder, address):
    scalar = builder.load(builder.inttoptr(address, _F32.as_pointer()))
    scalar.align = 4
    return _splat(builder, scalar)


def _splat(builder, scalar):
    undefined = ir.Constant(f32x16.llvm, ir.Undefined)
    lane = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(lane, undefined, ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16))


def shifted(builder, base, *terms):
    """base + the sum of terms; a term is a constant, a value, or a (value, constant factor) pair."""
    for term in terms:
        if isinstance(term, tuple):
            term = builder.mul(term[0], ir.Constant(_I64, term[1]))
        base = builder.add(base, ir.Constant(_I64, term) if isinstance(term, int) else term)
    return base


def _fma(builder, a, b, c):
    return call_llvm(builder, "llvm.fma.v16f32", f32x16.llvm, (a, b, c), _REASSOC)


@cache
def score_tile(num_heads: int, dtype: str) -> Callable:
    """`tile(row, q, q_stride, length, scores)`: products of one cached row with `num_heads` float32 queries."""
    form = ROW_FORMS[dtype]

    @intrinsic
    def tile(typingctx, row, q, q_stride, length, scores):
        def codegen(context, builder, sig, args):
            row, q, q_stride, length, scores = args
            sums = [cgutils.alloca_once_value(builder, ir.Constant(f32x16.llvm, [0.0] * 16)) for _ in range(num_heads)]
            steps = builder.udiv(length, ir.Constant(_I64, 16))
            codes_end = shifted(builder, row, length)
            with cgutils.for_range(builder, steps, intp=_I64) as loop:
                group = builder.udiv(loop.index, ir.Constant(_I64, GROUP_VALUES // 16))
                scale = _load_scale(builder, shifted(builder, codes_end, (group, form.scale_bytes)), dtype)
                value = _load(builder, shifted(builder, row, (loop.index, 16 * form.value_bytes)), dtype, scale)
                for g, total in enumerate(sums):
                    query = _load(builder, shifted(builder, q, (q_stride, g), (loop.index, 64)), "f32")
                    builder.store(_fma(builder, value, query, builder.load(total)), total)
            for g, total in enumerate(sums):
                start = ir.Constant(_F32, -0.0)
                result = call_llvm(
                    builder, "llvm.vector.reduce.fadd.v16f32", _F32, (start, builder.load(total)), _REASSOC
                )
                _store(builder, shifted(builder, scores, SCORE_STRIDE * g), result)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return tile


@cache
def value_tile(num_heads: int, dtype: str) -> Callable:
    """`tile(page, scales, row_bytes, count, weights, factors, context, context_stride)`: 32 values of every head's
    context.

    page: address of these values in the first row; scales: of their scale there, for q8. weights: float32 (heads, 64);
    factors: float32 (heads,); context: float32, `context_stride` bytes from head to head.
    """
    value_bytes = ROW_FORMS[dtype].value_bytes

    @intrinsic
    def tile(typingctx, page, scales, row_bytes, count, weights, factors, context, context_stride):
        def codegen(target, builder, sig, args):
            page, scales, row_bytes, count, weights, factors, values, stride = args
            places = [(g, half) for g in range(num_heads) for half in range(2)]
            totals = {}
            for g, half in places:
                before = _load(builder, shifted(builder, values, (stride, g), 64 * half), "f32")
                factor = _broadcast(builder, shifted(builder, factors, 4 * g))
                totals[g, half] = cgutils.alloca_once_value(builder, builder.fmul(before, factor))
            with cgutils.for_range(builder, count, intp=_I64) as loop:
                offset = builder.mul(loop.index, row_bytes)
                row, scale = (
                    shifted(builder, page, offset),
                    _load_scale(builder, shifted(builder, scales, offset), dtype),
                )
                halves = [
                    _load(builder, shifted(builder, row, 16 * value_bytes * half), dtype, scale) for half in range(2)
                ]
                for g in range(num_heads):
                    weight = _broadcast(builder, shifted(builder, weights, SCORE_STRIDE * g, (loop.index, 4)))
                    for half in range(2):
                        total = totals[g, half]
                        builder.store(_fma(builder, halves[half], weight, builder.load(total)), total)
            for g, half in places:
                _store(builder, shifted(builder, values, (stride, g), 64 * half), builder.load(totals[g, half]))
            return target.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile
