"""The lane operations that only the grid types need: index bits, signs as bits, scales per 16 weights.

Chunk c = 0..3 of a super-block is its weights 64 c .. 64 c + 63; functions whose name ends in a number serve that chunk.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from native.half import widen_half
from native.simd import (
    Vec,
    _bitcaster,
    _constant,
    _converter,
    _loader,
    _maker,
    _shuffler,
    _unary,
    f32x8,
    f32x16,
    i8x16,
    i8x32,
    i8x64,
    i16x16,
    i16x32,
    i32x8,
    i32x16,
)

_I32 = ir.IntType(32)
i16x8 = Vec("i16", 8)

# Loads, conversions, shuffles -----------------------------------------------------------------------------------------

load_i32x8, load_i16x8, load_i16x32 = (_loader(v, v.llvm) for v in (i32x8, i16x8, i16x32))
widen_i8x32 = _converter(i8x32, i16x32, "zext")
narrow_i16x32 = _converter(i16x32, i8x32, "trunc")
widen_i16x16 = _converter(i16x16, i32x16, "zext")
words_of_i32x8, bytes_of_i32x8 = _bitcaster(i32x8, i16x16), _bitcaster(i32x8, i8x32)
even_f32x16 = _shuffler(f32x16, f32x8, range(0, 16, 2))
byte_pairs_of_quads = _shuffler(i8x64, i8x64, [8 * (i // 8) + i // 2 % 4 for i in range(64)])  # bytes 0 0 1 1 2 2 3 3 of every 8
odd_i32x16 = _shuffler(i32x16, i32x8, range(1, 16, 2))
twice_i16x8 = _shuffler(i16x8, i16x16, [i // 2 for i in range(16)])  # a a b b ...
four_times_i16x8 = _shuffler(i16x8, i16x32, [i // 4 for i in range(32)])
four_times_upper_i16x8 = _shuffler(i16x8, i16x16, [4 + i // 4 for i in range(16)])  # of the last 4
bit_counts = _unary(i8x32, "llvm.ctpop.v32i8")


def _byte_words(lanes: list[int], result: Vec):
    """Chosen bytes of 16, each zero-extended to a 16-bit lane."""

    @intrinsic
    def pick(typingctx, a):
        def codegen(context, builder, sig, args):
            mask = ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
            chosen = builder.shuffle_vector(args[0], ir.Constant(i8x16.llvm, ir.Undefined), mask)
            return builder.zext(chosen, result.llvm)

        return result(i8x16), codegen

    return pick


four_times_i8x8 = _byte_words([i // 4 for i in range(32)], i16x32)
twice_i8x16 = _byte_words([i // 2 for i in range(32)], i16x32)
twice_upper_i8x8 = _byte_words([8 + i // 2 for i in range(16)], i16x16)  # byte 8, 8, 9, 9, ...
interleave_twice_i8x4 = _byte_words([i // 4 + 4 * (i // 2 % 2) for i in range(16)], i16x16)  # byte 0, 0, 4, 4, 1, 1, ...

# Shift counts of the lanes --------------------------------------------------------------------------------------------

shifts_0_2_4_6 = _maker(i16x32, [0, 2, 4, 6] * 8)
shifts_3_7 = _maker(i16x32, [3, 7] * 16)
group_shifts_0_4 = _maker(i16x16, [0, 4] * 8)
group_shifts_0_3_6_9, nine_i16x16 = _maker(i16x16, [0, 3, 6, 9] * 4), _maker(i16x16, 9)

# Signs ----------------------------------------------------------------------------------------------------------------


def _eight_times(chunk: int):
    """Makes `f(bytes)`: each of the chunk's 8 bytes repeated 8 times."""
    return _shuffler(i8x32, i8x64, [8 * chunk + i // 8 for i in range(64)])


eight_times_0, eight_times_1, eight_times_2, eight_times_3 = (_eight_times(chunk) for chunk in range(4))


def _sparse_eight_times(chunk: int):
    """Makes `f(bytes)`: as above, where a chunk's bytes are the first 4 of its two groups of 8."""
    return _shuffler(i8x64, i8x64, [16 * chunk + 8 * (i // 32) + i // 8 % 4 for i in range(64)])


sparse_eight_times_0, sparse_eight_times_1, sparse_eight_times_2, sparse_eight_times_3 = (
    _sparse_eight_times(chunk) for chunk in range(4)
)


@intrinsic
def negate_where(typingctx, x, signs):
    """x with the sign changed where the bit of the weight is set: byte i of `signs` holds it at bit i % 8."""

    def codegen(context, builder, sig, args):
        bits = builder.and_(args[1], _constant(i8x64, [1 << i % 8 for i in range(64)]))
        is_negative = builder.icmp_unsigned("!=", bits, _constant(i8x64, 0))
        return builder.select(is_negative, builder.sub(_constant(i8x64, 0), args[0]), args[0])

    return i8x64(i8x64, i8x64), codegen


@intrinsic
def negate_by_mask(typingctx, x, mask):
    """x with the sign changed in the lanes whose bit of the 64-bit mask is set."""

    def codegen(context, builder, sig, args):
        is_negative = builder.bitcast(args[1], ir.VectorType(ir.IntType(1), 64))
        return builder.select(is_negative, builder.sub(_constant(i8x64, 0), args[0]), args[0])

    return i8x64(i8x64, types.uint64), codegen


@intrinsic
def set_bit_8(typingctx, words, mask):
    """The 32 words with bit 8 set in those whose bit of the 32-bit mask is."""

    def codegen(context, builder, sig, args):
        is_set = builder.bitcast(args[1], ir.VectorType(ir.IntType(1), 32))
        return builder.select(is_set, builder.or_(args[0], _constant(i16x32, 256)), args[0])

    return i16x32(i16x32, types.uint32), codegen


# Scales and units -----------------------------------------------------------------------------------------------------


def _eight_lanes_each(chunk: int):
    """Makes `f(scales)`: the chunk's 4 scales of 16 weights as the product wants them, one a pair of weights."""
    return _shuffler(i16x16, i16x32, [4 * chunk + i // 8 for i in range(32)])


spread_0, spread_1, spread_2, spread_3 = (_eight_lanes_each(chunk) for chunk in range(4))


def _sixteen_lanes_each(chunk: int):
    """Makes `f(scales)`: the same of two scales of 32 weights, each in the third of its group's four lanes."""
    return _shuffler(i16x32, i16x32, [8 * chunk + 4 * (i // 16) + 2 for i in range(32)])


sparse_spread_0, sparse_spread_1, sparse_spread_2, sparse_spread_3 = (_sixteen_lanes_each(chunk) for chunk in range(4))
words_of_i32x16 = _bitcaster(i32x16, i16x32)


@intrinsic
def f16_from_bits(typingctx, bits):
    """The float32 value of a float16 given as the low 16 bits of a number."""

    def codegen(context, builder, sig, args):
        return widen_half(builder, builder.bitcast(builder.trunc(args[0], ir.IntType(16)), ir.HalfType()))

    return types.float32(types.uint64), codegen
