"""Exact products of Q2_K to Q6_K (`native.types.gpu_words`)."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import byte_at, half_at, offsets, signed_byte_at
from kimi_lite.native.types.gpu_words import dot4, sum_of_32, word2, word4
from kimi_lite.native.types.k_quants.layout import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K

_Q2_K_SCALES, _Q2_K_QS, _Q2_K_D, _Q2_K_DMIN = offsets(Q2_K, "scales", "qs", "d", "dmin")
_Q3_K_HMASK, _Q3_K_QS, _Q3_K_SCALES, _Q3_K_D = offsets(Q3_K, "hmask", "qs", "scales", "d")
_Q4_K_D, _Q4_K_DMIN, _Q4_K_SCALES, _Q4_K_QS = offsets(Q4_K, "d", "dmin", "scales", "qs")
_Q5_K_QH, _Q5_K_QS = offsets(Q5_K, "qh", "qs")
_Q6_K_QL, _Q6_K_QH, _Q6_K_SCALES, _Q6_K_D = offsets(Q6_K, "ql", "qh", "scales", "d")


@triton.jit
def six_bits(base, group):
    """(scale, minimum) of one of 8 groups, integers. Q4_K and Q5_K."""
    place = base + _Q4_K_SCALES + group % 4
    first, second, third = byte_at(place, True), byte_at(place + 4, True), byte_at(place + 8, True)
    scale = tl.where(group < 4, first & 63, (third & 15) | ((first >> 6) << 4))
    return scale, tl.where(group < 4, second & 63, (third >> 4) | ((second >> 6) << 4))


@triton.jit
def minus_minima(total, base, sums, lane, HALF: tl.constexpr):
    """d * total, less dmin * minimum * the sum of its activations in the first eight lanes. Q4_K and Q5_K."""
    d, value = half_at(base + _Q4_K_D, True) + tl.zeros_like(total).to(tl.float32), total.to(tl.float32)
    if HALF == 1:
        return value * d
    _, minimum = six_bits(base, lane)
    taken = minimum.to(tl.float32) * half_at(base + _Q4_K_DMIN, True) * sum_of_32(sums, lane).to(tl.float32)
    return tl.fma(value, d, -taken)


@triton.jit
def q4_k_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32)
    for chunk in tl.static_range(4):
        codes = (word4(base + _Q4_K_QS + 32 * chunk + 4 * lane) >> (4 * HALF)) & 0x0F0F0F0F
        scale, _ = six_bits(base, 2 * chunk + HALF)
        total += dot4(codes, tl.load(x + 16 * chunk + lane)) * scale
    return minus_minima(total, base, sums, lane, HALF)


@triton.jit
def q5_k_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32)
    high = word4(base + _Q5_K_QH + 4 * lane)
    for chunk in tl.static_range(4):
        codes = (word4(base + _Q5_K_QS + 32 * chunk + 4 * lane) >> (4 * HALF)) & 0x0F0F0F0F
        codes |= ((high >> (2 * chunk + HALF)) & 0x01010101) << 4
        scale, _ = six_bits(base, 2 * chunk + HALF)
        total += dot4(codes, tl.load(x + 16 * chunk + lane)) * scale
    return minus_minima(total, base, sums, lane, HALF)


@triton.jit
def minus_offsets(total, first, second, sums, lane, OFFSET: tl.constexpr):
    """`total` less OFFSET times the sums of two groups of 16, times their scales: of the first eight lanes."""
    return total - (first * tl.load(sums + 2 * lane) + second * tl.load(sums + 2 * lane + 1)) * OFFSET


@triton.jit
def q6_k_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32)
    if HALF == 0:
        pair = base + _Q6_K_SCALES + 2 * lane
        total = minus_offsets(total, signed_byte_at(pair, True), signed_byte_at(pair + 1, True), sums, lane, 32)
    for chunk in tl.static_range(4):
        low = word2(base + _Q6_K_QL + chunk // 2 * 64 + 32 * HALF + 4 * lane, True) >> (chunk % 2 * 4)
        high = word2(base + _Q6_K_QH + chunk // 2 * 32 + 4 * lane, True) >> (chunk % 2 * 4 + 2 * HALF)
        codes = (low & 0x0F0F0F0F) | ((high & 0x03030303) << 4)
        scale = signed_byte_at(base + _Q6_K_SCALES + 4 * chunk + 2 * HALF + lane // 4, True)
        total += dot4(codes, tl.load(x + 16 * chunk + lane)) * scale
    return total.to(tl.float32) * half_at(base + _Q6_K_D, True)


@triton.jit
def q2_k_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32)
    for chunk in tl.static_range(4):
        bits = word4(base + _Q2_K_QS + chunk // 2 * 32 + 4 * lane) >> (chunk % 2 * 4 + 2 * HALF)
        scale = byte_at(base + _Q2_K_SCALES + 4 * chunk + 2 * HALF + lane // 4, True) & 15
        total += dot4(bits & 0x03030303, tl.load(x + 16 * chunk + lane)) * scale
    d, value = half_at(base + _Q2_K_D, True) + tl.zeros_like(total).to(tl.float32), total.to(tl.float32)
    if HALF == 1:
        return value * d
    pair = base + _Q2_K_SCALES + 2 * lane
    minima = minus_offsets(
        tl.zeros_like(total), byte_at(pair, True) >> 4, byte_at(pair + 1, True) >> 4, sums, lane, 1
    )  # fmt: skip
    return tl.fma(value, d, minima.to(tl.float32) * half_at(base + _Q2_K_DMIN, True))


@triton.jit
def q3_k_scale(base, group):
    """One of 16: low nibbles in 8 bytes, high pairs of bits in 4."""
    low = byte_at(base + _Q3_K_SCALES + group % 8, True) >> (group // 8 * 4)
    upper = byte_at(base + _Q3_K_SCALES + 8 + group % 4, True) >> (group // 4 * 2)
    return ((low & 15) | ((upper & 3) << 4)) - 32


@triton.jit
def q3_k_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32)
    if HALF == 0:
        total = minus_offsets(total, q3_k_scale(base, 2 * lane), q3_k_scale(base, 2 * lane + 1), sums, lane, 4)
    mask_bits = word2(base + _Q3_K_HMASK + 4 * lane, True)
    for chunk in tl.static_range(4):
        bits = word2(base + _Q3_K_QS + chunk // 2 * 32 + 4 * lane, True) >> (chunk % 2 * 4 + 2 * HALF)
        codes = (bits & 0x03030303) | (((mask_bits >> (2 * chunk + HALF)) & 0x01010101) << 2)
        scale = q3_k_scale(base, 4 * chunk + 2 * HALF + lane // 4)
        total += dot4(codes, tl.load(x + 16 * chunk + lane)) * scale
    return total.to(tl.float32) * half_at(base + _Q3_K_D, True)


VALUES = {
    "Q2_K": q2_k_values,
    "Q3_K": q3_k_values,
    "Q4_K": q4_k_values,
    "Q5_K": q5_k_values,
    "Q6_K": q6_k_values,
}
