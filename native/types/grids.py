"""What the grid types IQ1, IQ2 and IQ3 share: super-blocks of 256 whose weights are points of a codebook, with small
scales.

A type (iq1, iq2, iq3) gives a few short answers, and the products here are made of them: weight = code * sign
* scale * unit for IQ2 and IQ3, (code - excess) * scale * unit for IQ1. Scales are small integers that ride in the
addition of the byte products, and signs go to the activations, because the products want unsigned codes. All is done by
chunks of 64 weights, so that a chunk's registers are free before the next one's are needed.
"""

from numba import njit

from kimi_lite.native.cpu.blocks import chosen_by_name, dot256, has_digits, implements, unpack
from kimi_lite.native.grid_lanes import bit_counts, bytes_of_i32x8, even_f32x16, spread_scales
from kimi_lite.native.simd import (
    f32_to_i32x16,
    int_to_f32x16,
    load_f32x16,
    load_i8x64,
    narrow_i32x16,
    store_f32,
    store_f32x8,
    store_f32x16,
    store_i8x64,
    widen_i8x16,
    zero_f32x16,
    zero_i32x16,
)
from kimi_lite.native.simd_digits import (
    high_digits,
    high_digits_unsigned,
    low_digits,
    low_digits_unsigned,
    minima_bytes,
)
from kimi_lite.native.simd_dot import scaled_dot_u8x64

_IQ1, _SIGNED = ("IQ1_S", "IQ1_M"), ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ3_KT")


@chosen_by_name
def points(name, block):
    """What `magnitudes` needs to know of a block: its address, or the points in registers."""


@chosen_by_name
def magnitudes(name, points, chunk):
    """i8x64: the unsigned codes of a chunk."""


@chosen_by_name
def sign_bits(name, block):
    """What `signed` needs to know of a block: its address, or the signs in a register (IQ2, IQ3)."""


@chosen_by_name
def signed(name, bits, chunk, x):
    """The i8x64 with the signs of a chunk's weights (IQ2, IQ3)."""


@chosen_by_name
def scales(name, block):
    """i8x16: the scale of every 16 weights, a small integer."""


@chosen_by_name
def scaled_excess(name, block):
    """f32x16: what the codes of every 16 weights are too large by, times their scale (IQ1)."""


@chosen_by_name
def unit(name, block):
    """float32: what a scale of 1 is worth."""


@chosen_by_name
def store_groups(name, address, values):
    """Stores one float32 a group, of one per 16 weights."""


@implements(store_groups, "IQ1_M", "IQ2_XS", "IQ2_S")
def _store_groups_of_16(name, address, values):
    store_f32x16(address, values)


@implements(store_groups, "IQ1_S", "IQ2_XXS", "IQ3_XXS", "IQ3_S", "IQ3_KT")
def _store_groups_of_32(name, address, values):
    store_f32x8(address, even_f32x16(values))


@njit(forceinline=True)
def as_floats(integers):
    """i8x16, unsigned, as f32x16."""
    return int_to_f32x16(widen_i8x16(integers))


@njit(forceinline=True)
def with_parity(low):
    """Seven sign bits a byte, and an eighth that makes their number even."""
    return low | (bit_counts(low) << 7)


@njit(forceinline=True)
def packed_signs(words):
    """The 7-bit sign fields in the low 28 bits of 8 words (i32x8), as i8x32."""
    low, high = words & 0x7F | (words << 1) & 0x7F00, (words << 2) & 0x7F0000 | (words << 3) & 0x7F000000
    return with_parity(bytes_of_i32x8(low | high))


# IQ2 and IQ3: signed codes --------------------------------------------------------------------------------------------


@implements(dot256, *_SIGNED)
def _signed_dot(name, block, x, sums16, sums32, minus16):
    at, bits, factors = points(name, block), sign_bits(name, block), scales(name, block)
    x0 = signed(name, bits, 0, load_i8x64(x))
    acc0 = scaled_dot_u8x64(zero_i32x16(), magnitudes(name, at, 0), x0, spread_scales(factors, 0))
    x1 = signed(name, bits, 1, load_i8x64(x + 64))
    acc1 = scaled_dot_u8x64(zero_i32x16(), magnitudes(name, at, 1), x1, spread_scales(factors, 1))
    x2 = signed(name, bits, 2, load_i8x64(x + 128))
    acc0 = scaled_dot_u8x64(acc0, magnitudes(name, at, 2), x2, spread_scales(factors, 2))
    x3 = signed(name, bits, 3, load_i8x64(x + 192))
    acc1 = scaled_dot_u8x64(acc1, magnitudes(name, at, 3), x3, spread_scales(factors, 3))
    return int_to_f32x16(acc0 + acc1) * unit(name, block)


@implements(unpack, *_SIGNED)
def _signed_unpack(name, block, codes, scales_out, minima):
    at, bits, factors = points(name, block), sign_bits(name, block), as_floats(scales(name, block)) * unit(name, block)
    codes0, codes1 = signed(name, bits, 0, magnitudes(name, at, 0)), signed(name, bits, 1, magnitudes(name, at, 1))
    codes2, codes3 = signed(name, bits, 2, magnitudes(name, at, 2)), signed(name, bits, 3, magnitudes(name, at, 3))
    store_i8x64(codes, codes0)
    store_i8x64(codes + 64, codes1)
    store_i8x64(codes + 128, codes2)
    store_i8x64(codes + 192, codes3)
    store_groups(name, scales_out, factors)
    store_groups(name, minima, zero_f32x16())


# IQ1: {-1, 0, 1} plus or minus 1/8, so codes are kept in 8ths, and unsigned; sums of activations take the excess back
# ----


@implements(dot256, *_IQ1)
def _iq1_dot(name, block, x, sums16, sums32, minus16):
    at, factors, too_much = points(name, block), scales(name, block), scaled_excess(name, block)
    acc0 = scaled_dot_u8x64(zero_i32x16(), magnitudes(name, at, 0), load_i8x64(x), spread_scales(factors, 0))
    acc1 = scaled_dot_u8x64(zero_i32x16(), magnitudes(name, at, 1), load_i8x64(x + 64), spread_scales(factors, 1))
    acc0 = scaled_dot_u8x64(acc0, magnitudes(name, at, 2), load_i8x64(x + 128), spread_scales(factors, 2))
    acc1 = scaled_dot_u8x64(acc1, magnitudes(name, at, 3), load_i8x64(x + 192), spread_scales(factors, 3))
    return (int_to_f32x16(acc0 + acc1) - too_much * load_f32x16(sums16)) * unit(name, block)


@implements(unpack, *_IQ1)
def _iq1_unpack(name, block, codes, scales_out, minima):
    at, worth = points(name, block), unit(name, block)
    factors, too_much = as_floats(scales(name, block)) * worth, scaled_excess(name, block) * worth
    codes0, codes1 = magnitudes(name, at, 0), magnitudes(name, at, 1)
    codes2, codes3 = magnitudes(name, at, 2), magnitudes(name, at, 3)
    store_i8x64(codes, codes0)
    store_i8x64(codes + 64, codes1)
    store_i8x64(codes + 128, codes2)
    store_i8x64(codes + 192, codes3)
    store_groups(name, scales_out, factors)
    store_groups(name, minima, too_much)


# Whole numbers for matrix tiles: codes times scales need two bytes --------------------------------------------------


@has_digits(*_SIGNED, shift=8, is_signed=True)
def _signed_digits(name, block, low, high, minima, factors):
    at, bits, spread = points(name, block), sign_bits(name, block), scales(name, block)
    c0, w0 = signed(name, bits, 0, magnitudes(name, at, 0)), spread_scales(spread, 0)
    store_i8x64(low, low_digits(c0, w0))
    store_i8x64(high, high_digits(c0, w0))
    c1, w1 = signed(name, bits, 1, magnitudes(name, at, 1)), spread_scales(spread, 1)
    store_i8x64(low + 64, low_digits(c1, w1))
    store_i8x64(high + 64, high_digits(c1, w1))
    c2, w2 = signed(name, bits, 2, magnitudes(name, at, 2)), spread_scales(spread, 2)
    store_i8x64(low + 128, low_digits(c2, w2))
    store_i8x64(high + 128, high_digits(c2, w2))
    c3, w3 = signed(name, bits, 3, magnitudes(name, at, 3)), spread_scales(spread, 3)
    store_i8x64(low + 192, low_digits(c3, w3))
    store_i8x64(high + 192, high_digits(c3, w3))
    store_f32(factors, unit(name, block))


@has_digits(*_IQ1, shift=8, is_signed=True, minima="bytes")
def _iq1_digits(name, block, low, high, minima, factors):
    at, spread = points(name, block), scales(name, block)
    c0, w0 = magnitudes(name, at, 0), spread_scales(spread, 0)
    store_i8x64(low, low_digits_unsigned(c0, w0))
    store_i8x64(high, high_digits_unsigned(c0, w0))
    c1, w1 = magnitudes(name, at, 1), spread_scales(spread, 1)
    store_i8x64(low + 64, low_digits_unsigned(c1, w1))
    store_i8x64(high + 64, high_digits_unsigned(c1, w1))
    c2, w2 = magnitudes(name, at, 2), spread_scales(spread, 2)
    store_i8x64(low + 128, low_digits_unsigned(c2, w2))
    store_i8x64(high + 128, high_digits_unsigned(c2, w2))
    c3, w3 = magnitudes(name, at, 3), spread_scales(spread, 3)
    store_i8x64(low + 192, low_digits_unsigned(c3, w3))
    store_i8x64(high + 192, high_digits_unsigned(c3, w3))
    store_i8x64(minima, minima_bytes(narrow_i32x16(f32_to_i32x16(scaled_excess(name, block)))))
    store_f32(factors, unit(name, block))
    store_f32(factors + 64, unit(name, block))
