"""Q1_0 and Q2_0: long blocks of one- and two-bit codes with one float16 scale."""

from numba import njit

from native.cpu.blocks import dot64, implements, unpack
from native.simd import (
    as_i8x64,
    bytes_of,
    dot_u8x64,
    f32_to_i32x16,
    fma_f32x16,
    int_to_f32x16,
    load_f16,
    load_i8x16,
    load_i8x64,
    load_u64,
    splat_f32x16,
    store_f32,
    store_i8x64,
    widen_i8x16,
    words_of,
    zero_i32x16,
)
from native.simd_bytes import every_fourth_i8x64, four_times_i8x16, lanes_0_2_4_6, two_of_four, where_bits

# Q1_0: d:2 | bits:16; weight = d or -d --------------------------------------------------------------------------------


@implements(dot64, "Q1_0")
def _q1_0_dot(name, first, second, x, x_scale, x_sum, sums16, acc):
    """Codes 0 and 16, minus 8, so that the sum of x is taken off as an integer; the 8 goes into the scale."""
    products = dot_u8x64(f32_to_i32x16(x_sum * -1.0), where_bits(load_u64(second + 2), 16), load_i8x64(x))
    return fma_f32x16(int_to_f32x16(products), x_scale * (load_f16(first) * 0.125), acc)


@implements(unpack, "Q1_0")
def _q1_0_unpack(name, block, codes, scales, minima):
    scale = load_f16(block)
    for half in range(2):
        store_i8x64(codes + 64 * half, where_bits(load_u64(block + 2 + 8 * half), 1))
    for group in range(4):
        store_f32(scales + 4 * group, 2 * scale)
        store_f32(minima + 4 * group, scale)


# Q2_0: d:2 | qs:16, byte j holds elements 4 j .. 4 j + 3; codes - 1 ----------------------------------------------------
# The product takes one pair of bits of all bytes at a time, so x is reordered alike, once for four rows: bytes 0, 4, 8 ...
# first. Of each 4 lanes, two then belong to the first 32 elements and two to the last.


@implements(dot64, "Q2_0")
def _q2_0_dot(name, first, second, x, x_scale, x_sum, sums16, acc):
    codes = bytes_of(words_of(four_times_i8x16(load_i8x16(first + 2))) >> lanes_0_2_4_6()) & 3
    products = int_to_f32x16(dot_u8x64(zero_i32x16(), codes, every_fourth_i8x64(load_i8x64(x))))
    products = fma_f32x16(products, two_of_four(x_scale), x_sum * x_scale * -0.125)
    return fma_f32x16(products, splat_f32x16(load_f16(first)), acc)


@njit
def _four_codes_a_byte(address):
    """16 bytes as 64 codes in natural order: copies of a byte, 6 bits apart, bring its pairs of bits to 0, 8, 16, 24."""
    words = widen_i8x16(load_i8x16(address))
    words = words | (words << 12)
    return as_i8x64(words | (words << 6)) & 3


@implements(unpack, "Q2_0")
def _q2_0_unpack(name, block, codes, scales, minima):
    store_i8x64(codes, _four_codes_a_byte(block + 2))
    scale = load_f16(block)
    for group in range(2):
        store_f32(scales + 4 * group, scale)
        store_f32(minima + 4 * group, scale)
