"""Scales of quantized blocks: gathered from where they lie, and repeated for every weight of their groups."""

from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kimi_lite.native.half import widen_half
from kimi_lite.native.isa import AVX2, AVX512_VNNI, AVX_VNNI, PORTABLE, isa
from kimi_lite.native.simd_bytes import opaque
from kimi_lite.native.vectors import (
    Vec,
    binary,
    constant,
    f32x8,
    f32x16,
    i8x16,
    i16x16,
    i16x32,
    i32x16,
    in_halves,
    pointer,
    shuffler,
    splat,
)

_BYTE, _I32 = ir.IntType(8), ir.IntType(32)


@intrinsic
def spreadable(typingctx, words):
    """16 scales, ready for the functions below. LLVM would merge their shuffles with what made the scales, to worse
    code."""

    def codegen(context, builder, sig, args):
        lanes = (
            [*range(8), *range(8), *range(8, 16), *range(8, 16)] if isa().name in (AVX2, AVX_VNNI) else [*range(16)] * 2
        )
        mask = ir.Constant(ir.VectorType(_I32, 32), lanes)
        ready = builder.shuffle_vector(args[0], ir.Constant(i16x16.llvm, ir.Undefined), mask)
        if isa().name == PORTABLE:
            return ready
        halves = (
            [opaque(builder, half) for half in in_halves(builder, ready, 32)] if isa().name != AVX512_VNNI else None
        )
        if halves:
            return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(_I32, 32), list(range(32))))
        return opaque(builder, ready)

    return i16x32(i16x16), codegen


def _word_spreaders(words_per_group: int):
    """Four functions: word lanes of chunk k = 0..3 of a super-block, each of its groups' scales repeated (2 products a
    lane).

    AVX2 shuffles within 16 bytes only: there a lane takes a scale from its own copy of 8.
    """
    is_by_lanes = isa().name in (AVX2, AVX_VNNI)
    masks = []
    for k in range(4):
        groups = [32 * k // words_per_group + i // words_per_group for i in range(32)]
        own_copy = [16 * (g // 8) + 8 * (i // 8 % 2) + g % 8 for i, g in enumerate(groups)]
        masks.append(own_copy if is_by_lanes else groups)
    return [shuffler(i16x32, i16x32, mask) for mask in masks]


words16_0, words16_1, words16_2, words16_3 = _word_spreaders(8)  # groups of 16 weights
words32_0, words32_1, words32_2, words32_3 = _word_spreaders(16)  # groups of 32


# Scales of blocks that lie apart
# ---------------------------------------------------------------------------------------


def _gather(builder, address, element, offsets: Sequence[int]):
    """The numbers at address + offsets as a vector; an offset may come again, and None leaves a zero."""
    distinct = sorted({offset for offset in offsets if offset is not None})
    values = ir.Constant(ir.VectorType(element, len(offsets)), None)
    for lane, offset in enumerate(distinct):
        place = builder.add(address, ir.Constant(address.type, offset))
        number = builder.load(pointer(builder, place, element))
        number.align = 1
        values = builder.insert_element(values, number, ir.Constant(_I32, lane))
    lanes = [len(distinct) if offset is None else distinct.index(offset) for offset in offsets]
    if lanes == list(range(len(distinct))) + lanes[len(distinct) :] and all(
        lane == len(distinct) for lane in lanes[len(distinct) :]
    ):
        return values
    mask = ir.Constant(ir.VectorType(_I32, len(offsets)), lanes)
    return builder.shuffle_vector(values, ir.Constant(values.type, ir.Undefined), mask)


def gather_f16(*offsets: int):
    """Makes `f(address)`: the float16 at 8 byte offsets as f32x8."""
    assert len(offsets) == 8, offsets

    @intrinsic
    def gather(typingctx, address):
        def codegen(context, builder, sig, args):
            bits = _gather(
                builder, args[0], ir.IntType(16), offsets
            )  # as floats each load would wait for its register's past
            return widen_half(builder, builder.bitcast(bits, Vec("f16", 8).llvm))

        return f32x8(types.uintp), codegen

    return gather


def gather_u8(*offsets: int):
    """Makes `f(address)`: the bytes at up to 16 offsets as i8x16, then zeros."""

    @intrinsic
    def gather(typingctx, address):
        def codegen(context, builder, sig, args):
            return _gather(builder, args[0], _BYTE, [*offsets, *[None] * (16 - len(offsets))])

        return i8x16(types.uintp), codegen

    return gather


def gather_u32(*offsets: int):
    """Makes `f(address)`: the 4 bytes at each of 4 offsets as i8x16."""

    @intrinsic
    def gather(typingctx, address):
        def codegen(context, builder, sig, args):
            return builder.bitcast(_gather(builder, args[0], _I32, offsets), i8x16.llvm)

        return i8x16(types.uintp), codegen

    return gather


@intrinsic
def small_floats_f32x16(typingctx, codes):
    """16 bytes of unsigned E4M3 as float32 / 256: bits 3..6 and 0..2 are a float16's; its bias is 8 more."""

    def codegen(context, builder, sig, args):
        bits = builder.shl(
            builder.and_(builder.zext(args[0], i16x16.llvm), constant(i16x16, 0x7F)), constant(i16x16, 7)
        )
        return widen_half(builder, builder.bitcast(bits, Vec("f16", 16).llvm))

    return f32x16(i8x16), codegen


@intrinsic
def zero_where(typingctx, value, codes, code):
    """f32x16 `value`, 0 where the byte of `codes` equals `code`."""

    def codegen(context, builder, sig, args):
        number = context.cast(builder, args[2], sig.args[2], types.int8)
        wanted = splat(builder, i8x16, number)
        return builder.select(builder.icmp_unsigned("==", args[1], wanted), constant(f32x16, 0.0), args[0])

    return f32x16(f32x16, i8x16, types.int64), codegen


min_i32x16 = binary(i32x16, "llvm.umin.v16i32")  # unsigned


# Fields of a word, one a lane
# ------------------------------------------------------------------------------------------

twice_each_i32x16 = shuffler(i32x16, i32x16, [i // 2 for i in range(16)])  # lanes 0 0 1 1 ...


@intrinsic
def where_bits_i32x16(typingctx, bits, value):
    """i32x16 with `value` in lane i where bit i of the word is set, else 0."""

    def codegen(context, builder, sig, args):
        word = builder.trunc(args[0], ir.IntType(16)) if sig.args[0].bitwidth > 16 else args[0]
        flags = builder.bitcast(word, ir.VectorType(ir.IntType(1), 16))
        filled = splat(builder, i32x16, context.cast(builder, args[1], sig.args[1], types.int32))
        return builder.select(flags, filled, constant(i32x16, 0))

    if not (isinstance(bits, types.Integer) and bits.bitwidth >= 16):
        return None
    return i32x16(bits, types.int64), codegen


@intrinsic
def pairs_of_bits_i32x16(typingctx, word):
    """i32x16 of the 16 pairs of bits of a uint32, lowest first."""

    def codegen(context, builder, sig, args):
        shifts = constant(i32x16, [2 * i for i in range(16)])
        return builder.and_(builder.lshr(splat(builder, i32x16, args[0]), shifts), constant(i32x16, 3))

    return i32x16(types.uint32), codegen


@intrinsic
def lowest_bits(typingctx, words):
    """uint64 whose bit i is the lowest one of the i-th of 32 words of 16 bits."""

    def codegen(context, builder, sig, args):
        flags = builder.trunc(builder.bitcast(args[0], i16x32.llvm), ir.VectorType(ir.IntType(1), 32))
        return builder.zext(builder.bitcast(flags, _I32), ir.IntType(64))

    return types.uint64(Vec("i8", 64)), codegen
