"""Exact products of IQ1_KT, IQ2_KT, IQ3_KT and IQ4_KT (`native.types.gpu_words`): four weights of a state in a word."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import byte_at, offsets, word_at
from kimi_lite.native.types.gpu_words import dot4, sum_of_32
from kimi_lite.native.types.trellis.gpu import (
    iq1_kt_index,
    iq4_kt_index,
    iq4_kt_scale,
    nibble_of_half,
    power,
    sum_of_bytes,
)
from kimi_lite.native.types.trellis.layout import CENTRE, FIRST_STATE, IQ1_KT, IQ2_KT, IQ3_KT

[_SH] = offsets(IQ1_KT, "sh")
_SCALES, _QS = offsets(IQ2_KT, "scales", "qs")  # the same in IQ3_KT
[_SIGNS] = offsets(IQ3_KT, "qh")
_CENTRE, _FIRST_STATE = tl.constexpr(CENTRE), tl.constexpr(FIRST_STATE)


@triton.jit
def weight_sum(index, is_second, PLACE: tl.constexpr):
    """CENTRE + weight PLACE, of the second four where `is_second`, of an int32 index."""
    factor = tl.where(is_second, power(4 + PLACE), power(PLACE))
    return sum_of_bytes((index + _FIRST_STATE).to(tl.uint32) * factor)


@triton.jit
def weight_word(index, is_second, BIAS: tl.constexpr):
    """Four bytes: weights, CENTRE higher where BIAS is not zero."""
    codes = tl.zeros_like(index)
    for place in tl.static_range(4):
        code = weight_sum(index, is_second, place)
        code = code if BIAS != 0 else (code - _CENTRE) & 255
        codes |= code << (8 * place)
    return codes


@triton.jit
def iq1_kt_scale(base, table, group):
    return tl.load(table + (byte_at(base + _SH + group, True) & 15)).to(tl.float32)


@triton.jit
def iq2_kt_scale(base, table, group):
    return tl.load(table + nibble_of_half(base + _SCALES, group, True)).to(tl.float32)


@triton.jit
def iq4_kt_float_scale(base, table, group):
    return iq4_kt_scale(base, group, True).to(tl.float32)


@triton.jit
def iq2_kt_index(base, unit, mask):
    return word_at(base + _QS + 2 * unit, mask)


@triton.jit
def signed_values(
    base, x, sums, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr, INDEX: tl.constexpr, SCALE: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Of the types with scales of eight bits. INDEX(base, unit, mask), SCALE(base, table, group); LANES: words of four
    weights to an index."""
    value = tl.zeros((base.shape[0], lane.shape[1]), tl.float32)
    if HALF == 0:
        offset = _CENTRE if BIAS != 0 else 0
        value = SCALE(base, table, lane) * sum_of_32(sums, lane).to(tl.float32) * (-offset)
    for chunk in tl.static_range(4):
        index = INDEX(base, (16 * chunk + 8 * HALF + lane) // LANES, True)
        total = dot4(weight_word(index, lane % LANES != 0, BIAS), tl.load(x + 16 * chunk + lane), BIAS == 0)
        scale = SCALE(base, table, 2 * chunk + HALF)
        value = tl.fma(total.to(tl.float32), scale + tl.zeros_like(value), value)
    return value


@triton.jit
def iq1_kt_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return signed_values(base, x, sums, lane, table, BIAS, HALF, iq1_kt_index, iq1_kt_scale, 2)


@triton.jit
def iq2_kt_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return signed_values(base, x, sums, lane, table, BIAS, HALF, iq2_kt_index, iq2_kt_scale, 2)


@triton.jit
def iq4_kt_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return signed_values(base, x, sums, lane, table, BIAS, HALF, iq4_kt_index, iq4_kt_float_scale, 1)


@triton.jit
def iq3_kt_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32)
    for chunk in tl.static_range(4):
        index, group = iq2_kt_index(base, 8 * chunk + 4 * HALF + lane // 2, True), 2 * chunk + HALF
        codes = tl.zeros_like(index)
        for place in tl.static_range(4):
            size = tl.abs(weight_sum(index, lane % 2 != 0, place) - _CENTRE)
            is_negative = (byte_at(base + _SIGNS + 4 * lane + place, True) >> group) & 1
            codes |= (tl.where(is_negative != 0, -size, size) & 255) << (8 * place)
        total += dot4(codes, tl.load(x + 16 * chunk + lane), True) * nibble_of_half(base + _SCALES, group, True)
    return total.to(tl.float32)


VALUES = {
    "IQ1_KT": iq1_kt_values,
    "IQ2_KT": iq2_kt_values,
    "IQ3_KT": iq3_kt_values,
    "IQ4_KT": iq4_kt_values,
}
