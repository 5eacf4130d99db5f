"""Q2_K to Q6_K: groups of 16 or 32 have quantized scales (and minima)."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import (
    Decoder,
    byte_at,
    half_at,
    offsets,
    quarters_column,
    signed_byte_at,
)
from kimi_lite.native.types.k_quants.layout import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K

_Q2_K_SCALES, _Q2_K_QS, _Q2_K_D, _Q2_K_DMIN = offsets(Q2_K, "scales", "qs", "d", "dmin")
_Q3_K_HMASK, _Q3_K_QS, _Q3_K_SCALES, _Q3_K_D = offsets(Q3_K, "hmask", "qs", "scales", "d")
_Q4_K_D, _Q4_K_DMIN, _Q4_K_SCALES, _Q4_K_QS = offsets(Q4_K, "d", "dmin", "scales", "qs")
_Q5_K_QH, _Q5_K_QS = offsets(Q5_K, "qh", "qs")
_Q6_K_QL, _Q6_K_QH, _Q6_K_SCALES, _Q6_K_D = offsets(Q6_K, "ql", "qh", "scales", "d")


@triton.jit
def q2_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = (byte_at(base + _Q2_K_QS + unit, mask) >> (2 * PLANE)) & 3
    scale = byte_at(base + _Q2_K_SCALES + first // 32 * 8 + 2 * PLANE + first % 32 // 16, mask)
    minimum = (scale >> 4).to(tl.float32) * half_at(base + _Q2_K_DMIN, mask)
    return code.to(tl.float32) * ((scale & 15).to(tl.float32) * half_at(base + _Q2_K_D, mask)) - minimum


@triton.jit
def q3_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    half = first // 32
    code = (byte_at(base + _Q3_K_QS + unit, mask) >> (2 * PLANE)) & 3
    high = (byte_at(base + _Q3_K_HMASK + unit % 32, mask) >> (4 * half + PLANE)) & 1
    group = half * 8 + 2 * PLANE + first % 32 // 16  # 0..15
    low = byte_at(base + _Q3_K_SCALES + group % 8, mask) >> (group // 8 * 4)
    upper = byte_at(base + _Q3_K_SCALES + 8 + group % 4, mask) >> (group // 4 * 2)
    scale = ((low & 15) | ((upper & 3) << 4)) - 32
    return (code - 4 + 4 * high).to(tl.float32) * (scale.to(tl.float32) * half_at(base + _Q3_K_D, mask))


@triton.jit
def pairs_column(unit, PLANE: tl.constexpr):
    """Per 32 bytes, 32 low nibbles and 32 high ones: Q4_K, Q5_K."""
    return unit // 32 * 64 + PLANE * 32 + unit % 32


@triton.jit
def six_bit_scales(base, group, mask):
    """(scale, minimum) of one of 8 groups; 12 bytes hold 6 bits of each. Q4_K and Q5_K."""
    place = base + _Q4_K_SCALES + group % 4
    first, second, third = byte_at(place, mask), byte_at(place + 4, mask), byte_at(place + 8, mask)
    scale = tl.where(group < 4, first & 63, (third & 15) | ((first >> 6) << 4))
    minimum = tl.where(group < 4, second & 63, (third >> 4) | ((second >> 6) << 4))
    return scale.to(tl.float32) * half_at(base + _Q4_K_D, mask), minimum.to(tl.float32) * half_at(
        base + _Q4_K_DMIN, mask
    )


@triton.jit
def q4_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = (byte_at(base + _Q4_K_QS + unit, mask) >> (4 * PLANE)) & 15
    scale, minimum = six_bit_scales(base, first // 32 * 2 + PLANE, mask)
    return code.to(tl.float32) * scale - minimum


@triton.jit
def q5_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    group = first // 32 * 2 + PLANE
    code = (byte_at(base + _Q5_K_QS + unit, mask) >> (4 * PLANE)) & 15
    high = (byte_at(base + _Q5_K_QH + unit % 32, mask) >> group) & 1
    scale, minimum = six_bit_scales(base, group, mask)
    return (code | (high << 4)).to(tl.float32) * scale - minimum


@triton.jit
def q6_k_column(unit, PLANE: tl.constexpr):
    return unit // 64 * 128 + PLANE * 64 + unit % 64


@triton.jit
def q6_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    half, place = first // 64, first % 64
    low = (byte_at(base + _Q6_K_QL + unit, mask) >> (4 * PLANE)) & 15
    high = byte_at(base + _Q6_K_QH + half * 32 + unit % 32, mask) >> (4 * PLANE + place // 32 * 2)
    scale = signed_byte_at(base + _Q6_K_SCALES + half * 8 + PLANE * 4 + place // 16, mask).to(tl.float32)
    return ((low | ((high & 3) << 4)) - 32).to(tl.float32) * (scale * half_at(base + _Q6_K_D, mask))


DECODERS = {
    "Q2_K": Decoder(q2_k_decode, quarters_column, 64, 4, 4),
    "Q3_K": Decoder(q3_k_decode, quarters_column, 64, 4, 2),
    "Q4_K": Decoder(q4_k_decode, pairs_column, 128, 2, 4),
    "Q5_K": Decoder(q5_k_decode, pairs_column, 128, 2, 4),
    "Q6_K": Decoder(q6_k_decode, q6_k_column, 128, 2, 2),
}
