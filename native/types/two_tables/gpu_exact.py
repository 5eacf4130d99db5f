"""Exact products of these types (`native.types.gpu_words`): those of small values with integers that took their scales,
those of large ones in float32, chunk by chunk."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import half_at, offsets, word_at
from kimi_lite.native.types.gpu_words import byte_of, dot4, word2, word4
from kimi_lite.native.types.sixteen_values.gpu_exact import looked_up
from kimi_lite.native.types.two_tables.gpu import (
    iq2_k_scale,
    iq2_k_step,
    iq2_kl_scale,
    iq2_ks_scale,
    iq2_ks_step,
    iq3_k_scale,
    iq3_k_step,
    iq3_ks_scale,
    iq3_ks_step,
    iq4_k_scale,
    iq4_k_step,
    iq4_ks_step,
    iq4_kss_scale,
    iq4_kss_step,
    iq5_k_step,
    iq5_ks_step,
    iq6_k_scale,
    iq6_k_step,
    no_step,
    whole_byte_scale,
)
from kimi_lite.native.types.two_tables.layout import (
    IQ2_K,
    IQ2_KL,
    IQ2_KS,
    IQ3_K,
    IQ3_KS,
    IQ4_K,
    IQ4_KS,
    IQ5_K,
    IQ5_KS,
    IQ6_K,
    OFFSETS,
    PAIRS,
    THREE,
    TWO,
)

[_D] = offsets(IQ2_K, "d")  # the same in all five
[_IQ2_K_QS], [_IQ2_KS_QS], [_IQ4_K_QS], [_IQ4_KS_QS] = (offsets(each, "qs") for each in (IQ2_K, IQ2_KS, IQ4_K, IQ4_KS))
(_IQ3_K_QS, _IQ3_K_QH), (_IQ3_KS_QS, _IQ3_KS_QH), (_KL_QS, _KL_QH) = (
    offsets(each, "qs", "qh") for each in (IQ3_K, IQ3_KS, IQ2_KL)
)
(_IQ5_K_QS, _IQ5_K_QH), (_IQ5_KS_QS, _IQ5_KS_QH), (_IQ6_K_QS, _IQ6_K_QH) = (
    offsets(each, "qs", "qh") for each in (IQ5_K, IQ5_KS, IQ6_K)
)
_OFFSET2, _OFFSET3, _OFFSET_PAIRS = (tl.constexpr(OFFSETS[values]) for values in (TWO, THREE, PAIRS))


# Sums of one half of a block. CODES(base, chunk, lane, HALF): four codes.


@triton.jit
def small_values(
    base, x, sums, lane, table, HALF: tl.constexpr, CODES: tl.constexpr, SCALE: tl.constexpr, STEP: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """float32 of integers, without the block's scale; the offsets and steps of two groups of 16 are in a lane of the
    first eight."""
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32)
    if HALF == 0:
        for part in tl.static_range(2):
            group = 2 * lane + part
            more = SCALE(base, group, True) * (OFFSET - STEP(base, group, True))
            total -= more * tl.load(sums + group)
    for chunk in tl.static_range(4):
        values = looked_up(CODES(base, chunk, lane, HALF), table, OFFSET)
        scale = SCALE(base, 4 * chunk + 2 * HALF + lane // 4, True)
        total += dot4(values, tl.load(x + 16 * chunk + lane)) * scale
    return total.to(tl.float32)


@triton.jit
def large_values(
    base, x, sums, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr, CODES: tl.constexpr, SCALE: tl.constexpr,
    STEP: tl.constexpr, HAS_UNIT: tl.constexpr,
):  # fmt: skip
    """float32; lane l of 16 begins with the steps and the bias of the l-th group of 16."""
    own = 8 * HALF + lane
    unit = half_at(base + _D, True) if HAS_UNIT else tl.full(base.shape, 1.0, tl.float32)
    value = SCALE(base, own, True).to(tl.float32) * unit * tl.load(sums + own).to(tl.float32)
    value *= (STEP(base, own, True) - BIAS).to(tl.float32)
    for chunk in tl.static_range(4):
        values = looked_up(CODES(base, chunk, lane, HALF), table, BIAS)
        scale = SCALE(base, 4 * chunk + 2 * HALF + lane // 4, True).to(tl.float32) * unit
        total = dot4(values, tl.load(x + 16 * chunk + lane), BIAS == 0).to(tl.float32)
        value = tl.fma(total, scale + tl.zeros_like(value), value)
    return value


# Codes


@triton.jit
def pairs_of_bits(word, chunk, HALF: tl.constexpr):
    return (word >> (chunk % 2 * 4 + 2 * HALF)) & 0x03030303


@triton.jit
def bit_above(word, chunk, HALF: tl.constexpr, PLACE: tl.constexpr):
    """The bit of group 2 chunk + HALF of 32, brought to PLACE."""
    return ((word >> (2 * chunk + HALF)) & 0x01010101) << PLACE


@triton.jit
def iq2_k_codes(base, chunk, lane, HALF: tl.constexpr):
    return pairs_of_bits(word4(base + _IQ2_K_QS + chunk // 2 * 32 + 4 * lane), chunk, HALF)


@triton.jit
def iq2_ks_codes(base, chunk, lane, HALF: tl.constexpr):
    return pairs_of_bits(word2(base + _IQ2_KS_QS + chunk // 2 * 32 + 4 * lane, True), chunk, HALF)


@triton.jit
def iq3_k_codes(base, chunk, lane, HALF: tl.constexpr):
    low = pairs_of_bits(word2(base + _IQ3_K_QS + chunk // 2 * 32 + 4 * lane, True), chunk, HALF)
    return low | bit_above(word2(base + _IQ3_K_QH + 4 * lane, True), chunk, HALF, 2)


@triton.jit
def iq3_ks_codes(base, chunk, lane, HALF: tl.constexpr):
    low = pairs_of_bits(word2(base + _IQ3_KS_QS + chunk // 2 * 32 + 4 * lane, True), chunk, HALF)
    return low | bit_above(word2(base + _IQ3_KS_QH + 4 * lane, True), chunk, HALF, 2)


@triton.jit
def iq2_kl_codes(base, chunk, lane, HALF: tl.constexpr):
    """Two codes, each of an even and an odd element."""
    low = (word_at(base + _KL_QS + 16 * chunk + 2 * lane, True) >> (4 * HALF)) & 0x0F0F
    high = (word_at(base + _KL_QH + 2 * lane, True) >> (2 * chunk + HALF)) & 0x0101
    two = low | (high << 4)
    return byte_of(two, 0) * 0x0101 | byte_of(two, 1) * 0x01010000 | 0x20002000


@triton.jit
def iq4_k_codes(base, chunk, lane, HALF: tl.constexpr):
    word = word4(base + _IQ4_K_QS + 32 * chunk + 16 * HALF + lane % 4 * 4)
    return (word >> (lane // 4 * 4)) & 0x0F0F0F0F


@triton.jit
def iq4_ks_codes(base, chunk, lane, HALF: tl.constexpr):
    word = word4(base + _IQ4_KS_QS + 32 * chunk + 16 * HALF + lane % 4 * 4)
    return (word >> (lane // 4 * 4)) & 0x0F0F0F0F


@triton.jit
def iq4_kss_codes(base, chunk, lane, HALF: tl.constexpr):
    word = word4(base + 32 * chunk + 16 * HALF + lane % 4 * 4) & -0x00010002  # 0xFFFEFFFE
    word = word ^ ((word >> 1) & 0x7FFF7FFF)
    return (word >> (lane // 4 * 4)) & 0x0F0F0F0F


@triton.jit
def nibbles_of_32(qs, chunk, lane, HALF: tl.constexpr):
    return (word4(qs + 32 * chunk + 4 * lane) >> (4 * HALF)) & 0x0F0F0F0F


@triton.jit
def iq5_k_codes(base, chunk, lane, HALF: tl.constexpr):
    return nibbles_of_32(base + _IQ5_K_QS, chunk, lane, HALF) | bit_above(
        word4(base + _IQ5_K_QH + 4 * lane), chunk, HALF, 4
    )


@triton.jit
def iq5_ks_codes(base, chunk, lane, HALF: tl.constexpr):
    return nibbles_of_32(base + _IQ5_KS_QS, chunk, lane, HALF) | bit_above(
        word4(base + _IQ5_KS_QH + 4 * lane), chunk, HALF, 4
    )


@triton.jit
def iq6_k_codes(base, chunk, lane, HALF: tl.constexpr):
    high = pairs_of_bits(word4(base + _IQ6_K_QH + chunk // 2 * 32 + 4 * lane), chunk, HALF)
    return nibbles_of_32(base + _IQ6_K_QS, chunk, lane, HALF) | (high << 4)


# Products


@triton.jit
def iq2_k_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    value = small_values(base, x, sums, lane, table, HALF, iq2_k_codes, iq2_k_scale, iq2_k_step, _OFFSET2)
    return value * half_at(base + _D, True)


@triton.jit
def iq3_k_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    value = small_values(base, x, sums, lane, table, HALF, iq3_k_codes, iq3_k_scale, iq3_k_step, _OFFSET3)
    return value * half_at(base + _D, True)


@triton.jit
def iq2_ks_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return small_values(base, x, sums, lane, table, HALF, iq2_ks_codes, iq2_ks_scale, iq2_ks_step, _OFFSET2)


@triton.jit
def iq2_kl_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return small_values(base, x, sums, lane, table, HALF, iq2_kl_codes, iq2_kl_scale, no_step, _OFFSET_PAIRS)


@triton.jit
def iq3_ks_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return small_values(base, x, sums, lane, table, HALF, iq3_ks_codes, iq3_ks_scale, iq3_ks_step, _OFFSET3)


@triton.jit
def iq4_k_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return large_values(base, x, sums, lane, table, BIAS, HALF, iq4_k_codes, iq4_k_scale, iq4_k_step, True)


@triton.jit
def iq5_k_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return large_values(base, x, sums, lane, table, BIAS, HALF, iq5_k_codes, iq4_k_scale, iq5_k_step, True)


@triton.jit
def iq6_k_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return large_values(base, x, sums, lane, table, BIAS, HALF, iq6_k_codes, iq6_k_scale, iq6_k_step, True)


@triton.jit
def iq4_ks_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return large_values(base, x, sums, lane, table, BIAS, HALF, iq4_ks_codes, whole_byte_scale, iq4_ks_step, False)


@triton.jit
def iq4_kss_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return large_values(base, x, sums, lane, table, BIAS, HALF, iq4_kss_codes, iq4_kss_scale, iq4_kss_step, False)


@triton.jit
def iq5_ks_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return large_values(base, x, sums, lane, table, BIAS, HALF, iq5_ks_codes, whole_byte_scale, iq5_ks_step, False)


VALUES = {
    "IQ2_K": iq2_k_values,
    "IQ3_K": iq3_k_values,
    "IQ4_K": iq4_k_values,
    "IQ5_K": iq5_k_values,
    "IQ6_K": iq6_k_values,
    "IQ2_KS": iq2_ks_values,
    "IQ2_KL": iq2_kl_values,
    "IQ3_KS": iq3_ks_values,
    "IQ4_KS": iq4_ks_values,
    "IQ4_KSS": iq4_kss_values,
    "IQ5_KS": iq5_ks_values,
}
