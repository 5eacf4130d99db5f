"""Types whose 4-bit codes are looked up in a table of 16 bytes: IQ4_NL, IQ4_XS, MXFP4, NVFP4.

Table entries are signed; where the product takes full unsigned bytes they are stored 128 higher (16 for the float4
types, everywhere), which costs one multiplication with the sums of x for 256 weights.
"""

from numba import njit, uint64

from kimi_lite.native.cpu.blocks import dot8x32, dot256, has_digits, implements, unpack
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
from kimi_lite.native.simd_bytes import bit_fields, byte_table, twice_each_f32x8, twice_each_quad, widen16_signed_i8x16
from kimi_lite.native.simd_digits import high_digits, low_digits
from kimi_lite.native.simd_dot import HAS_FULL_UNSIGNED_DOT, dot_i8x64, dot_u8x64
from kimi_lite.native.simd_scales import (
    gather_u8,
    gather_u32,
    min_i32x16,
    small_floats_f32x16,
    spreadable,
    words32_0,
    words32_1,
    words32_2,
    words32_3,
    zero_where,
)
from kimi_lite.native.types.blocks_of_32.cpu import nibbles_of_two, scaled_chunks, store_block
from kimi_lite.native.types.gathering import gather_bytes, gather_field
from kimi_lite.native.types.sixteen_values.layout import FLOAT4_VALUES, IQ4_NL, IQ4_VALUES, IQ4_XS, MXFP4, NVFP4

_IQ4_NL_D, _IQ4_NL_QS = IQ4_NL.offsets("d", "qs")
_IQ4_XS_D, _IQ4_XS_SCALES_H, _IQ4_XS_SCALES_L, _IQ4_XS_QS = IQ4_XS.offsets("d", "scales_h", "scales_l", "qs")
[_MXFP4_QS] = MXFP4.offsets("qs")
_NVFP4_D, _NVFP4_QS = NVFP4.offsets("d", "qs")
_IQ4_NL_BYTES, _MXFP4_BYTES, _NVFP4_BYTES = IQ4_NL.block_bytes, MXFP4.block_bytes, NVFP4.block_bytes

_iq4_values, _iq4_values_128 = byte_table(IQ4_VALUES), byte_table([v + 128 if v < 0 else v - 128 for v in IQ4_VALUES])
_float4_values, _float4_values_16 = byte_table(FLOAT4_VALUES), byte_table([v + 16 for v in FLOAT4_VALUES])

# IQ4_NL

_iq4_nl_scales = gather_field(IQ4_NL, "d")

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
    qs, gap = blocks + _IQ4_NL_QS, _IQ4_NL_BYTES
    p0, p1 = _iq4_product(qs, gap, x), _iq4_product(qs + 2 * gap, gap, x + 64)
    p2, p3 = _iq4_product(qs + 4 * gap, gap, x + 128), _iq4_product(qs + 6 * gap, gap, x + 192)
    return scaled_chunks(scales, extend_f32x8(scales * load_f32x8(sums32)) * _IQ4_OFFSET, p0, p1, p2, p3)


@implements(unpack, "IQ4_NL")
def _iq4_nl_unpack(name, block, codes, scales, minima):
    qs = block + _IQ4_NL_QS
    values = low_i8x64(_iq4_values(nibbles_of_two(qs, qs)))
    store_block(codes, scales, minima, values, load_f16(block + _IQ4_NL_D), 0.0)


# IQ4_XS


@njit
def _iq4_xs_factors(block):
    """The 8 scales as signed bytes, in lanes 0..7."""
    low, high = uint64(load_u32(block + _IQ4_XS_SCALES_L)), uint64(load_u16(block + _IQ4_XS_SCALES_H))
    return pack_u64(_every_nibble(low) | (_every_pair(high) << uint64(4)), uint64(0)) - 32


@njit
def _iq4_xs_scales(block):
    """The 8 scales as float32, in lanes 0..7."""
    return int_to_f32x16(widen_signed_i8x16(_iq4_xs_factors(block))) * load_f16(block + _IQ4_XS_D)


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
    scales, qs = low_f32x16(_iq4_xs_scales(block)), block + _IQ4_XS_QS
    p0, p1 = _iq4_product(qs, 16, x), _iq4_product(qs + 32, 16, x + 64)
    p2, p3 = _iq4_product(qs + 64, 16, x + 128), _iq4_product(qs + 96, 16, x + 192)
    return scaled_chunks(scales, extend_f32x8(scales * load_f32x8(sums32)) * _IQ4_OFFSET, p0, p1, p2, p3)


@implements(unpack, "IQ4_XS")
def _iq4_xs_unpack(name, block, codes, scales, minima):
    for k in range(4):
        qs = block + _IQ4_XS_QS + 32 * k
        store_i8x64(codes + 64 * k, _iq4_values(nibbles_of_two(qs, qs + 16)))
    factors = low_f32x16(_iq4_xs_scales(block))
    store_f32x8(scales, factors)
    store_f32x8(minima, factors * 0.0)


@has_digits("IQ4_XS", shift=8, is_signed=True)
def _iq4_xs_digits(name, block, low, high, minima, factors):
    words, qs = spreadable(widen16_signed_i8x16(_iq4_xs_factors(block))), block + _IQ4_XS_QS
    c0, c1 = _iq4_values(nibbles_of_two(qs, qs + 16)), _iq4_values(nibbles_of_two(qs + 32, qs + 48))
    c2, c3 = _iq4_values(nibbles_of_two(qs + 64, qs + 80)), _iq4_values(nibbles_of_two(qs + 96, qs + 112))
    store_i8x64(low, low_digits(c0, words32_0(words)))
    store_i8x64(high, high_digits(c0, words32_0(words)))
    store_i8x64(low + 64, low_digits(c1, words32_1(words)))
    store_i8x64(high + 64, high_digits(c1, words32_1(words)))
    store_i8x64(low + 128, low_digits(c2, words32_2(words)))
    store_i8x64(high + 128, high_digits(c2, words32_2(words)))
    store_i8x64(low + 192, low_digits(c3, words32_3(words)))
    store_i8x64(high + 192, high_digits(c3, words32_3(words)))
    store_f32(factors, load_f16(block + _IQ4_XS_D))


# MXFP4

_mxfp4_exponents, _mxfp4_exponent = gather_bytes(MXFP4, "e"), gather_u8(*MXFP4.offsets("e"))


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
    qs, gap = blocks + _MXFP4_QS, _MXFP4_BYTES
    p0, p1 = _float4_product(qs, gap, x), _float4_product(qs + 2 * gap, gap, x + 64)
    p2, p3 = _float4_product(qs + 4 * gap, gap, x + 128), _float4_product(qs + 6 * gap, gap, x + 192)
    return scaled_chunks(scales, extend_f32x8(scales * load_f32x8(sums32)) * -16.0, p0, p1, p2, p3)


@implements(unpack, "MXFP4")
def _mxfp4_unpack(name, block, codes, scales, minima):
    values = low_i8x64(_float4_values(nibbles_of_two(block + _MXFP4_QS, block + _MXFP4_QS)))
    store_block(codes, scales, minima, values, lane_f32x16(extend_f32x8(_half_e8m0(_mxfp4_exponent(block))), 0), 0.0)


# NVFP4

_nvfp4_bytes = gather_u32(*(_NVFP4_D + NVFP4.block_bytes * i for i in range(4)))
_nvfp4_byte = gather_u8(*(_NVFP4_D + i for i in range(4)))
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
    products = dot_u8x64(zero_i32x16(), _float4_values_16(_nvfp4_codes(block + _NVFP4_QS)), load_i8x64(x))
    return fma_f32x16(int_to_f32x16(products), scales, values)


@implements(dot8x32, "NVFP4")
def _nvfp4_dot(name, blocks, x, x_scales, sums16, sums32):
    scales = _half_ue4m3(_nvfp4_bytes(blocks)) * twice_each_f32x8(load_f32x8(x_scales))
    values = _nvfp4_chunk(blocks, x, spread16_0(scales), scales * load_f32x16(sums16) * -16.0)
    values = _nvfp4_chunk(blocks + _NVFP4_BYTES, x + 64, spread16_1(scales), values)
    values = _nvfp4_chunk(blocks + 2 * _NVFP4_BYTES, x + 128, spread16_2(scales), values)
    return _nvfp4_chunk(blocks + 3 * _NVFP4_BYTES, x + 192, spread16_3(scales), values)


@implements(unpack, "NVFP4")
def _nvfp4_unpack(name, block, codes, scales, minima):
    store_i8x64(codes, _float4_values(_nvfp4_codes(block + _NVFP4_QS)))
    factors = _half_ue4m3(_nvfp4_byte(block))
    for group in range(4):
        store_f32(scales + 4 * group, lane_f32x16(factors, group))
        store_f32(minima + 4 * group, 0.0)
