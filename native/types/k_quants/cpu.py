"""Q2_K to Q6_K: super-blocks of 256 with integer scales (and minima) for groups of 16 or 32 weights.

Products are scaled as integers (`scaled_dot_u8x64`), so that a block needs one conversion to float32. Codes fit in 7
bits.
"""

from numba import njit, types, uint64

from kimi_lite.native.cpu.blocks import dot256, has_digits, implements, unpack
from kimi_lite.native.grid_lanes import narrow_i16x16
from kimi_lite.native.simd import (
    extend_f32x8,
    extend_i32x8,
    fma_f32x16,
    high_f32x16,
    int_to_f32x8,
    int_to_f32x16,
    load_f16,
    load_f32x8,
    load_i8x16,
    load_i8x32,
    load_i8x64,
    load_i16x16,
    load_u32,
    load_u64,
    low_f32x16,
    pack_u64,
    splat_f32x16,
    store_f32,
    store_f32x8,
    store_f32x16,
    store_i8x64,
    twice_i8x32,
    widen_i8x16,
    widen_signed_i8x16,
    zero_i32x16,
)
from kimi_lite.native.simd_bytes import bit_fields, twice_each_byte, upper_i8x16, widen16_i8x16, widen16_signed_i8x16
from kimi_lite.native.simd_digits import (
    high_digits,
    low_digits,
    minima_bytes,
    minima_nibbles,
    small_products,
)
from kimi_lite.native.simd_dot import pair_dot_i16x16, scaled_dot_u8x64
from kimi_lite.native.simd_scales import (
    spreadable,
    words16_0,
    words16_1,
    words16_2,
    words16_3,
    words32_0,
    words32_1,
    words32_2,
    words32_3,
)
from kimi_lite.native.types.k_quants.layout import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K

_Q2_K_SCALES, _Q2_K_QS, _Q2_K_D, _Q2_K_DMIN = Q2_K.offsets("scales", "qs", "d", "dmin")
_Q3_K_HMASK, _Q3_K_QS, _Q3_K_SCALES, _Q3_K_D = Q3_K.offsets("hmask", "qs", "scales", "d")
[_Q4_K_QS] = Q4_K.offsets("qs")
_D, _DMIN, _SCALES = Q4_K.offsets("d", "dmin", "scales")  # the same in Q5_K
_Q5_K_QH, _Q5_K_QS = Q5_K.offsets("qh", "qs")
_Q6_K_QL, _Q6_K_QH, _Q6_K_SCALES, _Q6_K_D = Q6_K.offsets("ql", "qh", "scales", "d")

# The first and the last half of 64 bytes: bits 0..3 and 4..7; bits 2 k and 2 k + 1, brought to bit 4; and so on.
nibbles, _high_nibbles = bit_fields(15, 0, 4), bit_fields(15, 4)
_bits_0_1, _bits_2_3 = bit_fields(16, -4, -3), bit_fields(16, -2, -1)
_bits_4_5, _bits_6_7 = bit_fields(16, 0, 1), bit_fields(16, 2, 3)
low_pairs, high_pairs = bit_fields(0x30, -4, -2), bit_fields(0x30, 0, 2)


@njit
def load_twice(address):
    """32 bytes twice."""
    return twice_i8x32(load_i8x32(address))


# Q4_K


@njit
def _six_bits(address):
    """12 bytes as 8 scales and 8 minima, one a byte."""
    first, second, third = (
        uint64(load_u32(address)),
        uint64(load_u32(address + 4)),
        uint64(load_u32(address + 8)),
    )
    scales = (first & 0x3F3F3F3F) | (((third & 0x0F0F0F0F) | (((first >> 6) & 0x03030303) << 4)) << 32)
    minima = (second & 0x3F3F3F3F) | ((((third >> 4) & 0x0F0F0F0F) | (((second >> 6) & 0x03030303) << 4)) << 32)
    return pack_u64(scales, minima)


@njit
def _minus_minima(block, scales, total, sums32):
    """d * total - dmin * sum of minima * sums; `scales` as `_six_bits` gives them."""
    minima = high_f32x16(int_to_f32x16(widen_i8x16(scales))) * load_f16(block + _DMIN)
    taken = extend_f32x8(minima * load_f32x8(sums32))
    return fma_f32x16(int_to_f32x16(total), splat_f32x16(load_f16(block + _D)), taken * -1.0)


@implements(dot256, "Q4_K")
def _q4_k_dot(name, block, x, sums16, sums32, minus16):
    scales, qs = _six_bits(block + _SCALES), block + _Q4_K_QS
    words = spreadable(widen16_i8x16(scales))
    total = scaled_dot_u8x64(zero_i32x16(), nibbles(load_twice(qs)), load_i8x64(x), words32_0(words))
    total = scaled_dot_u8x64(total, nibbles(load_twice(qs + 32)), load_i8x64(x + 64), words32_1(words))
    total = scaled_dot_u8x64(total, nibbles(load_twice(qs + 64)), load_i8x64(x + 128), words32_2(words))
    total = scaled_dot_u8x64(total, nibbles(load_twice(qs + 96)), load_i8x64(x + 192), words32_3(words))
    return _minus_minima(block, scales, total, sums32)


@njit
def _store_six_bits(block, scales, minima):
    factors = int_to_f32x16(widen_i8x16(_six_bits(block + _SCALES)))
    store_f32x8(scales, low_f32x16(factors) * load_f16(block + _D))
    store_f32x8(minima, high_f32x16(factors) * load_f16(block + _DMIN))


@implements(unpack, "Q4_K")
def _q4_k_unpack(name, block, codes, scales, minima):
    for k in range(4):
        store_i8x64(codes + 64 * k, nibbles(load_twice(block + _Q4_K_QS + 32 * k)))
    _store_six_bits(block, scales, minima)


# Q5_K


@njit
def five_bits(qs, qh):
    """4 x 64 codes: nibbles at `qs`, and bit 4 at `qh`, brought there from bits 2 k and 2 k + 1."""
    qh = load_twice(qh)
    c0 = nibbles(load_twice(qs)) | _bits_0_1(qh)
    c1 = nibbles(load_twice(qs + 32)) | _bits_2_3(qh)
    c2 = nibbles(load_twice(qs + 64)) | _bits_4_5(qh)
    c3 = nibbles(load_twice(qs + 96)) | _bits_6_7(qh)
    return c0, c1, c2, c3


@implements(dot256, "Q5_K")
def _q5_k_dot(name, block, x, sums16, sums32, minus16):
    scales, (c0, c1, c2, c3) = _six_bits(block + _SCALES), five_bits(block + _Q5_K_QS, block + _Q5_K_QH)
    words = spreadable(widen16_i8x16(scales))
    total = scaled_dot_u8x64(zero_i32x16(), c0, load_i8x64(x), words32_0(words))
    total = scaled_dot_u8x64(total, c1, load_i8x64(x + 64), words32_1(words))
    total = scaled_dot_u8x64(total, c2, load_i8x64(x + 128), words32_2(words))
    total = scaled_dot_u8x64(total, c3, load_i8x64(x + 192), words32_3(words))
    return _minus_minima(block, scales, total, sums32)


@implements(unpack, "Q5_K")
def _q5_k_unpack(name, block, codes, scales, minima):
    c0, c1, c2, c3 = five_bits(block + _Q5_K_QS, block + _Q5_K_QH)
    store_i8x64(codes, c0)
    store_i8x64(codes + 64, c1)
    store_i8x64(codes + 128, c2)
    store_i8x64(codes + 192, c3)
    _store_six_bits(block, scales, minima)


# Q6_K


@njit
def _q6_k_low(block, half):
    """The first 64 codes of a half: low nibbles of ql and bits 0..3 of qh."""
    return (load_i8x64(block + _Q6_K_QL + 64 * half) & 15) | low_pairs(load_twice(block + _Q6_K_QH + 32 * half))


@njit
def _q6_k_high(block, half):
    """The last 64 codes of a half: high nibbles of ql and bits 4..7 of qh."""
    return _high_nibbles(load_i8x64(block + _Q6_K_QL + 64 * half)) | high_pairs(
        load_twice(block + _Q6_K_QH + 32 * half)
    )


@implements(dot256, "Q6_K")
def _q6_k_dot(name, block, x, sums16, sums32, minus16):
    scales = widen16_signed_i8x16(load_i8x16(block + _Q6_K_SCALES))
    offsets, words = extend_i32x8(pair_dot_i16x16(scales, load_i16x16(minus16)) << 5), spreadable(scales)
    total = scaled_dot_u8x64(offsets, _q6_k_low(block, 0), load_i8x64(x), words16_0(words))
    total = scaled_dot_u8x64(total, _q6_k_high(block, 0), load_i8x64(x + 64), words16_1(words))
    total = scaled_dot_u8x64(total, _q6_k_low(block, 1), load_i8x64(x + 128), words16_2(words))
    total = scaled_dot_u8x64(total, _q6_k_high(block, 1), load_i8x64(x + 192), words16_3(words))
    return int_to_f32x16(total) * load_f16(block + _Q6_K_D)


@implements(unpack, "Q6_K")
def _q6_k_unpack(name, block, codes, scales, minima):
    for half in range(2):
        store_i8x64(codes + 128 * half, _q6_k_low(block, half))
        store_i8x64(codes + 128 * half + 64, _q6_k_high(block, half))
    factors = int_to_f32x16(widen_signed_i8x16(load_i8x16(block + _Q6_K_SCALES))) * load_f16(block + _Q6_K_D)
    store_f32x16(scales, factors)
    store_f32x16(minima, factors * 32.0)


# Q2_K and Q3_K: codes of two bits, or of three

_fields_0_1, _fields_2_3 = bit_fields(3, 0, 2), bit_fields(3, 4, 6)
_third_bits_0_1, _third_bits_2_3 = bit_fields(4, -2, -1), bit_fields(4, 0, 1)  # brought to bit 2
_third_bits_4_5, _third_bits_6_7 = bit_fields(4, 2, 3), bit_fields(4, 4, 5)


@njit
def two_bits(qs):
    """64 bytes as 4 x 64 codes of two bits: bits 0..1 of 32 bytes, then bits 2..3, ..., then of the next 32."""
    first, second = load_twice(qs), load_twice(qs + 32)
    return _fields_0_1(first), _fields_2_3(first), _fields_0_1(second), _fields_2_3(second)


@njit
def scaled_total(start, codes, words, x):
    """`start` plus the products of 4 x 64 codes times the int16 scale of each 16, as i32x16."""
    (c0, c1, c2, c3), words = codes, spreadable(words)
    total = scaled_dot_u8x64(start, c0, load_i8x64(x), words16_0(words))
    total = scaled_dot_u8x64(total, c1, load_i8x64(x + 64), words16_1(words))
    total = scaled_dot_u8x64(total, c2, load_i8x64(x + 128), words16_2(words))
    return scaled_dot_u8x64(total, c3, load_i8x64(x + 192), words16_3(words))


@njit
def store_codes(codes, values):
    c0, c1, c2, c3 = values
    store_i8x64(codes, c0)
    store_i8x64(codes + 64, c1)
    store_i8x64(codes + 128, c2)
    store_i8x64(codes + 192, c3)


# Q2_K


@implements(dot256, "Q2_K")
def _q2_k_dot(name, block, x, sums16, sums32, minus16):
    scales = load_i8x16(block + _Q2_K_SCALES)
    total = scaled_total(zero_i32x16(), two_bits(block + _Q2_K_QS), widen16_i8x16(scales & 15), x)
    minima = int_to_f32x8(pair_dot_i16x16(widen16_i8x16(scales >> 4), load_i16x16(minus16)))
    taken = extend_f32x8(minima * load_f16(block + _Q2_K_DMIN))
    return fma_f32x16(int_to_f32x16(total), splat_f32x16(load_f16(block + _Q2_K_D)), taken)


@implements(unpack, "Q2_K")
def _q2_k_unpack(name, block, codes, scales, minima):
    store_codes(codes, two_bits(block + _Q2_K_QS))
    packed = widen_i8x16(load_i8x16(block + _Q2_K_SCALES))
    store_f32x16(scales, int_to_f32x16(packed & 15) * load_f16(block + _Q2_K_D))
    store_f32x16(minima, int_to_f32x16(packed >> 4) * load_f16(block + _Q2_K_DMIN))


# Q3_K


@njit
def three_bits(qs, hmask):
    """The same with a third bit: that of code j of group g of 32 is bit g of byte j."""
    c0, c1, c2, c3 = two_bits(qs)
    high = load_twice(hmask)
    return (
        c0 | _third_bits_0_1(high),
        c1 | _third_bits_2_3(high),
        c2 | _third_bits_4_5(high),
        c3 | _third_bits_6_7(high),
    )


@njit
def _q3_k_scales(block):
    """The 16 scales as signed bytes: their low nibbles are in 8 bytes, their high pairs of bits in 4."""
    low, pairs = load_u64(block + _Q3_K_SCALES), uint64(load_u32(block + _Q3_K_SCALES + 8))
    pairs = pairs | (pairs << uint64(30))  # in each half of the word one pair a byte at bit 0, another at bit 4
    first = (low & 0x0F0F0F0F0F0F0F0F) | ((pairs & 0x0303030303030303) << uint64(4))
    last = ((low >> 4) & 0x0F0F0F0F0F0F0F0F) | (pairs & 0x3030303030303030)
    return pack_u64(first, last) - 32


@implements(dot256, "Q3_K")
def _q3_k_dot(name, block, x, sums16, sums32, minus16):
    words = widen16_signed_i8x16(_q3_k_scales(block))
    offsets = extend_i32x8(pair_dot_i16x16(words, load_i16x16(minus16)) << 2)
    return int_to_f32x16(scaled_total(offsets, three_bits(block + _Q3_K_QS, block + _Q3_K_HMASK), words, x)) * load_f16(
        block + _Q3_K_D
    )


@implements(unpack, "Q3_K")
def _q3_k_unpack(name, block, codes, scales, minima):
    store_codes(codes, three_bits(block + _Q3_K_QS, block + _Q3_K_HMASK))
    factors = int_to_f32x16(widen_signed_i8x16(_q3_k_scales(block))) * load_f16(block + _Q3_K_D)
    store_f32x16(scales, factors)
    store_f32x16(minima, factors * 4.0)


# Whole numbers for matrix tiles


@njit
def _store_two_digits(low, high, codes, scales):
    """4 x 64 unsigned codes times six-bit scales of each 32: in digits of 8, as the scales have two."""
    (c0, c1, c2, c3), lower, upper = codes, spreadable(scales & 7), spreadable(scales >> 3)
    store_i8x64(low, small_products(c0, words32_0(lower)))
    store_i8x64(high, small_products(c0, words32_0(upper)))
    store_i8x64(low + 64, small_products(c1, words32_1(lower)))
    store_i8x64(high + 64, small_products(c1, words32_1(upper)))
    store_i8x64(low + 128, small_products(c2, words32_2(lower)))
    store_i8x64(high + 128, small_products(c2, words32_2(upper)))
    store_i8x64(low + 192, small_products(c3, words32_3(lower)))
    store_i8x64(high + 192, small_products(c3, words32_3(upper)))


@njit
def _store_six_bits_digits(block, codes, low, high, minima, factors):
    scales = _six_bits(block + _SCALES)
    _store_two_digits(low, high, codes, widen16_i8x16(scales))
    store_i8x64(minima, minima_bytes(twice_each_byte(upper_i8x16(scales))))
    store_f32(factors, load_f16(block + _D))
    store_f32(factors + 64, load_f16(block + _DMIN))


@has_digits("Q4_K", shift=3, is_signed=False, minima="bytes")
def _q4_k_digits(name, block, low, high, minima, factors):
    qs = block + _Q4_K_QS
    c0, c1 = nibbles(load_twice(qs)), nibbles(load_twice(qs + 32))
    c2, c3 = nibbles(load_twice(qs + 64)), nibbles(load_twice(qs + 96))
    _store_six_bits_digits(block, (c0, c1, c2, c3), low, high, minima, factors)


@has_digits("Q5_K", shift=3, is_signed=False, minima="bytes")
def _q5_k_digits(name, block, low, high, minima, factors):
    _store_six_bits_digits(block, five_bits(block + _Q5_K_QS, block + _Q5_K_QH), low, high, minima, factors)


@has_digits("Q6_K", shift=8, is_signed=True)
def _q6_k_digits(name, block, low, high, minima, factors):
    words = spreadable(widen16_signed_i8x16(load_i8x16(block + _Q6_K_SCALES)))
    c0, c1 = _q6_k_low(block, 0) - 32, _q6_k_high(block, 0) - 32
    c2, c3 = _q6_k_low(block, 1) - 32, _q6_k_high(block, 1) - 32
    store_i8x64(low, low_digits(c0, words16_0(words)))
    store_i8x64(high, high_digits(c0, words16_0(words)))
    store_i8x64(low + 64, low_digits(c1, words16_1(words)))
    store_i8x64(high + 64, high_digits(c1, words16_1(words)))
    store_i8x64(low + 128, low_digits(c2, words16_2(words)))
    store_i8x64(high + 128, high_digits(c2, words16_2(words)))
    store_i8x64(low + 192, low_digits(c3, words16_3(words)))
    store_i8x64(high + 192, high_digits(c3, words16_3(words)))
    store_f32(factors, load_f16(block + _Q6_K_D))


@has_digits("Q2_K", shift=0, is_signed=False, minima="nibbles")
def _q2_k_digits(name, block, low, high, minima, factors):
    scales = load_i8x16(block + _Q2_K_SCALES)
    (c0, c1, c2, c3), words = two_bits(block + _Q2_K_QS), spreadable(widen16_i8x16(scales & 15))
    store_i8x64(low, small_products(c0, words16_0(words)))
    store_i8x64(low + 64, small_products(c1, words16_1(words)))
    store_i8x64(low + 128, small_products(c2, words16_2(words)))
    store_i8x64(low + 192, small_products(c3, words16_3(words)))
    store_i8x64(minima, minima_nibbles(scales & 0xF0, narrow_i16x16(widen16_i8x16(scales) >> 4)))
    store_f32(factors, load_f16(block + _Q2_K_D))
    store_f32(factors + 64, load_f16(block + _Q2_K_DMIN))


@has_digits("Q3_K", shift=0, is_signed=True)
def _q3_k_digits(name, block, low, high, minima, factors):
    """Times minus the scales: -4 * -32 would not fit."""
    (c0, c1, c2, c3), words = (
        three_bits(block + _Q3_K_QS, block + _Q3_K_HMASK),
        spreadable((widen16_signed_i8x16(_q3_k_scales(block)) ^ -1) + 1),
    )
    store_i8x64(low, low_digits(c0 - 4, words16_0(words)))
    store_i8x64(low + 64, low_digits(c1 - 4, words16_1(words)))
    store_i8x64(low + 128, low_digits(c2 - 4, words16_2(words)))
    store_i8x64(low + 192, low_digits(c3 - 4, words16_3(words)))
    store_f32(factors, load_f16(block + _Q3_K_D) * types.float32(-1))
