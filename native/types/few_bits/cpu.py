"""Q1_0, Q2_0 and LITE2_128: long blocks of one- and two-bit codes with one float16 scale."""

from numba import njit

from kimi_lite.native.cpu.blocks import dot8x32, implements, unpack
from kimi_lite.native.simd import (
    extend_f32x8,
    load_f16,
    load_f32x8,
    load_i8x16,
    load_i8x64,
    load_u64,
    store_f32,
    store_i8x64,
    zero_i32x16,
)
from kimi_lite.native.simd_bytes import bit_fields, by_fours_i8x64, four_times_each_word, where_bits
from kimi_lite.native.simd_dot import dot_u8x64
from kimi_lite.native.types.blocks_of_32.cpu import scaled_chunks
from kimi_lite.native.types.few_bits.layout import LITE2_128, Q1_0, Q2_0
from kimi_lite.native.types.gathering import gather_field

_Q1_0_D, _Q1_0_QS = Q1_0.offsets("d", "qs")
_Q2_0_D, _Q2_0_QS = Q2_0.offsets("d", "qs")
_LITE2_D, _LITE2_QS = LITE2_128.offsets("d", "qs")
_Q1_0_BYTES, _Q2_0_BYTES, _LITE2_BYTES = Q1_0.block_bytes, Q2_0.block_bytes, LITE2_128.block_bytes

# Q1_0

_q1_0_scales = gather_field(Q1_0, "d")


@njit
def _q1_0_product(bits, x):
    return dot_u8x64(zero_i32x16(), where_bits(load_u64(bits), 2), load_i8x64(x))


@implements(dot8x32, "Q1_0")
def _q1_0_dot(name, blocks, x, x_scales, sums16, sums32):
    """Codes 0 and 2, minus 1."""
    scales = _q1_0_scales(blocks) * load_f32x8(x_scales)
    first, second = blocks + _Q1_0_QS, blocks + _Q1_0_BYTES + _Q1_0_QS
    p0, p1 = _q1_0_product(first, x), _q1_0_product(first + 8, x + 64)
    p2, p3 = _q1_0_product(second, x + 128), _q1_0_product(second + 8, x + 192)
    return scaled_chunks(scales, extend_f32x8(scales * load_f32x8(sums32)) * -1.0, p0, p1, p2, p3)


@implements(unpack, "Q1_0")
def _q1_0_unpack(name, block, codes, scales, minima):
    scale = load_f16(block + _Q1_0_D)
    for half in range(2):
        store_i8x64(codes + 64 * half, where_bits(load_u64(block + _Q1_0_QS + 8 * half), 2))
    for group in range(4):
        store_f32(scales + 4 * group, scale)
        store_f32(minima + 4 * group, scale)


# Q2_0: the product takes one pair of bits of 4 bytes at a time: elements 0, 4, 8, 12, then 1, 5, 9, 13, ... of each 16,
# and x is brought into that order, too.

_q2_0_scales = gather_field(Q2_0, "d")
_pairs_of_bits = bit_fields(3, *[0, 2, 4, 6] * 4)


@njit
def _by_fours(address):
    """16 bytes as 64 codes, in the order of `by_fours_i8x64`."""
    return _pairs_of_bits(four_times_each_word(load_i8x16(address)))


@njit
def _q2_0_product(qs, x):
    return dot_u8x64(zero_i32x16(), _by_fours(qs), by_fours_i8x64(load_i8x64(x)))


@implements(dot8x32, "Q2_0")
def _q2_0_dot(name, blocks, x, x_scales, sums16, sums32):
    scales = _q2_0_scales(blocks) * load_f32x8(x_scales)
    qs, gap = blocks + _Q2_0_QS, _Q2_0_BYTES
    p0, p1 = _q2_0_product(qs, x), _q2_0_product(qs + gap, x + 64)
    p2, p3 = _q2_0_product(qs + 2 * gap, x + 128), _q2_0_product(qs + 3 * gap, x + 192)
    return scaled_chunks(scales, extend_f32x8(scales * load_f32x8(sums32)) * -1.0, p0, p1, p2, p3)


@implements(unpack, "Q2_0")
def _q2_0_unpack(name, block, codes, scales, minima):
    store_i8x64(codes, by_fours_i8x64(_by_fours(block + _Q2_0_QS)))  # a transposition of 4 x 4, its own inverse
    scale = load_f16(block + _Q2_0_D)
    for group in range(2):
        store_f32(scales + 4 * group, scale)
        store_f32(minima + 4 * group, scale)


# LITE2_128: the codes are brought into their order, and x is as it is.

_lite2_scales = gather_field(LITE2_128, "d")


@njit
def _lite2_product(qs, x):
    return dot_u8x64(zero_i32x16(), by_fours_i8x64(_by_fours(qs)), load_i8x64(x))


@implements(dot8x32, "LITE2_128")
def _lite2_dot(name, blocks, x, x_scales, sums16, sums32):
    scales = _lite2_scales(blocks) * load_f32x8(x_scales)
    first, second = blocks + _LITE2_QS, blocks + _LITE2_BYTES + _LITE2_QS
    p0, p1 = _lite2_product(first, x), _lite2_product(first + 16, x + 64)
    p2, p3 = _lite2_product(second, x + 128), _lite2_product(second + 16, x + 192)
    return scaled_chunks(scales, extend_f32x8(scales * load_f32x8(sums32)) * -1.0, p0, p1, p2, p3)


@implements(unpack, "LITE2_128")
def _lite2_unpack(name, block, codes, scales, minima):
    scale = load_f16(block + _LITE2_D)
    for half in range(2):
        store_i8x64(codes + 64 * half, by_fours_i8x64(_by_fours(block + _LITE2_QS + 16 * half)))
    for group in range(4):
        store_f32(scales + 4 * group, scale)
        store_f32(minima + 4 * group, scale)
