"""Types with blocks of 32 weights and one float16 scale: Q8_0, Q4_0."""

from native.cpu.blocks import dot32, implements, unpack
from native.simd import (
    HAS_FULL_UNSIGNED_DOT,
    dot_i8x32,
    dot_u8x32,
    fma_f32x8,
    int_to_f32x8,
    join_i8x16,
    load_f16,
    load_i8x16,
    load_i8x32,
    splat_f32x8,
    store_f32,
    store_i8x32,
    zero_i32x8,
)

# Q8_0: d:2 | qs:32 (int8) ---------------------------------------------------------------------------------------------

if HAS_FULL_UNSIGNED_DOT:

    @implements(dot32, "Q8_0")
    def _q8_0_dot(name, block, x, x_scale, x_sum, acc, correction):
        scale = load_f16(block) * x_scale
        codes = load_i8x32(block + 2) ^ 128  # + 128: the product wants one unsigned factor
        products = int_to_f32x8(dot_u8x32(zero_i32x8(), codes, load_i8x32(x)))
        return fma_f32x8(products, splat_f32x8(scale), acc), correction - 128 * scale * x_sum
else:

    @implements(dot32, "Q8_0")
    def _q8_0_dot(name, block, x, x_scale, x_sum, acc, correction):
        products = int_to_f32x8(dot_i8x32(zero_i32x8(), load_i8x32(block + 2), load_i8x32(x)))
        return fma_f32x8(products, splat_f32x8(load_f16(block) * x_scale), acc), correction


@implements(unpack, "Q8_0")
def _q8_0_unpack(name, block, codes, scales, minima):
    store_i8x32(codes, load_i8x32(block + 2))
    store_f32(scales, load_f16(block))
    store_f32(minima, 0.0)


# Q4_0: d:2 | qs:16, element j in the low nibble of byte j, j + 16 in the high one; codes - 8 ---------------------------


@implements(dot32, "Q4_0")
def _q4_0_dot(name, block, x, x_scale, x_sum, acc, correction):
    scale = load_f16(block) * x_scale
    packed = load_i8x16(block + 2)
    products = int_to_f32x8(dot_u8x32(zero_i32x8(), join_i8x16(packed & 15, packed >> 4), load_i8x32(x)))
    return fma_f32x8(products, splat_f32x8(scale), acc), correction - 8 * scale * x_sum


@implements(unpack, "Q4_0")
def _q4_0_unpack(name, block, codes, scales, minima):
    packed, scale = load_i8x16(block + 2), load_f16(block)
    store_i8x32(codes, join_i8x16(packed & 15, packed >> 4))
    store_f32(scales, scale)
    store_f32(minima, 8 * scale)
