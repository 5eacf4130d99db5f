"""SIMD operations that Python operators cannot spell: loads, stores, conversions, shuffles, sums; for every ISA from
one source.

Loads and stores need no alignment and check no bounds. Integers are bits: `>>` is logical.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kimi_lite.native.half import narrow_to_half, widen_half, widen_half_bits
from kimi_lite.native.isa import AVX512_VNNI, isa
from kimi_lite.native.vectors import (
    Vec,
    binary,
    bitcaster,
    broadcaster,
    constant,
    converter,
    divider,
    extender,
    f32x8,
    f32x16,
    fuser,
    halver,
    i8x16,
    i8x32,
    i8x64,
    i16x16,
    i16x32,
    i32x8,
    i32x16,
    loader,
    maker,
    pointer,
    reducer,
    shuffler,
    shuffler_of_two,
    splat,
    storer,
    unary,
)

_I32 = ir.IntType(32)

# Loads and stores -----------------------------------------------------------------------------------------------------

load_i8x16, load_i8x32, load_i8x64 = (loader(v, v.llvm) for v in (i8x16, i8x32, i8x64))
load_i16x16, load_i32x16 = loader(i16x16, i16x16.llvm), loader(i32x16, i32x16.llvm)
load_f32x16, load_f32x8 = loader(f32x16, f32x16.llvm), loader(f32x8, f32x8.llvm)
load_f16x16 = loader(f32x16, Vec("f16", 16).llvm, widen_half)
load_bf16x16 = loader(
    f32x16, i16x16.llvm, lambda b, v: b.bitcast(b.shl(b.zext(v, i32x16.llvm), constant(i32x16, 16)), f32x16.llvm)
)
load_f16 = loader(types.float32, ir.IntType(16), widen_half_bits)
load_f32 = loader(types.float32, ir.FloatType())
load_i64 = loader(types.int64, ir.IntType(64))
load_u64 = loader(types.uint64, ir.IntType(64))
load_i32 = loader(types.int32, ir.IntType(32))
load_u32 = loader(types.uint32, ir.IntType(32))
load_u16 = loader(types.uint16, ir.IntType(16))


def _to_bf16(builder, value):
    """float32 lanes as bfloat16 bits, rounded to nearest even; NaN, which rounding could carry into the sign, stays
    NaN."""
    bits = builder.bitcast(value, i32x16.llvm)
    odd = builder.and_(builder.lshr(bits, constant(i32x16, 16)), constant(i32x16, 1))
    rounded = builder.add(builder.add(bits, constant(i32x16, 0x7FFF)), odd)
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), constant(i32x16, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, constant(i32x16, 16)), i16x16.llvm)


store_f32x16 = storer(f32x16, f32x16.llvm)
store_f16x16 = storer(f32x16, Vec("f16", 16).llvm, narrow_to_half)
store_bf16x16 = storer(f32x16, i16x16.llvm, _to_bf16)
store_f32x8 = storer(f32x8, f32x8.llvm)
store_i8x16, store_i8x32, store_i8x64 = (storer(v, v.llvm) for v in (i8x16, i8x32, i8x64))
store_i32x16 = storer(i32x16, i32x16.llvm)
store_f32 = storer(types.float32, ir.FloatType())
store_f16 = storer(types.float32, ir.HalfType(), narrow_to_half)
store_i16 = storer(types.int16, ir.IntType(16))
store_i32 = storer(types.int32, ir.IntType(32))
store_i64 = storer(types.int64, ir.IntType(64))

# Constants, broadcasts, shuffles --------------------------------------------------------------------------------------

zero_i8x16 = maker(i8x16, 0)
zero_i32x16 = maker(i32x16, 0)
zero_f32x8, zero_f32x16 = maker(f32x8, 0.0), maker(f32x16, 0.0)
splat_f32x8, splat_f32x16 = broadcaster(f32x8, types.float32), broadcaster(f32x16, types.float32)
splat_i32x16 = broadcaster(i32x16, types.int32)

join_i8x16 = shuffler_of_two(i8x16, i8x32, range(32))  # (16, 16) -> 32
join_i8x32 = shuffler_of_two(i8x32, i8x64, range(64))  # (32, 32) -> 64
twice_i8x32 = shuffler(i8x32, i8x64, [*range(32)] * 2)  # 32 -> the same 32 twice
low_i8x64 = shuffler(i8x64, i8x32, range(32))
low_f32x16, high_f32x16 = shuffler(f32x16, f32x8, range(8)), shuffler(f32x16, f32x8, range(8, 16))

# Conversions and arithmetic -------------------------------------------------------------------------------------------

int_to_f32x8, int_to_f32x16 = converter(i32x8, f32x8, "sitofp"), converter(i32x16, f32x16, "sitofp")
f32_to_i32x16 = converter(f32x16, i32x16, "fptosi")  # truncates: round first
narrow_i32x16 = converter(i32x16, i8x16, "trunc")
widen_i8x16 = converter(i8x16, i32x16, "zext")
widen_signed_i8x16 = converter(i8x16, i32x16, "sext")
round_f32x16 = unary(f32x16, "llvm.rint.v16f32")  # to nearest even
divide_f32x16 = divider(f32x16)
max_f32x16 = binary(f32x16, "llvm.maxnum.v16f32")
sum_f32x16, sum_f32x8 = halver(f32x16), halver(f32x8)
largest_f32x16 = reducer(f32x16, types.float32, "llvm.vector.reduce.fmax.v16f32")
sum_i32x16 = reducer(i32x16, types.int32, "llvm.vector.reduce.add.v16i32")
max_i32x16 = binary(i32x16, "llvm.smax.v16i32")
largest_i32x16 = reducer(i32x16, types.int32, "llvm.vector.reduce.smax.v16i32")
words_of = bitcaster(i8x64, i16x32)
f32_bits = bitcaster(f32x16, i32x16)
f32_from_bits = bitcaster(i32x16, f32x16)


@intrinsic
def scalar_from_bits(typingctx, bits):
    """The float32 whose bits are this int32."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def clamp_f32x16(typingctx, x, low, high):
    """x between low and high; NaN stays NaN, which the max and min of `llvm.maxnum` would replace."""

    def codegen(context, builder, sig, args):
        x, low, high = args
        x = builder.select(builder.fcmp_ordered(">", low, x), low, x)
        return builder.select(builder.fcmp_ordered(">", x, high), high, x)

    return f32x16(f32x16, f32x16, f32x16), codegen


fma_f32x16 = fuser(f32x16, "llvm.fma.v16f32")


@intrinsic
def pack_u64(typingctx, low, high):
    """Two uint64 as 16 bytes."""

    def codegen(context, builder, sig, args):
        pair = ir.Constant(ir.VectorType(ir.IntType(64), 2), ir.Undefined)
        for lane, value in enumerate(args):
            pair = builder.insert_element(pair, value, ir.Constant(_I32, lane))
        return builder.bitcast(pair, i8x16.llvm)

    return i8x16(types.uint64, types.uint64), codegen


@intrinsic
def lane_f32x16(typingctx, a, index):
    """One lane, by number."""

    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], context.cast(builder, args[1], sig.args[1], types.int32))

    return types.float32(f32x16, types.int64), codegen


extend_f32x8, extend_i32x8 = extender(f32x8, f32x16), extender(i32x8, i32x16)


def _spreaders(lanes_per_group: int):
    """Four functions: lanes of chunk k = 0..3 of a super-block, each of its groups' values repeated (4 products a
    lane)."""
    groups = 16 // lanes_per_group
    return [shuffler(f32x16, f32x16, [groups * k + i // lanes_per_group for i in range(16)]) for k in range(4)]


spread16_0, spread16_1, spread16_2, spread16_3 = _spreaders(4)  # groups of 16 weights
spread32_0, spread32_1, spread32_2, spread32_3 = _spreaders(8)  # groups of 32


def _shuffled_columns(builder, source, stride, adapt) -> list:
    """Four rounds of perfect shuffles of 16 rows, each in one register."""
    low = [i // 2 + 16 * (i % 2) for i in range(16)]
    masks = [ir.Constant(ir.VectorType(_I32, 16), m) for m in (low, [i + 8 for i in low])]
    rows = []
    for row in range(16):
        address = builder.add(source, builder.mul(stride, ir.Constant(stride.type, row)))
        value = builder.load(pointer(builder, address, i32x16.llvm))
        value.align = 1
        rows.append(adapt(value, i32x16))
    for _ in range(4):
        rows = [builder.shuffle_vector(rows[i], rows[i + 8], mask) for i in range(8) for mask in masks]
    return rows


def _columns_of_eighths(builder, source, stride, adapt) -> list:
    """By parts of 8 rows and 4 words, for registers of 32 bytes: loading puts row i and row i + 4 into the halves of
    one, so that two rounds of shuffles within halves are enough."""
    quarter = ir.VectorType(_I32, 4)

    def shuffled(first, second, mask):
        return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, 8), mask))

    def load(row: int, word: int):
        address = builder.add(source, builder.mul(stride, ir.Constant(stride.type, row)))
        value = builder.load(pointer(builder, builder.add(address, ir.Constant(stride.type, 4 * word)), quarter))
        value.align = 1
        return value

    columns = []
    for word in range(0, 16, 4):
        halves = []
        for top in (0, 8):
            a, b, c, d = (
                adapt(shuffled(load(top + i, word), load(top + i + 4, word), list(range(8))), i32x8) for i in range(4)
            )
            low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
            pairs = [(shuffled(a, b, each), shuffled(c, d, each)) for each in (low, high)]
            first, second = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
            halves.append([shuffled(*pair, each) for pair in pairs for each in (first, second)])
        joined = ir.Constant(ir.VectorType(_I32, 16), list(range(16)))
        columns += [builder.shuffle_vector(upper, lower, joined) for upper, lower in zip(*halves, strict=True)]
    return columns


def _emit_transposed(builder, source, stride, target, num_out: int, bias: int) -> None:
    def adapt(value, vec):
        if not bias:
            return value
        codes = Vec("i8", 4 * vec.lanes)
        return builder.bitcast(builder.add(builder.bitcast(value, codes.llvm), constant(codes, bias)), vec.llvm)

    columns = _shuffled_columns if isa().name == AVX512_VNNI else _columns_of_eighths
    for i, column in enumerate(columns(builder, source, stride, adapt)[:num_out]):
        address = builder.add(target, ir.Constant(target.type, 64 * i))
        builder.store(column, pointer(builder, address, i32x16.llvm)).align = 1


def _transposer(num_out: int):
    """Makes `f(source, stride, target)`: 16 rows of 16 words, `stride` bytes apart, become columns: `num_out` x 64
    bytes."""

    @intrinsic
    def transpose(typingctx, source, stride, target):
        def codegen(context, builder, sig, args):
            _emit_transposed(builder, *args, num_out, 0)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return transpose


transpose_16x16, transpose_16x8 = _transposer(16), _transposer(8)


@intrinsic(prefer_literal=True)
def transpose_biased(typingctx, source, stride, target, bias):
    """transpose_16x16 of bytes, to each of which the constant `bias` is added."""
    if not isinstance(bias, types.IntegerLiteral):
        return None

    def codegen(context, builder, sig, args):
        _emit_transposed(builder, *args[:3], 16, bias.literal_value)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, bias), codegen


broadcast_f32 = loader(f32x16, ir.FloatType(), lambda b, v: splat(b, f32x16, v))
