"""SIMD for unpacking and scaling quantized blocks: byte tables, bit masks, scaled int8 products. Continues `native.simd`."""

from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from native.isa import AVX512_VNNI, PORTABLE, isa
from native.simd import (
    Vec,
    _call,
    _constant,
    _converter,
    _halves,
    _loader,
    _maker,
    _pointer,
    _shuffler,
    _shuffler2,
    f32x16,
    i8x16,
    i8x32,
    i8x64,
    i16x16,
    i16x32,
    i32x8,
    i32x16,
)

_BYTE, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
f32x2, f32x4 = Vec("f32", 2), Vec("f32", 4)

# Conversions and shuffles ---------------------------------------------------------------------------------------------

widen16_i8x16, widen16_signed_i8x16 = _converter(i8x16, i16x16, "zext"), _converter(i8x16, i16x16, "sext")
twice_each_i8x16 = _shuffler2(i8x16, i8x64, [*range(16)] * 2 + [*range(16, 32)] * 2)  # (a, b) -> a a b b
four_times_i8x16 = _shuffler(i8x16, i8x64, [*range(16)] * 4)
twice_each_quad = _shuffler(i8x32, i8x64, [16 * (i // 32) + 8 * (i // 16 % 2) + i % 8 for i in range(64)])  # 8 bytes twice
halves_0_4_0_4 = _maker(i16x32, ([0] * 8 + [4] * 8) * 2)
quads_0_4 = _maker(i16x32, ([0] * 4 + [4] * 4) * 4)
lanes_0_2_4_6 = _maker(i16x32, [0] * 8 + [2] * 8 + [4] * 8 + [6] * 8)
every_fourth_i8x64 = _shuffler(i8x64, i8x64, [4 * (i % 16) + i // 16 for i in range(64)])  # bytes 0, 4, 8, ..., 1, 5, ...
two_of_four = _shuffler(f32x16, f32x16, [8 * (i // 2 % 2) for i in range(16)])  # [a x 8, b x 8] -> a a b b a a b b ...


def _word_spreaders(words_per_group: int):
    """Four functions: word lanes of chunk k = 0..3 of a super-block, each of its groups' scales repeated (2 products a lane)."""
    groups = 32 // words_per_group
    return [_shuffler(i16x16, i16x32, [groups * k + i // words_per_group for i in range(32)]) for k in range(4)]


words16_0, words16_1, words16_2, words16_3 = _word_spreaders(8)  # groups of 16 weights
words32_0, words32_1, words32_2, words32_3 = _word_spreaders(16)  # groups of 32

# Scales of a pair of blocks --------------------------------------------------------------------------------------------


def _spread(builder, values, vec: Vec):
    """[a, b] as [a x 8, b x 8], or [a, b, c, d] as 4 of each."""
    count = values.type.count
    mask = ir.Constant(ir.VectorType(_I32, 16), [i // (16 // count) for i in range(16)])
    return builder.shuffle_vector(values, ir.Constant(values.type, ir.Undefined), mask)


load_pair_f32 = _loader(f32x16, f32x2.llvm, lambda b, v: _spread(b, v, f32x16))  # 2 float32, 8 times each
load_quad_f32 = _loader(f32x16, f32x4.llvm, lambda b, v: _spread(b, v, f32x16))  # 4 float32, 4 times each


@intrinsic
def pair_f32x16(typingctx, first, second):
    """[first x 8, second x 8]"""

    def codegen(context, builder, sig, args):
        pair = ir.Constant(f32x2.llvm, ir.Undefined)
        for lane, value in enumerate(args):
            pair = builder.insert_element(pair, value, ir.Constant(_I32, lane))
        return _spread(builder, pair, f32x16)

    return f32x16(types.float32, types.float32), codegen


@intrinsic
def quad_f32x16(typingctx, a, b, c, d):
    """[a x 4, b x 4, c x 4, d x 4]"""

    def codegen(context, builder, sig, args):
        quad = ir.Constant(f32x4.llvm, ir.Undefined)
        for lane, value in enumerate(args):
            quad = builder.insert_element(quad, value, ir.Constant(_I32, lane))
        return _spread(builder, quad, f32x16)

    return f32x16(types.float32, types.float32, types.float32, types.float32), codegen


@intrinsic
def load_pair_f16(typingctx, first, second):
    """The float16 at two addresses as [first x 8, second x 8]."""

    def codegen(context, builder, sig, args):
        pair = ir.Constant(ir.VectorType(ir.HalfType(), 2), ir.Undefined)
        for lane, address in enumerate(args):
            value = builder.load(_pointer(builder, address, ir.HalfType()))
            value.align = 1
            pair = builder.insert_element(pair, value, ir.Constant(_I32, lane))
        return _spread(builder, builder.fpext(pair, f32x2.llvm), f32x16)

    return f32x16(types.uintp, types.uintp), codegen


# Tables and masks ------------------------------------------------------------------------------------------------------


def _by_parts(builder, emit, value, lanes: int):
    """emit() of each half of a vector, joined."""
    low, high = (emit(part) for part in _halves(builder, value, lanes))
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes))))


def _select_from(builder, table: Sequence[int], codes):
    """A table look-up as 15 selections, for targets without a byte shuffle."""
    vec = codes.type
    result = ir.Constant(vec, [table[0]] * vec.count)
    for code, value in enumerate(table[1:], 1):
        is_code = builder.icmp_unsigned("==", codes, ir.Constant(vec, [code] * vec.count))
        result = builder.select(is_code, ir.Constant(vec, [value] * vec.count), result)
    return result


def byte_table(values: Sequence[int]):
    """Makes `f(codes)`: i8x64 of codes 0..15 to i8x64 of `values` (vpshufb)."""
    assert len(values) == 16, values

    @intrinsic
    def look_up(typingctx, codes):
        def codegen(context, builder, sig, args):
            if isa().name == PORTABLE:
                return _select_from(builder, values, args[0])
            if isa().name == AVX512_VNNI:
                table = ir.Constant(i8x64.llvm, [*values] * 4)
                return _call(builder, "llvm.x86.avx512.pshuf.b.512", i8x64.llvm, [table, args[0]])
            table = ir.Constant(i8x32.llvm, [*values] * 2)
            shuffle = lambda part: _call(builder, "llvm.x86.avx2.pshuf.b", i8x32.llvm, [table, part])  # noqa: E731
            return _by_parts(builder, shuffle, args[0], 64)

        return i8x64(i8x64), codegen

    return look_up


def float_table(name: str, values: Sequence[float]):
    """Makes `f(index)`: the float32 at `index` of a constant table."""

    @intrinsic
    def look_up(typingctx, index):
        def codegen(context, builder, sig, args):
            kind = ir.ArrayType(ir.FloatType(), len(values))
            table = builder.module.globals.get(name)
            if table is None:
                table = ir.GlobalVariable(builder.module, kind, name)
                table.linkage, table.global_constant = "internal", True
                table.initializer = ir.Constant(kind, list(values))
            zero = ir.Constant(_I32, 0)
            place = context.cast(builder, args[0], sig.args[0], types.uintp)
            return builder.load(builder.gep(table, [zero, place], source_etype=kind), typ=ir.FloatType())

        return types.float32(index), codegen

    return look_up


@intrinsic
def where_bits(typingctx, bits, value):
    """i8x64 with `value` (a literal-like int8) in byte i where bit i of the uint64 is set, else 0."""

    def codegen(context, builder, sig, args):
        flags = builder.bitcast(args[0], ir.VectorType(ir.IntType(1), 64))
        byte = context.cast(builder, args[1], sig.args[1], types.int8)
        lane = builder.insert_element(ir.Constant(i8x64.llvm, ir.Undefined), byte, ir.Constant(_I32, 0))
        mask = ir.Constant(ir.VectorType(_I32, 64), [0] * 64)
        splat = builder.shuffle_vector(lane, ir.Constant(i8x64.llvm, ir.Undefined), mask)
        return builder.select(flags, splat, _constant(i8x64, 0))

    return i8x64(types.uint64, types.int64), codegen


# Products with integer scales ------------------------------------------------------------------------------------------


def _pair_products(builder, wide, narrow: ir.VectorType):
    """Adds neighbours of a vector of products."""
    undefined = ir.Constant(wide.type, ir.Undefined)
    even, odd = (
        builder.shuffle_vector(
            wide, undefined, ir.Constant(ir.VectorType(_I32, narrow.count), list(range(k, wide.type.count, 2)))
        )
        for k in (0, 1)
    )
    return builder.add(even, odd)


def _scaled_512(builder, acc, codes, x, scales):
    pairs = _call(builder, "llvm.x86.avx512.pmaddubs.w.512", i16x32.llvm, [codes, x])
    return _call(builder, "llvm.x86.avx512.vpdpwssd.512", i32x16.llvm, [acc, pairs, scales])


def _scaled_256(builder, acc, codes, x, scales):
    pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", i16x16.llvm, [codes, x])
    return builder.add(acc, _call(builder, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, [pairs, scales]))


def _scaled_generic(builder, acc, codes, x, scales):
    words = ir.VectorType(_I16, 64)
    products = builder.mul(builder.zext(codes, words), builder.sext(x, words))
    pairs = _pair_products(builder, products, i16x32.llvm)
    wide = ir.VectorType(_I32, 32)
    scaled = builder.mul(builder.sext(pairs, wide), builder.sext(scales, wide))
    return builder.add(acc, _pair_products(builder, scaled, i32x16.llvm))


@intrinsic
def scaled_dot_u8x64(typingctx, acc, codes, x, scales):
    """acc + 4 products a lane, each pair of them times its int16 scale. codes unsigned, at most 128; sums stay in int32."""

    def codegen(context, builder, sig, args):
        if isa().name == AVX512_VNNI:
            return _scaled_512(builder, *args)
        if isa().name == PORTABLE:
            return _scaled_generic(builder, *args)
        split = [_halves(builder, value, value.type.count) for value in args]
        low, high = (_scaled_256(builder, *parts) for parts in zip(*split, strict=True))
        return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, 16), list(range(16))))

    return i32x16(i32x16, i8x64, i8x64, i16x32), codegen


# Memory ----------------------------------------------------------------------------------------------------------------


@intrinsic
def prefetch(typingctx, address):
    """Asks for the cache line at `address`; any address is harmless."""

    def codegen(context, builder, sig, args):
        byte = _BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        hints = [ir.Constant(_I32, number) for number in (0, 3, 1)]  # to read, keep in all levels, data
        builder.call(function, [builder.inttoptr(args[0], byte), *hints])
        return context.get_dummy_value()

    return types.void(types.uintp), codegen
