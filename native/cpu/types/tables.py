"""Types whose 4-bit codes are looked up in a table of 16 bytes: IQ4_NL, IQ4_XS, MXFP4, NVFP4.

Table entries are signed; where the product takes full unsigned bytes they are stored 128 higher (16 for the float4 types,
everywhere), and the integer sums begin with the difference, which four rows share.
"""

from numba import njit, uint64

from native.cpu.blocks import dot64, dot256, implements, unpack
from native.cpu.types.blocks_of_32 import nibbles_of_two
from native.simd import (
    HAS_FULL_UNSIGNED_DOT,
    bytes_of,
    dot_i8x64,
    dot_u8x64,
    f32_to_i32x16,
    fma_f32x16,
    int_to_f32x16,
    load_f16,
    load_i8x32,
    load_i8x64,
    load_u8,
    load_u16,
    load_u32,
    low_f32x16,
    low_i8x64,
    pack_u64,
    spread32_0,
    spread32_1,
    spread32_2,
    spread32_3,
    store_f32,
    store_f32x8,
    store_i8x32,
    store_i8x64,
    widen_signed_i8x16,
    words_of,
    zero_f32x16,
    zero_i32x16,
)
from native.simd_bytes import (
    byte_table,
    float_table,
    load_pair_f16,
    load_pair_f32,
    load_quad_f32,
    pair_f32x16,
    quad_f32x16,
    quads_0_4,
    twice_each_quad,
)

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FLOAT4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # E2M1, doubled
_iq4_values, _iq4_values_128 = byte_table(_IQ4), byte_table([v + 128 if v < 0 else v - 128 for v in _IQ4])
_float4_values, _float4_values_16 = byte_table(_FLOAT4), byte_table([v + 16 for v in _FLOAT4])

# IQ4_NL: d:2 | qs:16 in the order of Q4_0 ------------------------------------------------------------------------------

if HAS_FULL_UNSIGNED_DOT:

    @njit
    def _iq4_products(codes, x, x_sum):
        return int_to_f32x16(dot_u8x64(f32_to_i32x16(x_sum * -16.0), _iq4_values_128(codes), x))
else:

    @njit
    def _iq4_products(codes, x, x_sum):
        return int_to_f32x16(dot_i8x64(zero_i32x16(), _iq4_values(codes), x))


@implements(dot64, "IQ4_NL")
def _iq4_nl_dot(name, first, second, x, x_scale, x_sum, sums16, acc):
    products = _iq4_products(nibbles_of_two(first + 2, second + 2), load_i8x64(x), x_sum)
    return fma_f32x16(products, load_pair_f16(first, second) * x_scale, acc)


@implements(unpack, "IQ4_NL")
def _iq4_nl_unpack(name, block, codes, scales, minima):
    store_i8x32(codes, low_i8x64(_iq4_values(nibbles_of_two(block + 2, block + 2))))
    store_f32(scales, load_f16(block))
    store_f32(minima, 0.0)


# IQ4_XS: d:2 | scales_h:2 | scales_l:4 (8 six-bit scales, minus 32) | qs:128, 8 x 16 bytes in the order of IQ4_NL -----------


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


@njit
def _iq4_chunk(block, x, sums32, k, spread, acc):
    codes = nibbles_of_two(block + 8 + 32 * k, block + 24 + 32 * k)
    return fma_f32x16(_iq4_products(codes, load_i8x64(x + 64 * k), load_pair_f32(sums32 + 8 * k)), spread, acc)


@implements(dot256, "IQ4_XS")
def _iq4_xs_dot(name, block, x, sums16, sums32):
    scales = _iq4_xs_scales(block)
    acc = _iq4_chunk(block, x, sums32, 0, spread32_0(scales), zero_f32x16())
    acc = _iq4_chunk(block, x, sums32, 1, spread32_1(scales), acc)
    acc = _iq4_chunk(block, x, sums32, 2, spread32_2(scales), acc)
    return _iq4_chunk(block, x, sums32, 3, spread32_3(scales), acc)


@implements(unpack, "IQ4_XS")
def _iq4_xs_unpack(name, block, codes, scales, minima):
    for k in range(4):
        values = _iq4_values(nibbles_of_two(block + 8 + 32 * k, block + 24 + 32 * k))
        store_i8x64(codes + 64 * k, values)
    factors = low_f32x16(_iq4_xs_scales(block))
    store_f32x8(scales, factors)
    store_f32x8(minima, factors * 0.0)


# MXFP4: e:1 (E8M0) | qs:16 in the order of Q4_0 ------------------------------------------------------------------------

_e8m0 = float_table("kimi_lite_e8m0", [2.0 ** (e - 128) for e in range(256)])  # half of 2^(e - 127)


@implements(dot64, "MXFP4")
def _mxfp4_dot(name, first, second, x, x_scale, x_sum, sums16, acc):
    codes = _float4_values_16(nibbles_of_two(first + 1, second + 1))
    products = dot_u8x64(f32_to_i32x16(x_sum * -2.0), codes, load_i8x64(x))
    return fma_f32x16(int_to_f32x16(products), pair_f32x16(_e8m0(load_u8(first)), _e8m0(load_u8(second))) * x_scale, acc)


@implements(unpack, "MXFP4")
def _mxfp4_unpack(name, block, codes, scales, minima):
    store_i8x32(codes, low_i8x64(_float4_values(nibbles_of_two(block + 1, block + 1))))
    store_f32(scales, _e8m0(load_u8(block)))
    store_f32(minima, 0.0)


# NVFP4: d:4 (UE4M3, one per 16) | qs:32, byte j of 8 holds elements j and j + 8 ----------------------------------------


def _ue4m3_value(code: int) -> float:
    """Half of an unsigned E4M3; bit 7 is ignored, except that only 0x7F is a zero."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if code == 0x7F:
        return 0.0
    return mantissa * 2.0**-10 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 8)


_ue4m3 = float_table("kimi_lite_ue4m3", [_ue4m3_value(code) for code in range(256)])


@njit
def _nvfp4_codes(block):
    """The block as 64 codes in natural order."""
    return bytes_of(words_of(twice_each_quad(load_i8x32(block + 4))) >> quads_0_4()) & 15


@njit
def _nvfp4_scales(block):
    a, b, c, d = load_u8(block), load_u8(block + 1), load_u8(block + 2), load_u8(block + 3)
    return quad_f32x16(_ue4m3(a), _ue4m3(b), _ue4m3(c), _ue4m3(d))


@implements(dot64, "NVFP4")
def _nvfp4_dot(name, first, second, x, x_scale, x_sum, sums16, acc):
    start = f32_to_i32x16(load_quad_f32(sums16) * -4.0)
    products = int_to_f32x16(dot_u8x64(start, _float4_values_16(_nvfp4_codes(first)), load_i8x64(x)))
    return fma_f32x16(products, _nvfp4_scales(first) * x_scale, acc)


@implements(unpack, "NVFP4")
def _nvfp4_unpack(name, block, codes, scales, minima):
    store_i8x64(codes, _float4_values(_nvfp4_codes(block)))
    for group in range(4):
        store_f32(scales + 4 * group, _ue4m3(load_u8(block + group)))
        store_f32(minima + 4 * group, 0.0)
