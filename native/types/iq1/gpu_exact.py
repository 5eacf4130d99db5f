"""Exact products of IQ1_S and IQ1_M (`native.types.gpu_words`): codes in eighths, unsigned."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import byte_at, half_at, offsets, word_at
from kimi_lite.native.types.gpu_words import dot4
from kimi_lite.native.types.iq1.gpu import iq1_m_scale
from kimi_lite.native.types.iq1.layout import IQ1_M, IQ1_S

_IQ1_S_D, _IQ1_S_QS, _IQ1_S_QH = offsets(IQ1_S, "d", "qs", "qh")
_IQ1_M_QS, _IQ1_M_QH, _IQ1_M_SCALES = offsets(IQ1_M, "qs", "qh", "scales")


@triton.jit
def eighths(point, lane):
    """Four of a point's eight values, each 0, 8 or 16: the first four for even lanes."""
    bits = (point >> (lane % 2 * 8)) & 255
    return ((bits & 3) | ((bits & 12) << 6) | ((bits & 48) << 12) | ((bits & 192) << 18)) << 3


@triton.jit
def iq1_s_factor(high):
    return 2 * ((high >> 12) & 7) + 1


@triton.jit
def iq1_s_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    own = word_at(base + _IQ1_S_QH + 2 * (4 * HALF + lane // 2), True)  # of the 16 weights that the lane corrects
    total = tl.load(sums + 8 * HALF + lane) * iq1_s_factor(own) * -(7 + ((own >> 14) & 2))
    for chunk in tl.static_range(4):
        place = lane // 2  # of four points
        high = word_at(base + _IQ1_S_QH + 2 * (2 * chunk + HALF), True)
        low = byte_at(base + _IQ1_S_QS + 8 * chunk + 4 * HALF + place, True)
        point = tl.load(table + (low | (((high >> (3 * place)) & 7) << 8))).to(tl.int32)
        total += dot4(eighths(point, lane), tl.load(x + 16 * chunk + lane)) * iq1_s_factor(high)
    return total.to(tl.float32) * (half_at(base + _IQ1_S_D, True) * 0.125)


@triton.jit
def iq1_m_factor(base, group):
    """Of one of 16 groups of 16."""
    return 2 * ((word_at(base + _IQ1_M_SCALES + group // 4 * 2, True) >> (group % 4 * 3)) & 7) + 1


@triton.jit
def iq1_m_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.load(sums + 8 * HALF + lane) * iq1_m_factor(base, 8 * HALF + lane) * -9
    for chunk in tl.static_range(4):
        unit = 8 * chunk + 4 * HALF + lane // 2
        nibble = byte_at(base + _IQ1_M_QH + unit // 2, True) >> (unit % 2 * 4)
        low = byte_at(base + _IQ1_M_QS + unit, True)
        point = tl.load(table + (low | ((nibble & 7) << 8))).to(tl.int32)
        codes = eighths(point, lane) + tl.where((nibble & 8) == 0, 0x02020202, 0)
        total += dot4(codes, tl.load(x + 16 * chunk + lane)) * iq1_m_factor(base, unit // 2)
    return total.to(tl.float32) * (iq1_m_scale(base, True) * 0.125)


VALUES = {"IQ1_S": iq1_s_values, "IQ1_M": iq1_m_values}
