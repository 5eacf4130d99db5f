"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4, NVFP4: blocks of 32 (64) weights; a byte holds two of them, 16 (8)
apart."""

import triton
import triton.language as tl

from kimi_lite.native.gpu.types.words import byte_at, float_of_bits, half_at, signed_byte_at


@triton.jit
def halves_column(unit, PLANE: tl.constexpr):
    """Low nibbles first, then the high ones: 16 bytes, 32 weights."""
    return unit + 16 * PLANE


@triton.jit
def same_column(unit, PLANE: tl.constexpr):
    return unit


@triton.jit
def nvfp4_column(unit, PLANE: tl.constexpr):
    return unit // 8 * 16 + unit % 8 + 8 * PLANE


@triton.jit
def nibble_at(address, mask, PLANE: tl.constexpr):
    return (byte_at(address, mask) >> (4 * PLANE)) & 15


@triton.jit
def q4_0_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    return (nibble_at(base + 2 + unit, mask, PLANE) - 8).to(tl.float32) * half_at(base, mask)


@triton.jit
def q4_1_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = nibble_at(base + 4 + unit, mask, PLANE).to(tl.float32)
    return code * half_at(base, mask) + half_at(base + 2, mask)


@triton.jit
def fifth_bit(address, first, unit, mask, PLANE: tl.constexpr):
    """Bit `unit + 16 * PLANE` of the 32 at `address`, in its place above a nibble."""
    bits = byte_at(address + 2 * PLANE + first // 8, mask)
    return ((bits >> (unit % 8)) & 1) << 4


@triton.jit
def q5_0_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = nibble_at(base + 6 + unit, mask, PLANE) | fifth_bit(base + 2, first, unit, mask, PLANE)
    return (code - 16).to(tl.float32) * half_at(base, mask)


@triton.jit
def q5_1_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = nibble_at(base + 8 + unit, mask, PLANE) | fifth_bit(base + 4, first, unit, mask, PLANE)
    return code.to(tl.float32) * half_at(base, mask) + half_at(base + 2, mask)


@triton.jit
def q8_0_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    return signed_byte_at(base + 2 + unit, mask).to(tl.float32) * half_at(base, mask)


@triton.jit
def iq4_nl_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    """`table`: the 16 values, int8."""
    code = nibble_at(base + 2 + unit, mask, PLANE)
    return tl.load(table + code, mask, other=0).to(tl.float32) * half_at(base, mask)


@triton.jit
def fp4_value(code):
    """Twice the E2M1 value of a code: 0 1 2 3 4 6 8 12, then the same negative."""
    size = code & 7
    large = (2 + (size & 1)) << tl.maximum((size >> 1) - 1, 0)
    size = tl.where(size < 2, size, large).to(tl.float32)
    return tl.where(code < 8, size, -size)


@triton.jit
def mxfp4_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    """Blocks of 17 bytes. The E8M0 scale is halved, as the values are doubled: 2^(e - 128), below 2^-126 a
    subnormal."""
    exponent = byte_at(base, mask)
    scale = tl.where(exponent < 2, 0x00200000 << tl.minimum(exponent, 1), (exponent - 1) << 23)
    return fp4_value(nibble_at(base + 1 + unit, mask, PLANE)) * float_of_bits(scale)


@triton.jit
def nvfp4_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    """Four UE4M3 scales a block, halved too: (1 + m / 8) 2^(e - 8), or m 2^-10 where e is 0; 0x7f is no number:
    zero."""
    code = byte_at(base + first // 8, mask)
    exponent, mantissa = (code >> 3) & 15, (code & 7).to(tl.float32)
    normal = (1.0 + mantissa * 0.125) * float_of_bits((exponent + 119) << 23)
    scale = tl.where(exponent == 0, mantissa * 0.0009765625, normal)
    scale = tl.where((code == 0) | (code == 0x7F), 0.0, scale)
    return fp4_value(nibble_at(base + 4 + unit, mask, PLANE)) * scale
