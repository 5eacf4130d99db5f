"""Q2_K and Q3_K: super-blocks of 256 codes of two or three bits, with an integer scale for every 16."""

from numba import njit, uint64

from kimi_lite.native.cpu.blocks import dot256, implements, unpack
from kimi_lite.native.cpu.types.k_quants import load_twice
from kimi_lite.native.simd import (
    extend_f32x8,
    extend_i32x8,
    int_to_f32x8,
    int_to_f32x16,
    load_f16,
    load_i8x16,
    load_i8x64,
    load_i16x16,
    load_u32,
    load_u64,
    pack_u64,
    store_f32x16,
    store_i8x64,
    widen_i8x16,
    widen_signed_i8x16,
    zero_i32x16,
)
from kimi_lite.native.simd_bytes import bit_fields, widen16_i8x16, widen16_signed_i8x16
from kimi_lite.native.simd_dot import pair_dot_i16x16, scaled_dot_u8x64
from kimi_lite.native.simd_scales import spreadable, words16_0, words16_1, words16_2, words16_3

_fields_0_1, _fields_2_3 = bit_fields(3, 0, 2), bit_fields(3, 4, 6)
_bits_0_1, _bits_2_3 = bit_fields(4, -2, -1), bit_fields(4, 0, 1)  # brought to bit 2
_bits_4_5, _bits_6_7 = bit_fields(4, 2, 3), bit_fields(4, 4, 5)


@njit
def _two_bits(qs):
    """64 bytes as 4 x 64 codes of two bits: bits 0..1 of 32 bytes, then bits 2..3, ..., then of the next 32."""
    first, second = load_twice(qs), load_twice(qs + 32)
    return _fields_0_1(first), _fields_2_3(first), _fields_0_1(second), _fields_2_3(second)


@njit
def _scaled_total(start, codes, words, x):
    """`start` plus the products of 4 x 64 codes times the int16 scale of each 16, as i32x16."""
    (c0, c1, c2, c3), words = codes, spreadable(words)
    total = scaled_dot_u8x64(start, c0, load_i8x64(x), words16_0(words))
    total = scaled_dot_u8x64(total, c1, load_i8x64(x + 64), words16_1(words))
    total = scaled_dot_u8x64(total, c2, load_i8x64(x + 128), words16_2(words))
    return scaled_dot_u8x64(total, c3, load_i8x64(x + 192), words16_3(words))


@njit
def _store_codes(codes, values):
    c0, c1, c2, c3 = values
    store_i8x64(codes, c0)
    store_i8x64(codes + 64, c1)
    store_i8x64(codes + 128, c2)
    store_i8x64(codes + 192, c3)


# Q2_K: scales:16 (low nibble: scale, high: minimum) | qs:64 | d:2 | dmin:2
# ---------------------------------------------


@implements(dot256, "Q2_K")
def _q2_k_dot(name, block, x, sums16, sums32, minus16):
    scales = load_i8x16(block)
    total = _scaled_total(zero_i32x16(), _two_bits(block + 16), widen16_i8x16(scales & 15), x)
    minima = int_to_f32x8(pair_dot_i16x16(widen16_i8x16(scales >> 4), load_i16x16(minus16)))
    return int_to_f32x16(total) * load_f16(block + 80) + extend_f32x8(minima * load_f16(block + 82))


@implements(unpack, "Q2_K")
def _q2_k_unpack(name, block, codes, scales, minima):
    _store_codes(codes, _two_bits(block + 16))
    packed = widen_i8x16(load_i8x16(block))
    store_f32x16(scales, int_to_f32x16(packed & 15) * load_f16(block + 80))
    store_f32x16(minima, int_to_f32x16(packed >> 4) * load_f16(block + 82))


# Q3_K: hmask:32 (bit 2 of the codes, one bit a group of 32) | qs:64 | scales:12 (16 of six bits, - 32) | d:2; codes - 4
# ----


@njit
def _q3_k_codes(block):
    c0, c1, c2, c3 = _two_bits(block + 32)
    high = load_twice(block)
    return c0 | _bits_0_1(high), c1 | _bits_2_3(high), c2 | _bits_4_5(high), c3 | _bits_6_7(high)


@njit
def _q3_k_scales(block):
    """The 16 scales as signed bytes: their low nibbles are in 8 bytes, their high pairs of bits in 4."""
    low, pairs = load_u64(block + 96), uint64(load_u32(block + 104))
    pairs = pairs | (pairs << uint64(30))  # in each half of the word one pair a byte at bit 0, another at bit 4
    first = (low & 0x0F0F0F0F0F0F0F0F) | ((pairs & 0x0303030303030303) << uint64(4))
    last = ((low >> 4) & 0x0F0F0F0F0F0F0F0F) | (pairs & 0x3030303030303030)
    return pack_u64(first, last) - 32


@implements(dot256, "Q3_K")
def _q3_k_dot(name, block, x, sums16, sums32, minus16):
    words = widen16_signed_i8x16(_q3_k_scales(block))
    offsets = extend_i32x8(pair_dot_i16x16(words, load_i16x16(minus16)) << 2)
    return int_to_f32x16(_scaled_total(offsets, _q3_k_codes(block), words, x)) * load_f16(block + 108)


@implements(unpack, "Q3_K")
def _q3_k_unpack(name, block, codes, scales, minima):
    _store_codes(codes, _q3_k_codes(block))
    factors = int_to_f32x16(widen_signed_i8x16(_q3_k_scales(block))) * load_f16(block + 108)
    store_f32x16(scales, factors)
    store_f32x16(minima, factors * 4.0)
