"""The grid types IQ1, IQ2 and IQ3: super-blocks of 256 whose weights are points of a codebook, with signs and small scales.

A type is a few short answers, and the two products below are made of them: weight = code * sign * scale * unit for IQ2 and
IQ3, (code - excess) * scale * unit for IQ1. Scales are small integers that ride in the addition of the byte products, and
signs go to the activations, because the products want unsigned codes.
"""

from numba import njit, types

from native.codebooks import (
    iq1_m_points,
    iq1_s_points,
    iq2_s_points,
    iq2_xs_points,
    iq2_xxs_points,
    iq3_s_points,
    iq3_xxs_points,
)
from native.cpu.blocks import chosen_by_name, dot256, implements, unpack
from native.grid_lanes import (
    bit_counts,
    bytes_of_i32x8,
    eight_times_0,
    eight_times_1,
    eight_times_2,
    eight_times_3,
    even_f32x16,
    f16_from_bits,
    four_times_upper_i16x8,
    group_shifts_0_3_6_9,
    group_shifts_0_4,
    interleave_twice_i8x4,
    load_i16x8,
    load_i16x32,
    load_i32x8,
    narrow_i16x32,
    negate_by_mask,
    negate_where,
    nine_i16x16,
    odd_i32x16,
    shifts_3_7,
    spread_0,
    spread_1,
    spread_2,
    spread_3,
    twice_i8x16,
    twice_i16x8,
    twice_upper_i8x8,
    widen_i16x16,
    words_of_i32x8,
)
from native.simd import (
    int_to_f32x16,
    load_f16,
    load_f32x16,
    load_i8x16,
    load_i8x64,
    load_i32x16,
    load_u32,
    load_u64,
    pack_u64,
    store_f32x8,
    store_f32x16,
    store_i8x64,
    zero_f32x16,
    zero_i32x16,
)
from native.simd_bytes import scaled_dot_u8x64

_IQ1, _SIGNED = ("IQ1_S", "IQ1_M"), ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


@chosen_by_name
def magnitudes(name, block):
    """The unsigned codes as four i8x64."""


@chosen_by_name
def signed(name, block, a, b, c, d):
    """The four i8x64 with the signs of the block's weights (IQ2, IQ3)."""


@chosen_by_name
def spread_scales(name, block):
    """The scales as four i16x32, one a pair of weights."""


@chosen_by_name
def excess(name, block):
    """i16x16: what the codes of every 16 weights are too large by (IQ1)."""


@chosen_by_name
def scales(name, block):
    """i16x16: the scale of every 16 weights, an odd integer."""


@chosen_by_name
def unit(name, block):
    """float32: what a scale of 1 is worth."""


@chosen_by_name
def store_groups(name, address, values):
    """Stores one float32 a group, of one per 16 weights."""


@implements(store_groups, "IQ1_M", "IQ2_XS", "IQ2_S")
def _store_groups_of_16(name, address, values):
    store_f32x16(address, values)


@implements(store_groups, "IQ1_S", "IQ2_XXS", "IQ3_XXS", "IQ3_S")
def _store_groups_of_32(name, address, values):
    store_f32x8(address, even_f32x16(values))


@njit(forceinline=True)
def _as_floats(integers):
    return int_to_f32x16(widen_i16x16(integers))


# IQ2 and IQ3: signed codes --------------------------------------------------------------------------------------------


@implements(dot256, *_SIGNED)
def _signed_dot(name, block, x, sums16, sums32):
    codes0, codes1, codes2, codes3 = magnitudes(name, block)
    x0, x1, x2, x3 = signed(name, block, load_i8x64(x), load_i8x64(x + 64), load_i8x64(x + 128), load_i8x64(x + 192))
    scale0, scale1, scale2, scale3 = spread_scales(name, block)
    first = scaled_dot_u8x64(scaled_dot_u8x64(zero_i32x16(), codes0, x0, scale0), codes1, x1, scale1)
    second = scaled_dot_u8x64(scaled_dot_u8x64(zero_i32x16(), codes2, x2, scale2), codes3, x3, scale3)
    return int_to_f32x16(first + second) * unit(name, block)


@implements(unpack, *_SIGNED)
def _signed_unpack(name, block, codes, scales_out, minima):
    codes0, codes1, codes2, codes3 = magnitudes(name, block)
    codes0, codes1, codes2, codes3 = signed(name, block, codes0, codes1, codes2, codes3)
    store_i8x64(codes, codes0)
    store_i8x64(codes + 64, codes1)
    store_i8x64(codes + 128, codes2)
    store_i8x64(codes + 192, codes3)
    store_groups(name, scales_out, _as_floats(scales(name, block)) * unit(name, block))
    store_groups(name, minima, zero_f32x16())


@njit(forceinline=True)
def signed_by_bits(bits, a, b, c, d):
    """Signs from 32 bytes, one bit a weight."""
    return (
        negate_where(a, eight_times_0(bits)),
        negate_where(b, eight_times_1(bits)),
        negate_where(c, eight_times_2(bits)),
        negate_where(d, eight_times_3(bits)),
    )


@njit(forceinline=True)
def _signed_by_masks(address, a, b, c, d):
    """Signs from 32 bytes in memory, one bit a weight."""
    return (
        negate_by_mask(a, load_u64(address)),
        negate_by_mask(b, load_u64(address + 8)),
        negate_by_mask(c, load_u64(address + 16)),
        negate_by_mask(d, load_u64(address + 24)),
    )


@implements(spread_scales, *_IQ1, *_SIGNED)
def _spread_scales(name, block):
    factors = scales(name, block)
    return spread_0(factors), spread_1(factors), spread_2(factors), spread_3(factors)


@njit(forceinline=True)
def _with_parity(low):
    """Seven sign bits a byte, and an eighth that makes their number even."""
    return low | (bit_counts(low) << 7)


@njit(forceinline=True)
def _packed_signs(words):
    """The 7-bit sign fields in the low 28 bits of 8 words."""
    low, high = words & 0x7F | (words << 1) & 0x7F00, (words << 2) & 0x7F0000 | (words << 3) & 0x7F000000
    return _with_parity(bytes_of_i32x8(low | high))


@njit(forceinline=True)
def _packed_scales(words):
    """2 s + 1 of the top 4 bits of 8 words, each for two groups of 16."""
    factors = (words >> 27) & 30 | 1
    return words_of_i32x8(factors | factors << 16)


@njit(forceinline=True)
def _nibble_scales(address):
    """2 s + 1 of 16 nibbles, low ones first: the last 8 of the 16 bytes at `address`."""
    return ((twice_upper_i8x8(load_i8x16(address)) >> group_shifts_0_4()) & 15) << 1 | 1


# IQ2_XXS: d:2 | 8 x (4 indices | 4 x 7 sign bits and a 4-bit scale); codes 8, 25, 43, unit d / 8 ------------------------


@implements(magnitudes, "IQ2_XXS")
def _iq2_xxs_magnitudes(name, block):
    return iq2_xxs_points(block + 2), iq2_xxs_points(block + 18), iq2_xxs_points(block + 34), iq2_xxs_points(block + 50)


@implements(signed, "IQ2_XXS")
def _iq2_xxs_signs(name, block, a, b, c, d):
    return signed_by_bits(_packed_signs(odd_i32x16(load_i32x16(block + 2))), a, b, c, d)


@implements(scales, "IQ2_XXS")
def _iq2_xxs_scales(name, block):
    return _packed_scales(odd_i32x16(load_i32x16(block + 2)))


@implements(unit, "IQ2_XXS", "IQ2_XS", "IQ2_S")
def _iq2_unit(name, block):
    return load_f16(block) * types.float32(0.125)


# IQ2_XS: d:2 | qs: 32 x (9-bit index, 7 sign bits) | scales: 16 nibbles ---------------------------------------------------


@implements(magnitudes, "IQ2_XS")
def _iq2_xs_magnitudes(name, block):
    return iq2_xs_points(block + 2), iq2_xs_points(block + 18), iq2_xs_points(block + 34), iq2_xs_points(block + 50)


@implements(signed, "IQ2_XS")
def _iq2_xs_signs(name, block, a, b, c, d):
    return signed_by_bits(_with_parity(narrow_i16x32(load_i16x32(block + 2) >> 9)), a, b, c, d)


@implements(scales, "IQ2_XS")
def _iq2_xs_scales(name, block):
    return _nibble_scales(block + 58)


# IQ2_S: d:2 | low index bytes:32 | signs:32 | qh: 32 x 2 high index bits | scales: 16 nibbles -----------------------------


@implements(magnitudes, "IQ2_S")
def _iq2_s_magnitudes(name, block):
    low, high = block + 2, block + 66
    return (
        iq2_s_points(low, high),
        iq2_s_points(low + 8, high + 2),
        iq2_s_points(low + 16, high + 4),
        iq2_s_points(low + 24, high + 6),
    )


@implements(signed, "IQ2_S")
def _iq2_s_signs(name, block, a, b, c, d):
    return _signed_by_masks(block + 34, a, b, c, d)


@implements(scales, "IQ2_S")
def _iq2_s_scales(name, block):
    return _nibble_scales(block + 66)


# IQ3_XXS: d:2 | 64 indices of 4 weights | 8 x (4 x 7 sign bits and a 4-bit scale); codes 4, 12, .. 52, 62, unit d / 4 -----


@implements(magnitudes, "IQ3_XXS")
def _iq3_xxs_magnitudes(name, block):
    return iq3_xxs_points(block + 2), iq3_xxs_points(block + 18), iq3_xxs_points(block + 34), iq3_xxs_points(block + 50)


@implements(signed, "IQ3_XXS")
def _iq3_xxs_signs(name, block, a, b, c, d):
    return signed_by_bits(_packed_signs(load_i32x8(block + 66)), a, b, c, d)


@implements(scales, "IQ3_XXS")
def _iq3_xxs_scales(name, block):
    return _packed_scales(load_i32x8(block + 66))


@implements(unit, "IQ3_XXS")
def _iq3_xxs_unit(name, block):
    return load_f16(block) * types.float32(0.25)


# IQ3_S: d:2 | low index bytes:64 | qh: 64 high index bits | signs:32 | scales: 8 nibbles; odd codes up to 15, unit d -------


@implements(magnitudes, "IQ3_S")
def _iq3_s_magnitudes(name, block):
    low, high = block + 2, block + 66
    return (
        iq3_s_points(low, high),
        iq3_s_points(low + 16, high + 2),
        iq3_s_points(low + 32, high + 4),
        iq3_s_points(low + 48, high + 6),
    )


@implements(signed, "IQ3_S")
def _iq3_s_signs(name, block, a, b, c, d):
    return _signed_by_masks(block + 74, a, b, c, d)


@implements(scales, "IQ3_S")
def _iq3_s_scales(name, block):
    packed = types.uint64(load_u32(block + 106))
    nibbles = packed & 0x0F0F0F0F | ((packed >> 4) & 0x0F0F0F0F) << 32
    return interleave_twice_i8x4(pack_u64(nibbles, nibbles)) << 1 | 1


@implements(unit, "IQ3_S")
def _iq3_s_unit(name, block):
    return load_f16(block)


# IQ1: {-1, 0, 1} plus or minus 1/8, so codes are kept in 8ths, and unsigned ------------------------------------------------


@implements(dot256, *_IQ1)
def _iq1_dot(name, block, x, sums16, sums32):
    codes0, codes1, codes2, codes3 = magnitudes(name, block)
    scale0, scale1, scale2, scale3 = spread_scales(name, block)
    first = scaled_dot_u8x64(zero_i32x16(), codes0, load_i8x64(x), scale0)
    first = scaled_dot_u8x64(first, codes1, load_i8x64(x + 64), scale1)
    second = scaled_dot_u8x64(zero_i32x16(), codes2, load_i8x64(x + 128), scale2)
    second = scaled_dot_u8x64(second, codes3, load_i8x64(x + 192), scale3)
    too_much = _as_floats(scales(name, block) * excess(name, block)) * load_f32x16(sums16)
    return (int_to_f32x16(first + second) - too_much) * unit(name, block)


@implements(unpack, *_IQ1)
def _iq1_unpack(name, block, codes, scales_out, minima):
    codes0, codes1, codes2, codes3 = magnitudes(name, block)
    store_i8x64(codes, codes0)
    store_i8x64(codes + 64, codes1)
    store_i8x64(codes + 128, codes2)
    store_i8x64(codes + 192, codes3)
    factors, worth = scales(name, block), unit(name, block)
    store_groups(name, scales_out, _as_floats(factors) * worth)
    store_groups(name, minima, _as_floats(factors * excess(name, block)) * worth)


# IQ1_S: d:2 | low index bytes:32 | 8 x (4 x 3 high index bits, 3-bit scale, sign of the 1/8) -------------------------------


@implements(magnitudes, "IQ1_S")
def _iq1_s_magnitudes(name, block):
    low, high = block + 2, block + 34
    return (
        iq1_s_points(low, high),
        iq1_s_points(low + 8, high + 4),
        iq1_s_points(low + 16, high + 8),
        iq1_s_points(low + 24, high + 12),
    )


@implements(scales, "IQ1_S")
def _iq1_s_scales(name, block):
    return (twice_i16x8(load_i16x8(block + 34)) >> 11) & 14 | 1


@implements(excess, "IQ1_S")
def _iq1_s_excess(name, block):
    return ((twice_i16x8(load_i16x8(block + 34)) >> 14) & 2) + 7


@implements(unit, "IQ1_S")
def _iq1_s_unit(name, block):
    return load_f16(block) * types.float32(0.125)


# IQ1_M: low index bytes:32 | 32 x (3 high index bits, sign of the 1/8) | 4 x (4 x 3-bit scale, a nibble of d) --------------


@implements(magnitudes, "IQ1_M")
def _iq1_m_magnitudes(name, block):
    eighths = narrow_i16x32(((twice_i8x16(load_i8x16(block + 32)) >> shifts_3_7()) & 1 ^ 1) << 1)  # 2 for plus, 0 for minus
    high = block + 32
    return (
        iq1_m_points(block, high) + eight_times_0(eighths),
        iq1_m_points(block + 8, high + 4) + eight_times_1(eighths),
        iq1_m_points(block + 16, high + 8) + eight_times_2(eighths),
        iq1_m_points(block + 24, high + 12) + eight_times_3(eighths),
    )


@implements(scales, "IQ1_M")
def _iq1_m_scales(name, block):
    return ((four_times_upper_i16x8(load_i16x8(block + 40)) >> group_shifts_0_3_6_9()) & 7) << 1 | 1


@implements(excess, "IQ1_M")
def _iq1_m_excess(name, block):
    return nine_i16x16()


@implements(unit, "IQ1_M")
def _iq1_m_unit(name, block):
    s = load_u64(block + 48)
    bits = (s >> 12) & 0xF | (s >> 24) & 0xF0 | (s >> 36) & 0xF00 | (s >> 48) & 0xF000
    return f16_from_bits(bits) * types.float32(0.125)
