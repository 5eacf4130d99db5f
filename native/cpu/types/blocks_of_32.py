"""Types with blocks of 32 weights, float16 scales and codes that are integers: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

Codes that do not start at zero begin their integer sum with -offset * sum(x) / 8 in each of a block's 8 lanes, which
four rows share.
"""

from numba import njit, uint64

from native.cpu.blocks import dot64, implements, unpack
from native.simd import (
    HAS_FULL_UNSIGNED_DOT,
    bytes_of,
    dot_i8x64,
    dot_u8x64,
    f32_to_i32x16,
    fma_f32x16,
    int_to_f32x16,
    join_i8x16,
    join_i8x32,
    load_f16,
    load_i8x16,
    load_i8x32,
    load_i8x64,
    load_u32,
    low_i8x64,
    store_f32,
    store_i8x32,
    words_of,
    zero_i32x16,
)
from native.simd_bytes import halves_0_4_0_4, load_pair_f16, twice_each_i8x16, where_bits

# Q8_0: d:2 | qs:32 (int8) ---------------------------------------------------------------------------------------------

if HAS_FULL_UNSIGNED_DOT:

    @njit
    def _q8_0_products(codes, x, x_sum):
        """codes + 128: the product wants one unsigned factor."""
        return dot_u8x64(f32_to_i32x16(x_sum * -16.0), codes ^ 128, x)
else:

    @njit
    def _q8_0_products(codes, x, x_sum):
        return dot_i8x64(zero_i32x16(), codes, x)


@implements(dot64, "Q8_0")
def _q8_0_dot(name, first, second, x, x_scale, x_sum, sums16, acc):
    codes = join_i8x32(load_i8x32(first + 2), load_i8x32(second + 2))
    products = int_to_f32x16(_q8_0_products(codes, load_i8x64(x), x_sum))
    return fma_f32x16(products, load_pair_f16(first, second) * x_scale, acc)


@implements(unpack, "Q8_0")
def _q8_0_unpack(name, block, codes, scales, minima):
    store_i8x32(codes, load_i8x32(block + 2))
    store_f32(scales, load_f16(block))
    store_f32(minima, 0.0)


# Q4_0: d:2 | qs:16, element j in the low nibble of byte j, j + 16 in the high one; codes - 8 ---------------------------


@njit
def nibbles_of_two(first, second):
    """Twice 16 bytes as 64 codes: the low nibbles, then the high ones."""
    packed = twice_each_i8x16(load_i8x16(first), load_i8x16(second))
    return bytes_of(words_of(packed) >> halves_0_4_0_4()) & 15


@njit
def nibbles_of_one(address):
    """16 bytes as 32 codes."""
    packed = load_i8x16(address)
    return join_i8x16(packed & 15, packed >> 4)


@implements(dot64, "Q4_0")
def _q4_0_dot(name, first, second, x, x_scale, x_sum, sums16, acc):
    products = dot_u8x64(f32_to_i32x16(x_sum * -1.0), nibbles_of_two(first + 2, second + 2), load_i8x64(x))
    return fma_f32x16(int_to_f32x16(products), load_pair_f16(first, second) * x_scale, acc)


@njit
def _store_block(codes, scales, minima, values, scale, minimum):
    store_i8x32(codes, values)
    store_f32(scales, scale)
    store_f32(minima, minimum)


@implements(unpack, "Q4_0")
def _q4_0_unpack(name, block, codes, scales, minima):
    scale = load_f16(block)
    _store_block(codes, scales, minima, nibbles_of_one(block + 2), scale, 8 * scale)


# Q4_1: d:2 | m:2 | qs:16 as Q4_0; weight = d * code + m ----------------------------------------------------------------


@njit
def _scaled_with_minimum(first, second, products, x_scale, x_sum, acc):
    """acc + x_scale * (d * products + m * x_sum), the minima spread over 8 lanes."""
    acc = fma_f32x16(load_pair_f16(first + 2, second + 2), x_scale * x_sum * 0.125, acc)
    return fma_f32x16(int_to_f32x16(products), load_pair_f16(first, second) * x_scale, acc)


@implements(dot64, "Q4_1")
def _q4_1_dot(name, first, second, x, x_scale, x_sum, sums16, acc):
    products = dot_u8x64(zero_i32x16(), nibbles_of_two(first + 4, second + 4), load_i8x64(x))
    return _scaled_with_minimum(first, second, products, x_scale, x_sum, acc)


@implements(unpack, "Q4_1")
def _q4_1_unpack(name, block, codes, scales, minima):
    _store_block(codes, scales, minima, nibbles_of_one(block + 4), load_f16(block), -load_f16(block + 2))


# Q5_0: d:2 | qh:4 (bit j is bit 4 of code j) | qs:16 as Q4_0; codes - 16 -----------------------------------------------


@njit
def _five_bits_of_two(first, second):
    """Two blocks as 64 codes; addresses of their qh."""
    bits = uint64(load_u32(first)) | (uint64(load_u32(second)) << uint64(32))
    return nibbles_of_two(first + 4, second + 4) | where_bits(bits, 16)


@njit
def _five_bits_of_one(address):
    return nibbles_of_one(address + 4) | low_i8x64(where_bits(uint64(load_u32(address)), 16))


@implements(dot64, "Q5_0")
def _q5_0_dot(name, first, second, x, x_scale, x_sum, sums16, acc):
    products = dot_u8x64(f32_to_i32x16(x_sum * -2.0), _five_bits_of_two(first + 2, second + 2), load_i8x64(x))
    return fma_f32x16(int_to_f32x16(products), load_pair_f16(first, second) * x_scale, acc)


@implements(unpack, "Q5_0")
def _q5_0_unpack(name, block, codes, scales, minima):
    scale = load_f16(block)
    _store_block(codes, scales, minima, _five_bits_of_one(block + 2), scale, 16 * scale)


# Q5_1: d:2 | m:2 | qh:4 | qs:16; weight = d * code + m -----------------------------------------------------------------


@implements(dot64, "Q5_1")
def _q5_1_dot(name, first, second, x, x_scale, x_sum, sums16, acc):
    products = dot_u8x64(zero_i32x16(), _five_bits_of_two(first + 4, second + 4), load_i8x64(x))
    return _scaled_with_minimum(first, second, products, x_scale, x_sum, acc)


@implements(unpack, "Q5_1")
def _q5_1_unpack(name, block, codes, scales, minima):
    _store_block(codes, scales, minima, _five_bits_of_one(block + 4), load_f16(block), -load_f16(block + 2))
