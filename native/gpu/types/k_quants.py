"""Q2_K, Q3_K, Q4_K, Q5_K, Q6_K: super-blocks of 256 whose groups of 16 or 32 have quantized scales (and minima)."""

import triton
import triton.language as tl

from kimi_lite.native.gpu.types.words import byte_at, half_at, signed_byte_at


@triton.jit
def q2_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = (byte_at(base + 16 + unit, mask) >> (2 * PLANE)) & 3
    scale = byte_at(base + first // 32 * 8 + 2 * PLANE + first % 32 // 16, mask)
    minimum = (scale >> 4).to(tl.float32) * half_at(base + 82, mask)
    return code.to(tl.float32) * ((scale & 15).to(tl.float32) * half_at(base + 80, mask)) - minimum


@triton.jit
def q3_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    half = first // 32
    code = (byte_at(base + 32 + unit, mask) >> (2 * PLANE)) & 3
    high = (byte_at(base + unit % 32, mask) >> (4 * half + PLANE)) & 1
    group = half * 8 + 2 * PLANE + first % 32 // 16  # 0..15
    low = byte_at(base + 96 + group % 8, mask) >> (group // 8 * 4)
    upper = byte_at(base + 104 + group % 4, mask) >> (group // 4 * 2)
    scale = ((low & 15) | ((upper & 3) << 4)) - 32
    return (code - 4 + 4 * high).to(tl.float32) * (scale.to(tl.float32) * half_at(base + 108, mask))


@triton.jit
def pairs_column(unit, PLANE: tl.constexpr):
    """Per 32 bytes, 32 low nibbles and 32 high ones: Q4_K, Q5_K."""
    return unit // 32 * 64 + PLANE * 32 + unit % 32


@triton.jit
def six_bit_scales(base, group, mask):
    """(scale, minimum) of one of 8 groups; the 12 bytes at base + 4 hold 6 bits of each."""
    place = group % 4
    first, second = byte_at(base + 4 + place, mask), byte_at(base + 8 + place, mask)
    third = byte_at(base + 12 + place, mask)
    scale = tl.where(group < 4, first & 63, (third & 15) | ((first >> 6) << 4))
    minimum = tl.where(group < 4, second & 63, (third >> 4) | ((second >> 6) << 4))
    return scale.to(tl.float32) * half_at(base, mask), minimum.to(tl.float32) * half_at(base + 2, mask)


@triton.jit
def q4_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = (byte_at(base + 16 + unit, mask) >> (4 * PLANE)) & 15
    scale, minimum = six_bit_scales(base, first // 32 * 2 + PLANE, mask)
    return code.to(tl.float32) * scale - minimum


@triton.jit
def q5_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    group = first // 32 * 2 + PLANE
    code = (byte_at(base + 48 + unit, mask) >> (4 * PLANE)) & 15
    high = (byte_at(base + 16 + unit % 32, mask) >> group) & 1
    scale, minimum = six_bit_scales(base, group, mask)
    return (code | (high << 4)).to(tl.float32) * scale - minimum


@triton.jit
def q6_k_column(unit, PLANE: tl.constexpr):
    return unit // 64 * 128 + PLANE * 64 + unit % 64


@triton.jit
def q6_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    half, place = first // 64, first % 64
    low = (byte_at(base + unit, mask) >> (4 * PLANE)) & 15
    high = byte_at(base + 128 + half * 32 + unit % 32, mask) >> (4 * PLANE + place // 32 * 2)
    scale = signed_byte_at(base + 192 + half * 8 + PLANE * 4 + place // 16, mask).to(tl.float32)
    return ((low | ((high & 3) << 4)) - 32).to(tl.float32) * (scale * half_at(base + 208, mask))
