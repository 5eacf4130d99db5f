"""The lane operations that only the grid types need: signs as bits, scales as bytes, both spread over a chunk of
weights.

Chunk 0..3 of a super-block is its weights 64 chunk .. 64 chunk + 63. Functions that take a `chunk` want it to be a
constant.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kimi_lite.native.half import widen_half
from kimi_lite.native.vectors import (
    Vec,
    bitcaster,
    constant,
    converter,
    f32x8,
    f32x16,
    i8x16,
    i8x32,
    i8x64,
    i16x16,
    i16x32,
    i32x8,
    i32x16,
    loader,
    maker,
    shuffler,
    unary,
)

_I32 = ir.IntType(32)
i8x8, i16x8 = Vec("i8", 8), Vec("i16", 8)

# Loads, conversions, shuffles -----------------------------------------------------------------------------------------

load_i32x8, load_i16x8, load_i16x32 = (loader(v, v.llvm) for v in (i32x8, i16x8, i16x32))
load_widened_i8x8 = loader(i16x8, i8x8.llvm, lambda builder, value: builder.zext(value, i16x8.llvm))
narrow_i16x32, narrow_i16x16 = converter(i16x32, i8x32, "trunc"), converter(i16x16, i8x16, "trunc")
bytes_of_i32x8, bytes_of_i16x8 = bitcaster(i32x8, i8x32), bitcaster(i16x8, i8x16)
bit_counts = unary(i8x32, "llvm.ctpop.v32i8")
even_f32x16 = shuffler(f32x16, f32x8, range(0, 16, 2))
odd_i32x16 = shuffler(i32x16, i32x8, range(1, 16, 2))
four_times_upper_i16x8 = shuffler(i16x8, i16x16, [4 + i // 4 for i in range(16)])  # lanes 4 4 4 4 5 ...
twice_i8x8 = shuffler(i8x16, i8x16, [i // 2 for i in range(16)])  # bytes 0 0 1 1 ...
twice_lowest_bytes = shuffler(i8x32, i8x16, [4 * (i // 2) for i in range(16)])  # of 32-bit lanes: bytes 0 0 4 4 ...
twice_indices = shuffler(
    i8x64, i8x64, [8 * (i // 8) + i // 2 % 4 for i in range(64)]
)  # bytes 0 0 1 1 2 2 3 3 of every 8
shifts_0_3_6_9 = maker(i16x16, [0, 3, 6, 9] * 4)


@intrinsic
def twice_i8x16(typingctx, a):
    """16 bytes as 32 words: 0 0 1 1 ..."""

    def codegen(context, builder, sig, args):
        lanes = ir.Constant(ir.VectorType(_I32, 32), [i // 2 for i in range(32)])
        return builder.zext(builder.shuffle_vector(args[0], args[0], lanes), i16x32.llvm)

    return i16x32(i8x16), codegen


def _chunk_shuffler(source: Vec, result: Vec, lane_of: Callable[[int, int], int]):
    """Makes `f(a, chunk)`: lane i of the result is lane_of(chunk, i) of `a`, or zero from the number of its lanes
    on."""

    @intrinsic(prefer_literal=True)
    def shuffle(typingctx, a, chunk):
        if not isinstance(chunk, types.IntegerLiteral):
            return None
        lanes = [lane_of(chunk.literal_value, i) for i in range(result.llvm.count * result.llvm.element.width // 8)]

        def codegen(context, builder, sig, args):
            mask = ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
            return builder.bitcast(builder.shuffle_vector(args[0], constant(source, 0), mask), result.llvm)

        return result(source, chunk), codegen

    return shuffle


# The chunk's four scales of 16 weights as the products want them: 16 bits for every pair of weights.
spread_scales = _chunk_shuffler(i8x16, i16x32, lambda chunk, i: 16 if i % 2 else 4 * chunk + i // 16)
# The chunk's 8 bytes, each 8 times.
eight_times = _chunk_shuffler(i8x32, i8x64, lambda chunk, i: 8 * chunk + i // 8)
# The same, where they are the first 4 bytes of two groups of 8.
eight_times_sparse = _chunk_shuffler(i8x64, i8x64, lambda chunk, i: 16 * chunk + 8 * (i // 32) + i // 8 % 4)

# Signs ----------------------------------------------------------------------------------------------------------------


def _negate(builder, is_negative, x):
    return builder.select(is_negative, builder.sub(constant(i8x64, 0), x), x)


@intrinsic
def negate_where(typingctx, x, signs):
    """x with the sign changed where the bit of the weight is set: byte i of `signs` holds it at bit i % 8."""

    def codegen(context, builder, sig, args):
        bits = builder.and_(args[1], constant(i8x64, [1 << i % 8 for i in range(64)]))
        return _negate(builder, builder.icmp_unsigned("!=", bits, constant(i8x64, 0)), args[0])

    return i8x64(i8x64, i8x64), codegen


@intrinsic
def negate_by_mask(typingctx, x, mask):
    """x with the sign changed in the lanes whose bit of the 64-bit mask is set."""

    def codegen(context, builder, sig, args):
        return _negate(builder, builder.bitcast(args[1], ir.VectorType(ir.IntType(1), 64)), args[0])

    return i8x64(i8x64, types.uint64), codegen


@intrinsic(prefer_literal=True)
def add_eighths(typingctx, codes, nibbles, chunk):
    """codes + 2 in every 8 bytes whose nibble has a clear top bit; i16x32 `nibbles`: low ones and high ones in turn."""
    if not isinstance(chunk, types.IntegerLiteral):
        return None
    lanes = ir.Constant(ir.VectorType(_I32, 8), list(range(8 * chunk.literal_value, 8 * chunk.literal_value + 8)))

    def codegen(context, builder, sig, args):
        top_bits = builder.and_(args[1], constant(i16x32, [8, 128] * 16))
        is_clear = builder.icmp_unsigned("==", top_bits, constant(i16x32, 0))
        is_clear = builder.shuffle_vector(is_clear, is_clear, lanes)
        points = builder.bitcast(args[0], ir.VectorType(ir.IntType(64), 8))
        more = builder.add(points, ir.Constant(points.type, [0x0202020202020202] * 8))
        return builder.bitcast(builder.select(is_clear, more, points), i8x64.llvm)

    return i8x64(i8x64, i16x32, chunk), codegen


@intrinsic
def f16_from_bits(typingctx, bits):
    """The float32 value of a float16 given as the low 16 bits of a number."""

    def codegen(context, builder, sig, args):
        half = builder.bitcast(builder.trunc(args[0], ir.IntType(16)), ir.HalfType())
        return widen_half(builder, half)

    return types.float32(types.uint64), codegen
