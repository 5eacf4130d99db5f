"""IQ2_K to IQ6_K, IQ2_KS to IQ5_KS, IQ4_KSS, IQ2_KL: a type gives its codes, scales and steps, the products are shared.

No weight selects its table: the step to the second one multiplies the sum of 16 activations. Values of codes of 2 and 3
bits fit in 7 bits once they are unsigned, and integers take their scales (`scaled_total`); wider ones become float32 in
each chunk, as those of IQ4_XS. A scale stands for 16 weights here; where it stands for 32 it is there twice.
"""

from numba import njit, types, uint64

from kimi_lite.native.cpu.blocks import chosen_by_name, dot256, implements, unpack
from kimi_lite.native.grid_lanes import bytes_of_i16x8, even_f32x16, load_widened_i8x8
from kimi_lite.native.simd import (
    extend_i32x8,
    fma_f32x16,
    int_to_f32x16,
    load_f16,
    load_f32x16,
    load_i8x16,
    load_i8x64,
    load_i16x16,
    load_u16,
    load_u32,
    load_u64,
    narrow_i32x16,
    pack_u64,
    spread16_0,
    spread16_1,
    spread16_2,
    spread16_3,
    store_f32x8,
    store_f32x16,
    widen_i8x16,
    widen_signed_i8x16,
    zero_i32x16,
)
from kimi_lite.native.simd_bytes import bit_fields, byte_table, wide_byte_table
from kimi_lite.native.simd_dot import HAS_FULL_UNSIGNED_DOT, dot_i8x64, dot_u8x64, pair_dot_i16x16
from kimi_lite.native.simd_scales import (
    lowest_bits,
    pairs_of_bits_i32x16,
    twice_each_i32x16,
    where_bits_i32x16,
)
from kimi_lite.native.types.blocks_of_32.cpu import nibbles_of_two
from kimi_lite.native.types.k_quants.cpu import (
    five_bits,
    high_pairs,
    load_twice,
    low_pairs,
    nibbles,
    scaled_total,
    store_codes,
    three_bits,
    two_bits,
)
from kimi_lite.native.types.two_tables.lanes import (
    groups16_0,
    groups16_1,
    groups16_2,
    groups16_3,
    nibbles_of_four,
    odd_places,
    twice_each_of_16,
    unfolded,
    words_of_i32x16,
)
from kimi_lite.native.types.two_tables.layout import (
    FIVE,
    FOUR,
    IQ2_K,
    IQ2_KL,
    IQ2_KS,
    IQ3_K,
    IQ3_KS,
    IQ4_K,
    IQ4_KS,
    IQ5_K,
    IQ5_KS,
    IQ6_K,
    OFFSETS,
    PAIRS,
    SIX,
    STEPS,
    THREE,
    TWO,
)

_OF_16 = ("IQ2_K", "IQ3_K", "IQ4_K", "IQ5_K", "IQ6_K")
_OF_32 = ("IQ2_KS", "IQ2_KL", "IQ3_KS", "IQ4_KS", "IQ4_KSS", "IQ5_KS")
_SMALL = ("IQ2_K", "IQ2_KS", "IQ2_KL", "IQ3_K", "IQ3_KS")
_LARGE = ("IQ4_K", "IQ4_KS", "IQ4_KSS", "IQ5_K", "IQ5_KS", "IQ6_K")
_D, _EXTRA = IQ2_K.offsets("d", "extra")  # the same in all five
_IQ2_K_SCALES, _IQ2_K_QS = IQ2_K.offsets("scales", "qs")
_IQ3_K_SCALES_H, _IQ3_K_SCALES_L, _IQ3_K_QS, _IQ3_K_QH = IQ3_K.offsets("scales_h", "scales_l", "qs", "qh")
_IQ4_K_SCALES_H, _IQ4_K_SCALES_L, _IQ4_K_QS = IQ4_K.offsets("scales_h", "scales_l", "qs")  # the same in IQ5_K
_IQ5_K_QS, _IQ5_K_QH = IQ5_K.offsets("qs", "qh")
_IQ6_K_SCALES, _IQ6_K_QS, _IQ6_K_QH = IQ6_K.offsets("scales", "qs", "qh")
_KS_EXTRA, _KS_SCALES, _KS_QS = IQ3_KS.offsets("extra", "scales", "qs")  # the same in IQ2_KS
[_IQ3_KS_QH] = IQ3_KS.offsets("qh")
_KL_SCALES_H, _KL_SCALES_L, _KL_QS, _KL_QH = IQ2_KL.offsets("scales_h", "scales_l", "qs", "qh")
_IQ4_KS_SCALES, _IQ4_KS_QS = IQ4_KS.offsets("scales", "qs")
_IQ5_KS_SCALES, _IQ5_KS_QS, _IQ5_KS_QH = IQ5_KS.offsets("scales", "qs", "qh")
_STEP2, _STEP3, _STEP4, _STEP5, _STEP6 = (STEPS[values] for values in (TWO, THREE, FOUR, FIVE, SIX))
assert IQ2_KS.offsets("extra", "scales", "qs") == [_KS_EXTRA, _KS_SCALES, _KS_QS]


@chosen_by_name
def codes(name, block):
    """The 4 x 64 codes."""


@chosen_by_name
def signed_values(name, codes):
    """i8x64: what codes stand for in the first table."""


@chosen_by_name
def unsigned_values(name, codes):
    """The same, `too_large` higher."""


@chosen_by_name
def too_large(name):
    """What `unsigned_values` are too large by."""


@chosen_by_name
def scales(name, block):
    """i32x16: the scale of every 16 weights, an integer."""


@chosen_by_name
def steps(name, block):
    """i32x16: what values are larger by in the table that every 16 weights chose."""


@chosen_by_name
def unit(name, block):
    """float32: what a scale of 1 is worth, but for the row's scale."""


@chosen_by_name
def store_groups(name, address, values):
    """Stores one float32 a group, of one per 16 weights."""


@implements(unit, *_OF_16)
def _unit_of_block(name, block):
    return load_f16(block + _D)


@implements(unit, *_OF_32)
def _unit_of_row(name, block):
    return types.float32(1)


@implements(store_groups, *_OF_16)
def _store_groups_of_16(name, address, values):
    store_f32x16(address, values)


@implements(store_groups, *_OF_32)
def _store_groups_of_32(name, address, values):
    store_f32x8(address, even_f32x16(values))


# Products


@implements(dot256, *_SMALL)
def _small_dot(name, block, x, sums16, sums32, minus16):
    c0, c1, c2, c3 = codes(name, block)
    values = (
        unsigned_values(name, c0),
        unsigned_values(name, c1),
        unsigned_values(name, c2),
        unsigned_values(name, c3),
    )
    words = words_of_i32x16(scales(name, block))
    more = words * (words_of_i32x16(steps(name, block)) * -1 + too_large(name))
    start = extend_i32x8(pair_dot_i16x16(more, load_i16x16(minus16)))
    return int_to_f32x16(scaled_total(start, values, words, x)) * unit(name, block)


if HAS_FULL_UNSIGNED_DOT:

    @njit
    def _product(name, codes, x):
        return dot_u8x64(zero_i32x16(), unsigned_values(name, codes), load_i8x64(x))
else:

    @njit
    def _product(name, codes, x):
        return dot_i8x64(zero_i32x16(), signed_values(name, codes), load_i8x64(x))


_BIAS = 128 if HAS_FULL_UNSIGNED_DOT else 0


@implements(dot256, *_LARGE)
def _large_dot(name, block, x, sums16, sums32, minus16):
    factors = int_to_f32x16(scales(name, block)) * unit(name, block)
    c0, c1, c2, c3 = codes(name, block)
    values = factors * load_f32x16(sums16) * int_to_f32x16(steps(name, block) - _BIAS)
    values = fma_f32x16(int_to_f32x16(_product(name, c0, x)), spread16_0(factors), values)
    values = fma_f32x16(int_to_f32x16(_product(name, c1, x + 64)), spread16_1(factors), values)
    values = fma_f32x16(int_to_f32x16(_product(name, c2, x + 128)), spread16_2(factors), values)
    return fma_f32x16(int_to_f32x16(_product(name, c3, x + 192)), spread16_3(factors), values)


@implements(unpack, *_SMALL, *_LARGE)
def _unpack(name, block, to_codes, to_scales, minima):
    c0, c1, c2, c3 = codes(name, block)
    more = narrow_i32x16(steps(name, block))
    values = (
        signed_values(name, c0) + groups16_0(more),
        signed_values(name, c1) + groups16_1(more),
        signed_values(name, c2) + groups16_2(more),
        signed_values(name, c3) + groups16_3(more),
    )
    store_codes(to_codes, values)
    factors = int_to_f32x16(scales(name, block)) * unit(name, block)
    store_groups(name, to_scales, factors)
    store_groups(name, minima, factors * 0.0)


# What codes stand for


def _raised(values: tuple[int, ...], offset: int) -> list[int]:
    """As bytes, `offset` higher."""
    return [(value + offset + 128) % 256 - 128 for value in values]


_two, _raised_two = byte_table(TWO * 4), byte_table(_raised(TWO, OFFSETS[TWO]) * 4)
_three, _raised_three = byte_table(THREE * 2), byte_table(_raised(THREE, OFFSETS[THREE]) * 2)
_four, _raised_four = byte_table(FOUR), byte_table(_raised(FOUR, 128))
_five, _raised_five = wide_byte_table(FIVE), wide_byte_table(_raised(FIVE, 128))
_six, _raised_six = wide_byte_table(SIX), wide_byte_table(_raised(SIX, 128))
_pairs, _raised_pairs = wide_byte_table(PAIRS), wide_byte_table(_raised(PAIRS, OFFSETS[PAIRS]))
_OFFSET_TWO, _OFFSET_THREE, _OFFSET_PAIRS = OFFSETS[TWO], OFFSETS[THREE], OFFSETS[PAIRS]


@implements(signed_values, "IQ2_K", "IQ2_KS")
def _signed_two(name, codes):
    return _two(codes)


@implements(unsigned_values, "IQ2_K", "IQ2_KS")
def _unsigned_two(name, codes):
    return _raised_two(codes)


@implements(too_large, "IQ2_K", "IQ2_KS")
def _too_large_two(name):
    return _OFFSET_TWO


@implements(signed_values, "IQ2_KL")
def _signed_pairs(name, codes):
    return _pairs(codes)


@implements(unsigned_values, "IQ2_KL")
def _unsigned_pairs(name, codes):
    return _raised_pairs(codes)


@implements(too_large, "IQ2_KL")
def _too_large_pairs(name):
    return _OFFSET_PAIRS


@implements(signed_values, "IQ3_K", "IQ3_KS")
def _signed_three(name, codes):
    return _three(codes)


@implements(unsigned_values, "IQ3_K", "IQ3_KS")
def _unsigned_three(name, codes):
    return _raised_three(codes)


@implements(too_large, "IQ3_K", "IQ3_KS")
def _too_large_three(name):
    return _OFFSET_THREE


@implements(signed_values, "IQ4_K", "IQ4_KS", "IQ4_KSS")
def _signed_four(name, codes):
    return _four(codes)


@implements(unsigned_values, "IQ4_K", "IQ4_KS", "IQ4_KSS")
def _unsigned_four(name, codes):
    return _raised_four(codes)


@implements(signed_values, "IQ5_K", "IQ5_KS")
def _signed_five(name, codes):
    return _five(codes)


@implements(unsigned_values, "IQ5_K", "IQ5_KS")
def _unsigned_five(name, codes):
    return _raised_five(codes)


@implements(signed_values, "IQ6_K")
def _signed_six(name, codes):
    return _six(codes)


@implements(unsigned_values, "IQ6_K")
def _unsigned_six(name, codes):
    return _raised_six(codes)


# Codes


@implements(codes, "IQ2_K")
def _iq2_k_codes(name, block):
    return two_bits(block + _IQ2_K_QS)


@implements(codes, "IQ2_KS")
def _iq2_ks_codes(name, block):
    return two_bits(block + _KS_QS)


_fifth_bits_0_1, _fifth_bits_2_3 = bit_fields(16, -4, -3), bit_fields(16, -2, -1)  # brought to bit 4
_fifth_bits_4_5, _fifth_bits_6_7 = bit_fields(16, 0, 1), bit_fields(16, 2, 3)


@implements(codes, "IQ2_KL")
def _iq2_kl_codes(name, block):
    """A code of 5 bits twice: of the even element as it is, of the odd one 32 higher."""
    qs, high = block + _KL_QS, twice_each_of_16(load_i8x16(block + _KL_QH))
    c0 = nibbles(twice_each_of_16(load_i8x16(qs))) | _fifth_bits_0_1(high)
    c1 = nibbles(twice_each_of_16(load_i8x16(qs + 16))) | _fifth_bits_2_3(high)
    c2 = nibbles(twice_each_of_16(load_i8x16(qs + 32))) | _fifth_bits_4_5(high)
    c3 = nibbles(twice_each_of_16(load_i8x16(qs + 48))) | _fifth_bits_6_7(high)
    odd = odd_places()
    return c0 | odd, c1 | odd, c2 | odd, c3 | odd


@implements(codes, "IQ3_K")
def _iq3_k_codes(name, block):
    return three_bits(block + _IQ3_K_QS, block + _IQ3_K_QH)


@implements(codes, "IQ3_KS")
def _iq3_ks_codes(name, block):
    return three_bits(block + _KS_QS, block + _IQ3_KS_QH)


@njit
def _nibbles_by_16(qs):
    return (
        nibbles_of_two(qs, qs + 16),
        nibbles_of_two(qs + 32, qs + 48),
        nibbles_of_two(qs + 64, qs + 80),
        nibbles_of_two(qs + 96, qs + 112),
    )


@implements(codes, "IQ4_K")
def _iq4_k_codes(name, block):
    return _nibbles_by_16(block + _IQ4_K_QS)


@implements(codes, "IQ4_KS")
def _iq4_ks_codes(name, block):
    return _nibbles_by_16(block + _IQ4_KS_QS)


@implements(codes, "IQ4_KSS")
def _iq4_kss_codes(name, block):
    c0, c1 = nibbles_of_four(unfolded(load_i8x64(block)))
    c2, c3 = nibbles_of_four(unfolded(load_i8x64(block + 64)))
    return c0, c1, c2, c3


@implements(codes, "IQ5_K")
def _iq5_k_codes(name, block):
    return five_bits(block + _IQ5_K_QS, block + _IQ5_K_QH)


@implements(codes, "IQ5_KS")
def _iq5_ks_codes(name, block):
    return five_bits(block + _IQ5_KS_QS, block + _IQ5_KS_QH)


@implements(codes, "IQ6_K")
def _iq6_k_codes(name, block):
    qs, first, second = block + _IQ6_K_QS, load_twice(block + _IQ6_K_QH), load_twice(block + _IQ6_K_QH + 32)
    return (
        nibbles(load_twice(qs)) | low_pairs(first),
        nibbles(load_twice(qs + 32)) | high_pairs(first),
        nibbles(load_twice(qs + 64)) | low_pairs(second),
        nibbles(load_twice(qs + 96)) | high_pairs(second),
    )


# Scales and steps


@njit
def _nibbles_in_order(address):
    """The nibbles of 8 bytes as 16 numbers: both of a byte, then of the next."""
    words = load_widened_i8x8(address)
    return widen_i8x16(bytes_of_i16x8((words | words << 4) & 0x0F0F))


@njit
def _nibbles_by_halves(address):
    """The nibbles of 4 bytes as 8 numbers, low ones first, each twice."""
    word = uint64(load_u32(address))
    eight = (word & uint64(0x0F0F0F0F)) | ((word & uint64(0xF0F0F0F0)) << uint64(28))
    return twice_each_i32x16(widen_i8x16(pack_u64(eight, uint64(0))))


@implements(steps, "IQ2_K")
def _iq2_k_steps(name, block):
    return where_bits_i32x16(load_u16(block + _EXTRA), _STEP2)


@implements(steps, "IQ3_K")
def _iq3_k_steps(name, block):
    return where_bits_i32x16(load_u16(block + _EXTRA), _STEP3)


@implements(steps, "IQ4_K")
def _iq4_k_steps(name, block):
    return where_bits_i32x16(load_u16(block + _EXTRA), _STEP4)


@implements(steps, "IQ5_K")
def _iq5_k_steps(name, block):
    return where_bits_i32x16(load_u16(block + _EXTRA), _STEP5)


@implements(steps, "IQ6_K")
def _iq6_k_steps(name, block):
    return where_bits_i32x16(load_u16(block + _EXTRA), _STEP6)


@implements(scales, "IQ2_K")
def _iq2_k_scales(name, block):
    return _nibbles_in_order(block + _IQ2_K_SCALES) - 8


@implements(scales, "IQ3_K")
def _iq3_k_scales(name, block):
    """2 n + 1, negative where its bit is set."""
    odd = (_nibbles_in_order(block + _IQ3_K_SCALES_L) << 1) | 1
    signs = where_bits_i32x16(load_u16(block + _IQ3_K_SCALES_H), -1)
    return (odd ^ signs) - signs


@implements(scales, "IQ4_K", "IQ5_K")
def _iq4_k_scales(name, block):
    high = pairs_of_bits_i32x16(load_u32(block + _IQ4_K_SCALES_H)) << 4
    return (_nibbles_in_order(block + _IQ4_K_SCALES_L) | high) - 32


@implements(scales, "IQ6_K")
def _iq6_k_scales(name, block):
    return widen_signed_i8x16(load_i8x16(block + _IQ6_K_SCALES))


@implements(scales, "IQ2_KS")
def _iq2_ks_scales(name, block):
    high = where_bits_i32x16(load_u16(block + _KS_EXTRA) >> 8, 16)
    return twice_each_i32x16((_nibbles_in_order(block + _KS_SCALES) | high) - 16)


@implements(steps, "IQ2_KS")
def _iq2_ks_steps(name, block):
    return twice_each_i32x16(where_bits_i32x16(load_u16(block + _KS_EXTRA), _STEP2))


@implements(scales, "IQ3_KS")
def _iq3_ks_scales(name, block):
    high = twice_each_i32x16(where_bits_i32x16(load_u16(block + _KS_EXTRA), 16))
    return (_nibbles_by_halves(block + _KS_SCALES) | high) - 16


@implements(steps, "IQ3_KS")
def _iq3_ks_steps(name, block):
    return twice_each_i32x16(where_bits_i32x16(load_u16(block + _KS_EXTRA) >> 8, _STEP3))


@implements(scales, "IQ2_KL")
def _iq2_kl_scales(name, block):
    high = twice_each_i32x16(pairs_of_bits_i32x16(types.uint32(load_u16(block + _KL_SCALES_H))) << 4)
    return (_nibbles_by_halves(block + _KL_SCALES_L) | high) - 32


@implements(steps, "IQ2_KL")
def _iq2_kl_steps(name, block):
    return zero_i32x16()


@njit
def _whole_bytes(eight):
    """8 bytes in a uint64, each twice."""
    return twice_each_i32x16(widen_i8x16(pack_u64(eight, uint64(0))))


@njit
def _hidden_bytes(block):
    """The bytes in the lowest bits of 64 words."""
    return lowest_bits(load_i8x64(block)) | (lowest_bits(load_i8x64(block + 64)) << uint64(32))


@implements(scales, "IQ4_KS")
def _iq4_ks_scales(name, block):
    return (_whole_bytes(load_u64(block + _IQ4_KS_SCALES)) & 254) - 127


@implements(steps, "IQ4_KS")
def _iq4_ks_steps(name, block):
    return (_whole_bytes(load_u64(block + _IQ4_KS_SCALES)) & 1) * _STEP4


@implements(scales, "IQ4_KSS")
def _iq4_kss_scales(name, block):
    return (_whole_bytes(_hidden_bytes(block)) & 254) - 127


@implements(steps, "IQ4_KSS")
def _iq4_kss_steps(name, block):
    return (_whole_bytes(_hidden_bytes(block)) & 1) * _STEP4


@implements(scales, "IQ5_KS")
def _iq5_ks_scales(name, block):
    return (_whole_bytes(load_u64(block + _IQ5_KS_SCALES)) & 254) - 127


@implements(steps, "IQ5_KS")
def _iq5_ks_steps(name, block):
    return (_whole_bytes(load_u64(block + _IQ5_KS_SCALES)) & 1) * _STEP5
