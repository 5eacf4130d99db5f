"""Products of quantized weights and activations: int8 dot products, with integer scales too, and the sums of a row.

The only operations that choose an instruction per ISA (`native.isa`): vpdpbusd, vpmaddubsw, or what LLVM makes of the
sum.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kimi_lite.native.isa import AVX2, AVX512_VNNI, AVX_VNNI, PORTABLE, isa, sum_order
from kimi_lite.native.simd import sum_f32x8, sum_f32x16, zero_f32x8, zero_f32x16
from kimi_lite.native.simd_bytes import in_order
from kimi_lite.native.vectors import (
    Vec,
    call_llvm,
    constant,
    f32x16,
    i8x32,
    i8x64,
    i16x16,
    i16x32,
    i32x8,
    i32x16,
    in_halves,
    maker,
    splat,
)

_I16, _I32 = ir.IntType(16), ir.IntType(32)

# Dot products of bytes: 4 products a lane, summed into int32 ----------------------------------------------------------


def _by_halves(builder, emit, acc, a, b):
    """A 64-byte product as two 32-byte ones."""
    low, high = (
        emit(builder, *parts)
        for parts in zip(in_halves(builder, acc, 16), in_halves(builder, a, 64), in_halves(builder, b, 64), strict=True)
    )
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, 16), list(range(16))))


def _vpdpbusd_256(builder, acc, unsigned, signed):
    return call_llvm(builder, "llvm.x86.avx512.vpdpbusd.256", acc.type, [acc, unsigned, signed])


def byte_pairs(builder, unsigned, signed):
    """AVX2: sums of two products as int16. vpmaddubsw saturates, which no code up to 128 can reach: 2 * 128 * 127 <
    32768."""
    return call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", i16x16.llvm, [unsigned, signed])


def add_pairs(builder, acc, pairs):
    """AVX2: acc (None: zeros) + neighbours of int16, in int32."""
    quads = call_llvm(builder, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, [pairs, constant(i16x16, 1)])
    return quads if acc is None else builder.add(acc, quads)


def _maddubs_256(builder, acc, unsigned, signed):
    return add_pairs(builder, acc, byte_pairs(builder, unsigned, signed))


def _generic(builder, acc, a, b, is_unsigned: bool):
    """Products in int32, then three adds: what LLVM makes of it depends on the target."""
    lanes = acc.type.count
    wide = ir.VectorType(_I32, 4 * lanes)
    product = builder.mul(builder.zext(a, wide) if is_unsigned else builder.sext(a, wide), builder.sext(b, wide))
    undefined = ir.Constant(wide, ir.Undefined)
    for k in range(4):
        mask = ir.Constant(ir.VectorType(_I32, lanes), list(range(k, 4 * lanes, 4)))
        acc = builder.add(acc, builder.shuffle_vector(product, undefined, mask))
    return acc


def _dot_unsigned(builder, acc, unsigned, signed):
    path, lanes = isa().name, acc.type.count
    if path == AVX512_VNNI:
        return call_llvm(builder, f"llvm.x86.avx512.vpdpbusd.{lanes * 32}", acc.type, [acc, unsigned, signed])
    if path in (AVX_VNNI, AVX2):
        emit = _vpdpbusd_256 if path == AVX_VNNI else _maddubs_256
        return emit(builder, acc, unsigned, signed) if lanes == 8 else _by_halves(builder, emit, acc, unsigned, signed)
    return _generic(builder, acc, unsigned, signed, is_unsigned=True)


def with_sign_of(builder, a, b):
    """AVX2: |a| (at most 128) and b with the sign of a, whose products are those of a and b."""
    magnitude = call_llvm(builder, "llvm.abs.v32i8", i8x32.llvm, [a, ir.Constant(ir.IntType(1), 0)])
    return magnitude, call_llvm(builder, "llvm.x86.avx2.psign.b", i8x32.llvm, [b, a])


def _sign_256(builder, acc, a, b):
    return _maddubs_256(builder, acc, *with_sign_of(builder, a, b))


def _dot_signed(builder, acc, a, b):
    lanes = acc.type.count
    if isa().name in (AVX_VNNI, AVX2):
        return _sign_256(builder, acc, a, b) if lanes == 8 else _by_halves(builder, _sign_256, acc, a, b)
    return _generic(builder, acc, a, b, is_unsigned=False)


def _dot(acc_vec: Vec, byte_vec: Vec, emit):
    @intrinsic
    def dot(typingctx, acc, a, b):
        return acc_vec(acc_vec, byte_vec, byte_vec), lambda context, builder, sig, args: emit(builder, *args)

    return dot


dot_u8x64 = _dot(i32x16, i8x64, _dot_unsigned)  # codes <= 128 off VNNI
HAS_FULL_UNSIGNED_DOT = sum_order().bias == 128  # unsigned codes may use all 8 bits
dot_i8x64 = _dot(i32x16, i8x64, _dot_signed)


def dot_of(builder, acc, a, b):
    """LLVM code of acc + 4 products a lane of two signed vectors; where HAS_FULL_UNSIGNED_DOT, `a` has 128 added."""
    return (_dot_unsigned if HAS_FULL_UNSIGNED_DOT else _dot_signed)(builder, acc, a, b)


def unsigned_dot_of(builder, acc, a, b):
    """LLVM code of acc + 4 products a lane of an unsigned vector, whose values are at most MAX_UNSIGNED, and a signed
    one."""
    return _dot_unsigned(builder, acc, a, b)


MAX_UNSIGNED = 255 if HAS_FULL_UNSIGNED_DOT else 127


# Products with integer scales
# ------------------------------------------------------------------------------------------


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
    pairs = call_llvm(builder, "llvm.x86.avx512.pmaddubs.w.512", i16x32.llvm, [codes, x])
    return call_llvm(builder, "llvm.x86.avx512.vpdpwssd.512", i32x16.llvm, [acc, pairs, scales])


def _scaled_256(builder, acc, codes, x, scales):
    pairs = call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", i16x16.llvm, [codes, x])
    return builder.add(acc, call_llvm(builder, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, [pairs, scales]))


def _scaled_generic(builder, acc, codes, x, scales):
    words = ir.VectorType(_I16, 64)
    products = builder.mul(builder.zext(codes, words), builder.sext(x, words))
    pairs = _pair_products(builder, products, i16x32.llvm)
    wide = ir.VectorType(_I32, 32)
    scaled = builder.mul(builder.sext(pairs, wide), builder.sext(scales, wide))
    return builder.add(acc, _pair_products(builder, scaled, i32x16.llvm))


@intrinsic
def scaled_dot_u8x64(typingctx, acc, codes, x, scales):
    """acc + 4 products a lane, each pair of them times its int16 scale. codes unsigned, at most 128; sums stay in
    int32."""

    def codegen(context, builder, sig, args):
        if isa().name == AVX512_VNNI:
            return _scaled_512(builder, *args)
        if isa().name == PORTABLE:
            return _scaled_generic(builder, *args)
        split = [in_halves(builder, value, value.type.count) for value in args]
        low, high = (in_order(builder, _scaled_256(builder, *parts)) for parts in zip(*split, strict=True))
        return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, 16), list(range(16))))

    return i32x16(i32x16, i8x64, i8x64, i16x32), codegen


@intrinsic
def pair_dot_i16x16(typingctx, a, b):
    """Two products of int16 a lane, summed: i32x8."""

    def codegen(context, builder, sig, args):
        if isa().name != PORTABLE:
            return call_llvm(builder, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, args)
        wide = ir.VectorType(_I32, 16)
        return _pair_products(builder, builder.mul(*(builder.sext(arg, wide) for arg in args)), i32x8.llvm)

    return i32x8(i16x16, i16x16), codegen


# Products of small codes
# ----------------------------------------------------------------------------------------------- Without a dot-product
# instruction vpmaddubsw leaves int16 pairs; while they are small they are added as such.

_SMALL = i16x32 if isa().name == AVX2 else i32x16
zero_small = maker(_SMALL, 0)


@intrinsic
def small_dot(typingctx, acc, codes, x):
    """acc + codes * x, of 64 unsigned codes; begin with `zero_small()`. Sums of codes at each place stay under 128."""

    def codegen(context, builder, sig, args):
        acc, codes, x = args
        if isa().name != AVX2:
            return _dot_unsigned(builder, acc, codes, x)
        halves = zip(in_halves(builder, codes, 64), in_halves(builder, x, 64), strict=True)
        pairs = [call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", i16x16.llvm, half) for half in halves]
        joined = builder.shuffle_vector(*pairs, ir.Constant(ir.VectorType(_I32, 32), list(range(32))))
        return builder.add(acc, joined)

    return _SMALL(_SMALL, i8x64, i8x64), codegen


@intrinsic
def sum_small(typingctx, acc):
    """The sums of `small_dot` as i32x16."""

    def codegen(context, builder, sig, args):
        if isa().name != AVX2:
            return args[0]
        ones = constant(i16x16, 1)
        sums = [
            call_llvm(builder, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, [part, ones])
            for part in in_halves(builder, args[0], 32)
        ]
        return builder.shuffle_vector(*sums, ir.Constant(ir.VectorType(_I32, 16), list(range(16))))

    return i32x16(_SMALL), codegen


# Sums of a row: where registers are few and hold 32 bytes, one of them, not two.

_IS_NARROW = sum_order().row_lanes == 8
zero_row, sum_row = (zero_f32x8, sum_f32x8) if _IS_NARROW else (zero_f32x16, sum_f32x16)


@intrinsic
def add_to_row(typingctx, acc, values, scale):
    """A row's `acc` plus the f32x16 `values` times a scalar."""

    def codegen(context, builder, sig, args):
        acc, values, scale = args
        if _IS_NARROW:
            values = builder.fadd(*in_halves(builder, values, 16))
        return call_llvm(
            builder, f"llvm.fma.v{acc.type.count}f32", acc.type, [values, splat(builder, sig.args[0], scale), acc]
        )

    return acc(acc, f32x16, types.float32), codegen
