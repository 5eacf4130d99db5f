"""Exact products of IQ2_XXS, IQ2_XS and IQ2_S (`native.types.gpu_words`): signs are in the codes, scales are odd."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import byte_at, even_signs, half_at, offsets, word_at
from kimi_lite.native.types.gpu_words import dot4, negated, word2
from kimi_lite.native.types.iq2.layout import IQ2_S, IQ2_XS, IQ2_XXS

_D, _QS = offsets(IQ2_XXS, "d", "qs")  # the same in all three
[_IQ2_XS_SCALES] = offsets(IQ2_XS, "scales")
_IQ2_S_SIGNS, _IQ2_S_QH, _IQ2_S_SCALES = offsets(IQ2_S, "signs", "qh", "scales")


@triton.jit
def half_point(table, index, lane):
    """Four of a point's eight magnitudes, as bytes: the first four for even lanes."""
    return tl.load(table.to(tl.pointer_type(tl.int32)) + 2 * index + lane % 2)


@triton.jit
def odd_scale(address, group):
    """2 s + 1 of one of 16 nibbles."""
    return ((byte_at(address + group // 2, True) >> (group % 2 * 4)) & 15) * 2 + 1


@triton.jit
def iq2_xxs_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32)
    for chunk in tl.static_range(4):
        group, place = base + _QS + 8 * (2 * chunk + HALF), lane // 2  # of four points
        word = word2(group + 4, True)
        signs = even_signs((word >> (7 * place)) & 127) >> (lane % 2 * 4)
        codes = negated(half_point(table, byte_at(group + place, True), lane), signs)
        total += dot4(codes, tl.load(x + 16 * chunk + lane), True) * (((word >> 28) & 15) * 2 + 1)
    return total.to(tl.float32) * (half_at(base + _D, True) * 0.125)


@triton.jit
def iq2_xs_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32)
    for chunk in tl.static_range(4):
        unit = 8 * chunk + 4 * HALF + lane // 2
        code = word_at(base + _QS + 2 * unit, True)
        signs = even_signs(code >> 9) >> (lane % 2 * 4)
        codes = negated(half_point(table, code & 511, lane), signs)
        total += dot4(codes, tl.load(x + 16 * chunk + lane), True) * odd_scale(base + _IQ2_XS_SCALES, unit // 2)
    return total.to(tl.float32) * (half_at(base + _D, True) * 0.125)


@triton.jit
def iq2_s_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32)
    for chunk in tl.static_range(4):
        unit = 8 * chunk + 4 * HALF + lane // 2
        high = (byte_at(base + _IQ2_S_QH + unit // 4, True) >> (unit % 4 * 2)) & 3
        signs = byte_at(base + _IQ2_S_SIGNS + unit, True) >> (lane % 2 * 4)
        codes = negated(half_point(table, byte_at(base + _QS + unit, True) | (high << 8), lane), signs)
        total += dot4(codes, tl.load(x + 16 * chunk + lane), True) * odd_scale(base + _IQ2_S_SCALES, unit // 2)
    return total.to(tl.float32) * (half_at(base + _D, True) * 0.125)


VALUES = {"IQ2_XXS": iq2_xxs_values, "IQ2_XS": iq2_xs_values, "IQ2_S": iq2_s_values}
