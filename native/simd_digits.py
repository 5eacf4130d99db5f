"""Codes times small scales as whole numbers, in a byte where they fit, else in two: for matrix tiles (`blocks`).

A scale is an int16 for every two codes, as in `simd_dot.scaled_dot_u8x64`.
"""

from llvmlite import ir
from numba.extending import intrinsic

from kimi_lite.native.vectors import constant, i8x16, i8x64, i16x32


def _words(builder, value):
    return builder.bitcast(value, i16x32.llvm)


@intrinsic
def small_products(typingctx, codes, scales):
    """i8x64 unsigned codes times i16x32 scales that are not negative; products below 256."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(builder.mul(_words(builder, args[0]), args[1]), i8x64.llvm)

    return i8x64(i8x64, i16x32), codegen


def _wide_products(builder, codes, scales, is_signed: bool):
    """Of the even codes, and of the odd ones, int16."""
    words, eight = _words(builder, codes), constant(i16x32, 8)
    shift = builder.ashr if is_signed else builder.lshr
    even, odd = shift(builder.shl(words, eight), eight), shift(words, eight)
    return builder.mul(even, scales), builder.mul(odd, scales)


def _digit(is_low: bool, is_signed: bool):
    @intrinsic
    def digit(typingctx, codes, scales):
        def codegen(context, builder, sig, args):
            even, odd = _wide_products(builder, *args, is_signed)
            eight, low, high = constant(i16x32, 8), constant(i16x32, 0xFF), constant(i16x32, 0xFF00)
            if is_low:
                both = builder.or_(builder.and_(even, low), builder.shl(odd, eight))
            else:
                both = builder.or_(builder.lshr(even, eight), builder.and_(odd, high))
            return builder.bitcast(both, i8x64.llvm)

        return i8x64(i8x64, i16x32), codegen

    return digit


# The lower byte of each product, unsigned, and the upper one, signed: product = low + (high << 8).
low_digits, high_digits = _digit(True, True), _digit(False, True)  # of signed codes
low_digits_unsigned, high_digits_unsigned = _digit(True, False), _digit(False, False)


@intrinsic
def minima_bytes(typingctx, minima):
    """16 bytes and 48 zeros."""

    def codegen(context, builder, sig, args):
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), 64), [*range(16), *[16] * 48])
        return builder.shuffle_vector(args[0], constant(i8x16, 0), lanes)

    return i8x64(i8x16), codegen


@intrinsic
def minima_nibbles(typingctx, sixteenfold, minima):
    """16 bytes, 16 more, and 32 zeros."""

    def codegen(context, builder, sig, args):
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), 32), list(range(32)))
        both = builder.shuffle_vector(*args, lanes)
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), 64), [*range(32), *[32] * 32])
        return builder.shuffle_vector(both, ir.Constant(both.type, None), lanes)

    return i8x64(i8x16, i8x16), codegen
