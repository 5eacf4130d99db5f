"""The K types: super-blocks of 256 with integer scales (and minima) for groups of 16 or 32 weights."""

from numba import njit, uint64

from native.cpu.blocks import dot256, implements, unpack
from native.simd import (
    bytes_of,
    dot_u8x64,
    extend_f32x8,
    fma_f32x16,
    halves_0_2,
    halves_0_4,
    halves_4_6,
    high_f32x16,
    int_to_f32x16,
    load_f16,
    load_f32x8,
    load_f32x16,
    load_i8x16,
    load_i8x32,
    load_i8x64,
    load_u32,
    low_f32x16,
    pack_u64,
    spread16_0,
    spread16_1,
    spread16_2,
    spread16_3,
    spread32_0,
    spread32_1,
    spread32_2,
    spread32_3,
    store_f32x8,
    store_f32x16,
    store_i8x64,
    twice_i8x32,
    widen_i8x16,
    widen_signed_i8x16,
    words_of,
    zero_i32x16,
)

# Q4_K: d:2 | dmin:2 | scales:12 (8 six-bit scales, 8 six-bit minima) | qs:128 ------------------------------------------


@njit
def _six_bit_scales(address, scale, minimum):
    """The 8 scales times `scale` in lanes 0..7 and the 8 minima times `minimum` in lanes 8..15, from 12 bytes."""
    first, second, third = uint64(load_u32(address)), uint64(load_u32(address + 4)), uint64(load_u32(address + 8))
    scales = (first & 0x3F3F3F3F) | (((third & 0x0F0F0F0F) | (((first >> 6) & 0x03030303) << 4)) << 32)
    minima = (second & 0x3F3F3F3F) | ((((third >> 4) & 0x0F0F0F0F) | (((second >> 6) & 0x03030303) << 4)) << 32)
    factors = int_to_f32x16(widen_i8x16(pack_u64(scales, minima)))
    return low_f32x16(factors) * scale, high_f32x16(factors) * minimum


@njit
def _nibbles(address):
    """32 bytes as 64 codes: the low nibbles, then the high ones."""
    return bytes_of(words_of(twice_i8x32(load_i8x32(address))) >> halves_0_4()) & 15


@implements(dot256, "Q4_K")
def _q4_k_dot(name, block, x, sums16, sums32):
    scales8, minima = _six_bit_scales(block + 4, load_f16(block), load_f16(block + 2))
    scales, qs = extend_f32x8(scales8), block + 16
    acc = extend_f32x8(minima * load_f32x8(sums32)) * -1.0
    acc = fma_f32x16(int_to_f32x16(dot_u8x64(zero_i32x16(), _nibbles(qs), load_i8x64(x))), spread32_0(scales), acc)
    acc = fma_f32x16(int_to_f32x16(dot_u8x64(zero_i32x16(), _nibbles(qs + 32), load_i8x64(x + 64))), spread32_1(scales), acc)
    acc = fma_f32x16(int_to_f32x16(dot_u8x64(zero_i32x16(), _nibbles(qs + 64), load_i8x64(x + 128))), spread32_2(scales), acc)
    return fma_f32x16(int_to_f32x16(dot_u8x64(zero_i32x16(), _nibbles(qs + 96), load_i8x64(x + 192))), spread32_3(scales), acc)


@implements(unpack, "Q4_K")
def _q4_k_unpack(name, block, codes, scales, minima):
    for k in range(4):
        store_i8x64(codes + 64 * k, _nibbles(block + 16 + 32 * k))
    scales8, minima8 = _six_bit_scales(block + 4, load_f16(block), load_f16(block + 2))
    store_f32x8(scales, scales8)
    store_f32x8(minima, minima8)


# Q6_K: ql:128 | qh:64 | scales:16 (int8, one per 16) | d:2; codes - 32 -------------------------------------------------


@njit
def _q6_k_low(block, half):
    """The first 64 codes of a half: low nibbles of ql and bits 0..3 of qh."""
    high = bytes_of(words_of(twice_i8x32(load_i8x32(block + 128 + 32 * half))) >> halves_0_2()) & 3
    return (load_i8x64(block + 64 * half) & 15) | (high << 4)


@njit
def _q6_k_high(block, half):
    """The last 64 codes of a half: high nibbles of ql and bits 4..7 of qh."""
    high = bytes_of(words_of(twice_i8x32(load_i8x32(block + 128 + 32 * half))) >> halves_4_6()) & 3
    return (load_i8x64(block + 64 * half) >> 4) | (high << 4)


@implements(dot256, "Q6_K")
def _q6_k_dot(name, block, x, sums16, sums32):
    scales = int_to_f32x16(widen_signed_i8x16(load_i8x16(block + 192)))
    acc = scales * load_f32x16(sums16) * -32.0
    acc = fma_f32x16(int_to_f32x16(dot_u8x64(zero_i32x16(), _q6_k_low(block, 0), load_i8x64(x))), spread16_0(scales), acc)
    acc = fma_f32x16(int_to_f32x16(dot_u8x64(zero_i32x16(), _q6_k_high(block, 0), load_i8x64(x + 64))), spread16_1(scales), acc)
    acc = fma_f32x16(int_to_f32x16(dot_u8x64(zero_i32x16(), _q6_k_low(block, 1), load_i8x64(x + 128))), spread16_2(scales), acc)
    acc = fma_f32x16(int_to_f32x16(dot_u8x64(zero_i32x16(), _q6_k_high(block, 1), load_i8x64(x + 192))), spread16_3(scales), acc)
    return acc * load_f16(block + 208)


@implements(unpack, "Q6_K")
def _q6_k_unpack(name, block, codes, scales, minima):
    for half in range(2):
        store_i8x64(codes + 128 * half, _q6_k_low(block, half))
        store_i8x64(codes + 128 * half + 64, _q6_k_high(block, half))
    factors = int_to_f32x16(widen_signed_i8x16(load_i8x16(block + 192))) * load_f16(block + 208)
    store_f32x16(scales, factors)
    store_f32x16(minima, factors * 32.0)
