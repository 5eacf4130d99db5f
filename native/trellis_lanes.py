"""The lane operations that only the trellis types need: their generator, and what becomes of packed indices.

Chunk 0..3 of a super-block is its weights 64 chunk .. 64 chunk + 63. Functions that take a `chunk` want it to be a
constant.
"""

from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kimi_lite.native.isa import AVX512_VNNI, PORTABLE, isa
from kimi_lite.native.simd_dot import unsigned_dot_of
from kimi_lite.native.types.trellis.layout import POWERS, SIX_BITS
from kimi_lite.native.vectors import (
    call_llvm,
    constant,
    converter,
    i8x16,
    i8x32,
    i8x64,
    i16x16,
    i16x32,
    i32x8,
    i32x16,
    in_halves,
    maker,
    shuffler,
)

_I32 = ir.IntType(32)

widen_i16x16 = converter(i16x16, i32x16, "zext")
shifts_of_eight = maker(i32x16, [8 + 3 * (i % 8) for i in range(16)])
four_times_each_byte = shuffler(i8x16, i8x32, [i // 4 for i in range(32)])
twice_i8x16 = shuffler(i8x16, i8x32, [*range(16)] * 2)
widen_i8x32 = converter(i8x32, i16x32, "zext")
shifts_8_7_6_5 = maker(i16x32, [8, 7, 6, 5] * 8)
shifts_8_then_4 = maker(i16x32, [8] * 16 + [4] * 16)


def _signed(words: Sequence[int], bits: int) -> list[int]:
    """Words of so many bits as LLVM's constants take them."""
    return [word - (1 << bits) if word >> (bits - 1) else word for word in words]


# The generator --------------------------------------------------------------------------------------------------------


def _packed_sums(builder, quarters: list):
    """Four i32x16 of states -> i8x64: the sums of the six low bits of their bytes, 0..252.

    The packing instructions work within each 16 bytes of a register: byte 16 j + 4 t + i comes from word 4 j + i of
    quarter t.
    """
    ones, zero = constant(i8x64, 1), constant(i32x16, 0)
    masked = [builder.bitcast(builder.and_(states, constant(i32x16, SIX_BITS)), i8x64.llvm) for states in quarters]
    sums = [unsigned_dot_of(builder, zero, states, ones) for states in masked]
    if isa().name == PORTABLE:
        return _packed_by_shuffles(builder, sums)
    if isa().name == AVX512_VNNI:
        low, high = (_pack(builder, "512", 16, *sums[t : t + 2]) for t in (0, 2))
        return _pack(builder, "512", 8, low, high)
    halves = zip(*(in_halves(builder, each, 16) for each in sums), strict=True)
    packed = [_pack(builder, "", 8, *(_pack(builder, "", 16, *half[t : t + 2]) for t in (0, 2))) for half in halves]
    return builder.shuffle_vector(*packed, ir.Constant(ir.VectorType(_I32, 64), list(range(64))))


def _pack(builder, width: str, bits: int, low, high):
    """Two registers of integers as one of half as many bits each (vpackusdw, vpackuswb)."""
    kind = {16: "packusdw", 8: "packuswb"}[bits]
    name = f"llvm.x86.avx512.{kind}.512" if width else f"llvm.x86.avx2.{kind}"
    return call_llvm(builder, name, ir.VectorType(ir.IntType(bits), 2 * low.type.count), [low, high])


def _packed_by_shuffles(builder, sums: list):
    narrow = [builder.trunc(each, i8x16.llvm) for each in sums]
    pairs = [
        builder.shuffle_vector(*narrow[t : t + 2], ir.Constant(ir.VectorType(_I32, 32), list(range(32))))
        for t in (0, 2)
    ]
    order = [16 * (i // 4 % 4) + 4 * (i // 16) + i % 4 for i in range(64)]
    return builder.shuffle_vector(*pairs, ir.Constant(ir.VectorType(_I32, 64), order))


def _times(builder, states, lanes: list[int], powers: Sequence[int]):
    """The states of these lanes, times four powers of the multiplier in turns."""
    spread = builder.shuffle_vector(states, states, ir.Constant(ir.VectorType(_I32, 16), lanes))
    return builder.mul(spread, constant(i32x16, _signed(powers, 32) * 4))


@intrinsic(prefer_literal=True)
def eight_each(typingctx, states, chunk):
    """i8x64: the chunk's sums of 8 weights for each of 8 states; `states` i32x16 are those of chunks 0 and 1, or of 2
    and 3."""
    if not isinstance(chunk, types.IntegerLiteral):
        return None
    first = 8 * (chunk.literal_value % 2)

    def codegen(context, builder, sig, args):
        quarters = [
            _times(builder, args[0], [first + 2 * (i // 4) + state for i in range(16)], powers)
            for state in (0, 1)
            for powers in (POWERS[:4], POWERS[4:])
        ]
        return _packed_sums(builder, quarters)

    return i8x64(i32x16, chunk), codegen


def _sums_of_words(builder, states, lanes: list[int]):
    """i16x32: the sums of 8 weights of each of four states below 2^16, from two halves of the product."""
    spread = builder.shuffle_vector(states, states, ir.Constant(ir.VectorType(_I32, 32), lanes))
    low_factors, high_factors = (
        constant(i16x32, _signed([power >> shift & 0xFFFF for power in POWERS], 16) * 4) for shift in (0, 16)
    )
    low = builder.mul(spread, low_factors)
    high = builder.add(_high_product(builder, spread, low_factors), builder.mul(spread, high_factors))
    six_bits = constant(i16x32, SIX_BITS & 0xFFFF)
    return _pair_sums(builder, builder.add(builder.and_(low, six_bits), builder.and_(high, six_bits)))


def _high_product(builder, a, b):
    """The upper 16 bits of unsigned products, in the words that LLVM knows as vpmulhuw."""
    wide = ir.VectorType(_I32, a.type.count)
    product = builder.mul(builder.zext(a, wide), builder.zext(b, wide))
    return builder.trunc(builder.lshr(product, ir.Constant(wide, [16] * a.type.count)), a.type)


def _pair_sums(builder, words):
    """Of the two bytes of each of i16x32 (vpmaddubsw)."""
    if isa().name == PORTABLE:
        low = builder.and_(words, constant(i16x32, 0xFF))
        return builder.add(low, builder.lshr(words, constant(i16x32, 8)))
    pairs = builder.bitcast(words, i8x64.llvm)
    if isa().name == AVX512_VNNI:
        return call_llvm(builder, "llvm.x86.avx512.pmaddubs.w.512", i16x32.llvm, [pairs, constant(i8x64, 1)])
    halves = in_halves(builder, pairs, 64)
    sums = [call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", i16x16.llvm, [h, constant(i8x32, 1)]) for h in halves]
    return builder.shuffle_vector(*sums, ir.Constant(ir.VectorType(_I32, 32), list(range(32))))


@intrinsic(prefer_literal=True)
def eight_each_of_words(typingctx, states, chunk):
    """`eight_each` for the 32 states of a super-block as i16x32."""
    if not isinstance(chunk, types.IntegerLiteral):
        return None
    first = 8 * chunk.literal_value

    def codegen(context, builder, sig, args):
        sums = [_sums_of_words(builder, args[0], [first + 2 * (i // 8) + state for i in range(32)]) for state in (0, 1)]
        if isa().name == PORTABLE:
            narrow = [builder.trunc(each, i8x32.llvm) for each in sums]
            order = [32 * (i // 8 % 2) + 8 * (i // 16) + i % 8 for i in range(64)]
            return builder.shuffle_vector(*narrow, ir.Constant(ir.VectorType(_I32, 64), order))
        if isa().name == AVX512_VNNI:
            return _pack(builder, "512", 8, *sums)
        halves = zip(*(in_halves(builder, each, 32) for each in sums), strict=True)
        packed = [_pack(builder, "", 8, *half) for half in halves]
        return builder.shuffle_vector(*packed, ir.Constant(ir.VectorType(_I32, 64), list(range(64))))

    return i8x64(i16x32, chunk), codegen


@intrinsic
def four_each(typingctx, states):
    """i8x64: a chunk's sums of 4 weights for each of its 16 states."""

    def codegen(context, builder, sig, args):
        lanes = [[4 * (i // 4) + state for i in range(16)] for state in range(4)]
        return _packed_sums(builder, [_times(builder, args[0], each, POWERS[:4]) for each in lanes])

    return i8x64(i32x16), codegen


# Small operations -----------------------------------------------------------------------------------------------------


@intrinsic
def magnitudes_i8x64(typingctx, a):
    """Their absolute values; none is -128."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "llvm.abs.v64i8", i8x64.llvm, [args[0], ir.Constant(ir.IntType(1), 0)])

    return i8x64(i8x64), codegen


def values_of_nibbles(values: Sequence[int]):
    """Makes `f(codes)`: i8x16 of codes 0..15 to i8x16 of `values`."""
    assert len(values) == 16, values

    @intrinsic
    def look_up(typingctx, codes):
        def codegen(context, builder, sig, args):
            if isa().name != PORTABLE:
                return call_llvm(builder, "llvm.x86.ssse3.pshuf.b.128", i8x16.llvm, [constant(i8x16, values), args[0]])
            result = constant(i8x16, values[0])
            for code, value in enumerate(values[1:], 1):
                is_code = builder.icmp_unsigned("==", args[0], constant(i8x16, code))
                result = builder.select(is_code, constant(i8x16, value), result)
            return result

        return i8x16(i8x16), codegen

    return look_up


@intrinsic(prefer_literal=True)
def each_of_two(typingctx, words, chunk):
    """i32x16: the chunk's two of i32x8 `words`, each eight times."""
    if not isinstance(chunk, types.IntegerLiteral):
        return None
    lanes = [2 * chunk.literal_value + i // 8 for i in range(16)]

    def codegen(context, builder, sig, args):
        return builder.shuffle_vector(args[0], args[0], ir.Constant(ir.VectorType(_I32, 16), lanes))

    return i32x16(i32x8, chunk), codegen


@intrinsic(prefer_literal=True)
def negate_where_set(typingctx, x, bits, chunk):
    """x with the sign changed where the byte of `bits` has the bit of the weight's 32 set: twice `chunk`, or one more
    in the upper half."""
    if not isinstance(chunk, types.IntegerLiteral):
        return None
    own = constant(i8x64, _signed([1 << (2 * chunk.literal_value + i // 32) for i in range(64)], 8))

    def codegen(context, builder, sig, args):
        x, bits, _ = args
        is_set = builder.icmp_unsigned("!=", builder.and_(bits, own), constant(i8x64, 0))
        return builder.select(is_set, builder.sub(constant(i8x64, 0), x), x)

    return i8x64(i8x64, i8x64, chunk), codegen
