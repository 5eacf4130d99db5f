"""IQ3_XXS and IQ3_S: `table` has int32 points of four bytes."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import (
    Decoder,
    byte_at,
    double_word_at,
    even_sign,
    four_column,
    half_at,
    nibble_scale,
    offsets,
    point_value,
    turn_sign,
)
from kimi_lite.native.types.iq3.layout import IQ3_S, IQ3_XXS

_IQ3_XXS_D, _IQ3_XXS_QS, _IQ3_XXS_SAS = offsets(IQ3_XXS, "d", "qs", "sas")
_IQ3_S_D, _IQ3_S_QS, _IQ3_S_QH, _IQ3_S_SIGNS, _IQ3_S_SCALES = offsets(IQ3_S, "d", "qs", "qh", "signs", "scales")


@triton.jit
def iq3_xxs_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    point = tl.load(table + byte_at(base + _IQ3_XXS_QS + unit, mask), mask, other=0)
    word = double_word_at(base + _IQ3_XXS_SAS + unit // 8 * 4, mask)
    seven = ((word >> (unit % 8 // 2 * 7).to(tl.uint32)) & 127).to(tl.int32)
    scale = half_at(base + _IQ3_XXS_D, mask) * ((0.5 + (word >> 28).to(tl.float32)) * 0.5)
    return turn_sign(point_value(point, PLANE), even_sign(seven, unit % 2 * 4 + PLANE)) * scale


@triton.jit
def iq3_s_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    high = (byte_at(base + _IQ3_S_QH + unit // 8, mask) >> (unit % 8)) & 1
    point = tl.load(table + (byte_at(base + _IQ3_S_QS + unit, mask) | (high << 8)), mask, other=0)
    sign = (byte_at(base + _IQ3_S_SIGNS + unit // 2, mask) >> (unit % 2 * 4 + PLANE)) & 1
    scale = half_at(base + _IQ3_S_D, mask) * (1.0 + 2.0 * nibble_scale(base + _IQ3_S_SCALES, unit // 8, mask))
    return turn_sign(point_value(point, PLANE), sign) * scale


DECODERS = {
    "IQ3_XXS": Decoder(iq3_xxs_decode, four_column, 64, 4, 1, "IQ3_XXS"),
    "IQ3_S": Decoder(iq3_s_decode, four_column, 64, 4, 1, "IQ3_S"),
}
