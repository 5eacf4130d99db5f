"""Exact products of IQ3_XXS and IQ3_S (`native.types.gpu_words`): a lane's four weights are one point."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import byte_at, even_signs, half_at, offsets
from kimi_lite.native.types.gpu_words import dot4, negated, word2
from kimi_lite.native.types.iq3.layout import IQ3_S, IQ3_XXS

_D, _QS = offsets(IQ3_XXS, "d", "qs")  # the same in both
[_IQ3_XXS_SAS] = offsets(IQ3_XXS, "sas")
_IQ3_S_QH, _IQ3_S_SIGNS, _IQ3_S_SCALES = offsets(IQ3_S, "qh", "signs", "scales")


@triton.jit
def iq3_xxs_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32)
    for chunk in tl.static_range(4):
        word = word2(base + _IQ3_XXS_SAS + 4 * (2 * chunk + HALF), True)
        signs = even_signs((word >> (lane // 2 * 7)) & 127) >> (lane % 2 * 4)
        point = tl.load(table + byte_at(base + _QS + 16 * chunk + 8 * HALF + lane, True))
        scale = ((word >> 28) & 15) * 2 + 1
        total += dot4(negated(point, signs), tl.load(x + 16 * chunk + lane), True) * scale
    return total.to(tl.float32) * (half_at(base + _D, True) * 0.25)


@triton.jit
def iq3_s_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32)
    for chunk in tl.static_range(4):
        group = 2 * chunk + HALF  # of 32
        high = (byte_at(base + _IQ3_S_QH + group, True) >> lane) & 1
        point = tl.load(table + (byte_at(base + _QS + 8 * group + lane, True) | (high << 8)))
        signs = byte_at(base + _IQ3_S_SIGNS + 4 * group + lane // 2, True) >> (lane % 2 * 4)
        scale = ((byte_at(base + _IQ3_S_SCALES + group // 2, True) >> (group % 2 * 4)) & 15) * 2 + 1
        total += dot4(negated(point, signs), tl.load(x + 16 * chunk + lane), True) * scale
    return total.to(tl.float32) * half_at(base + _D, True)


VALUES = {"IQ3_XXS": iq3_xxs_values, "IQ3_S": iq3_s_values}
