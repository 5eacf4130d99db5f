"""Types whose 4-bit codes are looked up in a table of 16 bytes: IQ4_NL, IQ4_XS, MXFP4, NVFP4.

Table entries are signed; where the product takes full unsigned bytes they are stored 128 higher (16 for the float4
types, everywhere), which costs one multiplication with the sums of x for 256 weights.
"""

from numba import njit, uint64

from kimi_lite.native.cpu.blocks import dot8x32, dot256, implements, unpack
from kimi_lite.native.cpu.types.blocks_of_32 import nibbles_of_two, scaled_chunks, store_block
from kimi_lite.native.simd import (
    extend_f32x8,
    f32_from_bits,
    fma_f32x16,
    int_to_f32x16,
    lane_f32x16,
    load_f16,
    load_f32x8,
    load_f32x16,
    load_i8x32,
    load_i8x64,
    load_u16,
    load_u32,
    low_f32x16,
    low_i8x64,
    max_i32x16,
    pack_u64,
    splat_i32x16,
    spread16_0,
    spread16_1,
    spread16_2,
    spread16_3,
    store_f32,
    store_f32x8,
    store_i8x64,
    widen_i8x16,
    widen_signed_i8x16,
    zero_i32x16,
)
from kimi_lite.native.simd_bytes import bit_fields, byte_table, twice_each_f32x8, twice_each_quad
from kimi_lite.native.simd_dot import HAS_FULL_UNSIGNED_DOT, dot_i8x64, dot_u8x64
from kimi_lite.native.simd_scales import gather_f16, gather_u8, gather_u32, min_i32x16, small_floats_f32x16, zero_where

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FLOAT4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # E2M1, doubled
_iq4_values, _iq4_values_128 = byte_table(_IQ4), byte_table([v + 128 if v < 0 else v - 128 for v in _IQ4])
_float4_values, _float4_values_16 = byte_table(_FLOAT4), byte_table([v + 16 for v in _FLOAT4])

# IQ4_NL: d:2 | qs:16 in the order of Q4_0
# ------------------------------------------------------------------------------

_iq4_nl_scales = gather_f16(*range(0, 8 * 18, 18))

if HAS_FULL_UNSIGNED_DOT:
    _IQ4_OFFSET = -128.0

    @njit
    def _iq4_product(packed, gap, x):
        codes = nibbles_of_two(packed, packed + gap)
        return dot_u8x64(zero_i32x16(), _iq4_values_128(codes), load_i8x64(x))
else:
    _IQ4_OFFSET = 0.0

    @njit
    def _iq4_product(packed, gap, x):
        codes = nibbles_of_two(packed, packed + gap)
        return dot_i8x64(zero_i32x16(), _iq4_values(codes), load_i8x64(x))


@implements(dot8x32, "IQ4_NL")
def _iq4_nl_dot(name, blocks, x, x_scales, sums16, sums32):
    scales = _iq4_nl_scales(blocks) * load_f32x8(x_scales)
    p0, p1 = _iq4_product(blocks + 2, 18, x), _iq4_product(blocks + 38, 18, x + 64)
    p2, p3 = _iq4_product(blocks + 74, 18, x + 128), _iq4_product(blocks + 110, 18, x + 192)
    return scaled_chunks(scales, extend_f32x8(scales * load_f32x8(sums32)) * _IQ4_OFFSET, p0, p1, p2, p3)


@implements(unpack, "IQ4_NL")
def _iq4_nl_unpack(name, block, codes, scales, minima):
    store_block(
        codes, scales, minima, low_i8x64(_iq4_values(nibbles_of_two(block + 2, block + 2))), load_f16(block), 0.0
    )


# IQ4_XS: d:2 | scales_h:2 | scales_l:4 (8 six-bit scales, minus 32) | qs:128, 8 x 16 bytes in the order of IQ4_NL
# -----------


@njit
def _iq4_xs_scales(block):
    """The 8 scales as float32, in lanes 0..7."""
    low, high = uint64(load_u32(block + 4)), uint64(load_u16(block + 2))
    nibbles = _every_nibble(low) | (_every_pair(high) << uint64(4))
    scales = widen_signed_i8x16(pack_u64(nibbles, uint64(0)) - 32)
    return int_to_f32x16(scales) * load_f16(block)


@njit
def _every_nibble(word):
    """8 nibbles as 8 bytes."""
    word = (word | (word << uint64(16))) & uint64(0x0000FFFF0000FFFF)
    word = (word | (word << uint64(8))) & uint64(0x00FF00FF00FF00FF)
    return (word | (word << uint64(4))) & uint64(0x0F0F0F0F0F0F0F0F)


@njit
def _every_pair(word):
    """8 pairs of bits as 8 bytes."""
    word = (word | (word << uint64(24))) & uint64(0x000000FF000000FF)
    word = (word | (word << uint64(12))) & uint64(0x000F000F000F000F)
    return (word | (word << uint64(6))) & uint64(0x0303030303030303)


@implements(dot256, "IQ4_XS")
def _iq4_xs_dot(name, block, x, sums16, sums32, minus16):
    scales, qs = low_f32x16(_iq4_xs_scales(block)), block + 8
    p0, p1 = _iq4_product(qs, 16, x), _iq4_product(qs + 32, 16, x + 64)
    p2, p3 = _iq4_product(qs + 64, 16, x + 128), _iq4_product(qs + 96, 16, x + 192)
    return scaled_chunks(scales, extend_f32x8(scales * load_f32x8(sums32)) * _IQ4_OFFSET, p0, p1, p2, p3)


@implements(unpack, "IQ4_XS")
def _iq4_xs_unpack(name, block, codes, scales, minima):
    for k in range(4):
        values = _iq4_values(nibbles_of_two(block + 8 + 32 * k, block + 24 + 32 * k))
        store_i8x64(codes + 64 * k, values)
    factors = low_f32x16(_iq4_xs_scales(block))
    store_f32x8(scales, factors)
    store_f32x8(minima, factors * 0.0)


# MXFP4: e:1 (E8M0) | qs:16 in the order of Q4_0
# ------------------------------------------------------------------------

_mxfp4_exponents, _mxfp4_exponent = gather_u8(*range(0, 8 * 17, 17)), gather_u8(0)


@njit
def _half_e8m0(exponents):
    """Bytes e as 2^(e - 128), which is subnormal for 0 and 1: the larger of the two kinds of bits."""
    wide = widen_i8x16(exponents)
    subnormal = (min_i32x16(wide, splat_i32x16(1)) << 21) + 0x200000
    return low_f32x16(f32_from_bits(max_i32x16((wide - 1) << 23, subnormal)))


@njit
def _float4_product(packed, gap, x):
    return dot_u8x64(zero_i32x16(), _float4_values_16(nibbles_of_two(packed, packed + gap)), load_i8x64(x))


@implements(dot8x32, "MXFP4")
def _mxfp4_dot(name, blocks, x, x_scales, sums16, sums32):
    scales = _half_e8m0(_mxfp4_exponents(blocks)) * load_f32x8(x_scales)
    p0, p1 = _float4_product(blocks + 1, 17, x), _float4_product(blocks + 35, 17, x + 64)
    p2, p3 = _float4_product(blocks + 69, 17, x + 128), _float4_product(blocks + 103, 17, x + 192)
    return scaled_chunks(scales, extend_f32x8(scales * load_f32x8(sums32)) * -16.0, p0, p1, p2, p3)


@implements(unpack, "MXFP4")
def _mxfp4_unpack(name, block, codes, scales, minima):
    values = low_i8x64(_float4_values(nibbles_of_two(block + 1, block + 1)))
    store_block(codes, scales, minima, values, lane_f32x16(extend_f32x8(_half_e8m0(_mxfp4_exponent(block))), 0), 0.0)


# NVFP4: d:4 (UE4M3, one per 16) | qs:32, byte j of 8 holds elements j and j + 8
# ----------------------------------------

_nvfp4_bytes, _nvfp4_byte = gather_u32(0, 36, 72, 108), gather_u8(0, 1, 2, 3)
_nibbles_of_quads = bit_fields(15, 0, 4, 0, 4, 0, 4, 0, 4)


@njit
def _nvfp4_codes(qs):
    """32 bytes as 64 codes in natural order."""
    return _nibbles_of_quads(twice_each_quad(load_i8x32(qs)))


@njit
def _half_ue4m3(codes):
    """Half of each unsigned E4M3; 0x7F stands for 0."""
    return zero_where(small_floats_f32x16(codes) * 128.0, codes, 0x7F)


@njit
def _nvfp4_chunk(block, x, scales, values):
    products = dot_u8x64(zero_i32x16(), _float4_values_16(_nvfp4_codes(block + 4)), load_i8x64(x))
    return fma_f32x16(int_to_f32x16(products), scales, values)


@implements(dot8x32, "NVFP4")
def _nvfp4_dot(name, blocks, x, x_scales, sums16, sums32):
    scales = _half_ue4m3(_nvfp4_bytes(blocks)) * twice_each_f32x8(load_f32x8(x_scales))
    values = _nvfp4_chunk(blocks, x, spread16_0(scales), scales * load_f32x16(sums16) * -16.0)
    values = _nvfp4_chunk(blocks + 36, x + 64, spread16_1(scales), values)
    values = _nvfp4_chunk(blocks + 72, x + 128, spread16_2(scales), values)
    return _nvfp4_chunk(blocks + 108, x + 192, spread16_3(scales), values)


@implements(unpack, "NVFP4")
def _nvfp4_unpack(name, block, codes, scales, minima):
    store_i8x64(codes, _float4_values(_nvfp4_codes(block + 4)))
    factors = _half_ue4m3(_nvfp4_byte(block))
    for group in range(4):
        store_f32(scales + 4 * group, lane_f32x16(factors, group))
        store_f32(minima + 4 * group, 0.0)
