"""The grid types IQ1, IQ2 and IQ3: super-blocks of 256 whose weights are points of a codebook, with signs and small scales.

A type is a few short answers, and the two products below are made of them: weight = code * sign * scale * unit for IQ2 and
IQ3, (code - excess) * scale * unit for IQ1. Scales are small integers that ride in the addition of the byte products, and
signs go to the activations, because the products want unsigned codes.
"""

from numba import njit, types

from native.codebooks import (
    read_iq1,
    read_iq2_s,
    read_iq2_xs,
    read_iq2_xxs,
    read_iq3_s,
    read_iq3_xxs,
    spill,
    spill_pair,
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
    four_times_i8x8,
    four_times_i16x8,
    four_times_upper_i16x8,
    group_shifts_0_3_6_9,
    interleave_i8x8,
    interleave_twice_i8x4,
    load_i16x8,
    load_i16x32,
    load_i32x8,
    narrow_i16x32,
    negate_where,
    nine_i16x16,
    odd_i32x16,
    set_bit_8,
    shifts_0_2_4_6,
    shifts_0_3_6_9,
    shifts_0_4,
    spread_0,
    spread_1,
    spread_2,
    spread_3,
    twice_i8x16,
    twice_i16x8,
    widen_i8x32,
    widen_i16x16,
    words_of_i32x8,
)
from native.simd import (
    int_to_f32x16,
    load_f16,
    load_f32x16,
    load_i8x16,
    load_i8x32,
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
def signs(name, block):
    """One bit a weight, i8x32 (IQ2, IQ3)."""


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


@njit
def _as_floats(integers):
    return int_to_f32x16(widen_i16x16(integers))


# IQ2 and IQ3: signed codes --------------------------------------------------------------------------------------------


@implements(dot256, *_SIGNED)
def _signed_dot(name, block, x, sums16, sums32):
    codes0, codes1, codes2, codes3 = magnitudes(name, block)
    bits, factors = signs(name, block), scales(name, block)
    acc = scaled_dot_u8x64(zero_i32x16(), codes0, negate_where(load_i8x64(x), eight_times_0(bits)), spread_0(factors))
    acc = scaled_dot_u8x64(acc, codes1, negate_where(load_i8x64(x + 64), eight_times_1(bits)), spread_1(factors))
    acc = scaled_dot_u8x64(acc, codes2, negate_where(load_i8x64(x + 128), eight_times_2(bits)), spread_2(factors))
    acc = scaled_dot_u8x64(acc, codes3, negate_where(load_i8x64(x + 192), eight_times_3(bits)), spread_3(factors))
    return int_to_f32x16(acc) * unit(name, block)


@implements(unpack, *_SIGNED)
def _signed_unpack(name, block, codes, scales_out, minima):
    codes0, codes1, codes2, codes3 = magnitudes(name, block)
    bits = signs(name, block)
    store_i8x64(codes, negate_where(codes0, eight_times_0(bits)))
    store_i8x64(codes + 64, negate_where(codes1, eight_times_1(bits)))
    store_i8x64(codes + 128, negate_where(codes2, eight_times_2(bits)))
    store_i8x64(codes + 192, negate_where(codes3, eight_times_3(bits)))
    store_groups(name, scales_out, _as_floats(scales(name, block)) * unit(name, block))
    store_groups(name, minima, zero_f32x16())


@njit
def _with_parity(low):
    """Seven sign bits a byte, and an eighth that makes their number even."""
    return low | (bit_counts(low) << 7)


@njit
def _packed_signs(words):
    """The 7-bit sign fields in the low 28 bits of 8 words."""
    low, high = words & 0x7F | (words << 1) & 0x7F00, (words << 2) & 0x7F0000 | (words << 3) & 0x7F000000
    return _with_parity(bytes_of_i32x8(low | high))


@njit
def _packed_scales(words):
    """2 s + 1 of the top 4 bits of 8 words, each for two groups of 16."""
    factors = (words >> 27) & 30 | 1
    return words_of_i32x8(factors | factors << 16)


@njit
def _nibble_scales(address):
    """2 s + 1 of 16 nibbles, low ones first."""
    packed = load_u64(address)
    return interleave_i8x8(pack_u64(packed & 0x0F0F0F0F0F0F0F0F, (packed >> 4) & 0x0F0F0F0F0F0F0F0F)) << 1 | 1


# IQ2_XXS: d:2 | 8 x (4 indices | 4 x 7 sign bits and a 4-bit scale); codes 8, 25, 43, unit d / 8 ------------------------


@implements(magnitudes, "IQ2_XXS")
def _iq2_xxs_magnitudes(name, block):
    return read_iq2_xxs(block + 2), read_iq2_xxs(block + 18), read_iq2_xxs(block + 34), read_iq2_xxs(block + 50)


@implements(signs, "IQ2_XXS")
def _iq2_xxs_signs(name, block):
    return _packed_signs(odd_i32x16(load_i32x16(block + 2)))


@implements(scales, "IQ2_XXS")
def _iq2_xxs_scales(name, block):
    return _packed_scales(odd_i32x16(load_i32x16(block + 2)))


@implements(unit, "IQ2_XXS", "IQ2_XS", "IQ2_S")
def _iq2_unit(name, block):
    return load_f16(block) * types.float32(0.125)


# IQ2_XS: d:2 | qs: 32 x (9-bit index, 7 sign bits) | scales: 16 nibbles ---------------------------------------------------


@implements(magnitudes, "IQ2_XS")
def _iq2_xs_magnitudes(name, block):
    return read_iq2_xs(block + 2), read_iq2_xs(block + 18), read_iq2_xs(block + 34), read_iq2_xs(block + 50)


@implements(signs, "IQ2_XS")
def _iq2_xs_signs(name, block):
    return _with_parity(narrow_i16x32(load_i16x32(block + 2) >> 9))


@implements(scales, "IQ2_XS")
def _iq2_xs_scales(name, block):
    return _nibble_scales(block + 66)


# IQ2_S: d:2 | low index bytes:32 | signs:32 | qh: 32 x 2 high index bits | scales: 16 nibbles -----------------------------


@implements(magnitudes, "IQ2_S")
def _iq2_s_magnitudes(name, block):
    high = (four_times_i8x8(load_i8x16(block + 66)) >> shifts_0_2_4_6()) & 3
    at = spill(widen_i8x32(load_i8x32(block + 2)) | high << 8)
    return read_iq2_s(at), read_iq2_s(at + 16), read_iq2_s(at + 32), read_iq2_s(at + 48)


@implements(signs, "IQ2_S")
def _iq2_s_signs(name, block):
    return load_i8x32(block + 34)


@implements(scales, "IQ2_S")
def _iq2_s_scales(name, block):
    return _nibble_scales(block + 74)


# IQ3_XXS: d:2 | 64 indices of 4 weights | 8 x (4 x 7 sign bits and a 4-bit scale); codes 4, 12, .. 52, 62, unit d / 4 -----


@implements(magnitudes, "IQ3_XXS")
def _iq3_xxs_magnitudes(name, block):
    return read_iq3_xxs(block + 2), read_iq3_xxs(block + 18), read_iq3_xxs(block + 34), read_iq3_xxs(block + 50)


@implements(signs, "IQ3_XXS")
def _iq3_xxs_signs(name, block):
    return _packed_signs(load_i32x8(block + 66))


@implements(scales, "IQ3_XXS")
def _iq3_xxs_scales(name, block):
    return _packed_scales(load_i32x8(block + 66))


@implements(unit, "IQ3_XXS")
def _iq3_xxs_unit(name, block):
    return load_f16(block) * types.float32(0.25)


# IQ3_S: d:2 | low index bytes:64 | qh: 64 high index bits | signs:32 | scales: 8 nibbles; odd codes up to 15, unit d -------


@implements(magnitudes, "IQ3_S")
def _iq3_s_magnitudes(name, block):
    first = set_bit_8(widen_i8x32(load_i8x32(block + 2)), load_u32(block + 66))
    at = spill_pair(first, set_bit_8(widen_i8x32(load_i8x32(block + 34)), load_u32(block + 70)))
    return read_iq3_s(at), read_iq3_s(at + 32), read_iq3_s(at + 64), read_iq3_s(at + 96)


@implements(signs, "IQ3_S")
def _iq3_s_signs(name, block):
    return load_i8x32(block + 74)


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
    factors = scales(name, block)
    acc = scaled_dot_u8x64(zero_i32x16(), codes0, load_i8x64(x), spread_0(factors))
    acc = scaled_dot_u8x64(acc, codes1, load_i8x64(x + 64), spread_1(factors))
    acc = scaled_dot_u8x64(acc, codes2, load_i8x64(x + 128), spread_2(factors))
    acc = scaled_dot_u8x64(acc, codes3, load_i8x64(x + 192), spread_3(factors))
    too_much = _as_floats(factors * excess(name, block)) * load_f32x16(sums16)
    return (int_to_f32x16(acc) - too_much) * unit(name, block)


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
    high = (four_times_i16x8(load_i16x8(block + 34)) >> shifts_0_3_6_9()) & 7
    at = spill(widen_i8x32(load_i8x32(block + 2)) | high << 8)
    return read_iq1(at), read_iq1(at + 16), read_iq1(at + 32), read_iq1(at + 48)


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


@njit
def _iq1_m_nibbles(block):
    """The 32 nibbles of qh in 16-bit lanes, with rubbish above."""
    return twice_i8x16(load_i8x16(block + 32)) >> shifts_0_4()


@implements(magnitudes, "IQ1_M")
def _iq1_m_magnitudes(name, block):
    nibbles = _iq1_m_nibbles(block)
    at = spill(widen_i8x32(load_i8x32(block)) | (nibbles & 7) << 8)
    eighths = narrow_i16x32((nibbles & 8 ^ 8) >> 2)  # 2 for plus 1/8, 0 for minus
    return (
        read_iq1(at) + eight_times_0(eighths),
        read_iq1(at + 16) + eight_times_1(eighths),
        read_iq1(at + 32) + eight_times_2(eighths),
        read_iq1(at + 48) + eight_times_3(eighths),
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
