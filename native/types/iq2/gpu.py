"""IQ2_XXS, IQ2_XS, IQ2_S: `table` has int64 points of eight bytes."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import (
    Decoder,
    byte_at,
    double_word_at,
    eight_column,
    even_sign,
    half_at,
    nibble_scale,
    offsets,
    point_value,
    turn_sign,
    word_at,
)
from kimi_lite.native.types.iq2.layout import IQ2_S, IQ2_XS, IQ2_XXS

_IQ2_XXS_D, _IQ2_XXS_QS = offsets(IQ2_XXS, "d", "qs")
_IQ2_XS_D, _IQ2_XS_QS, _IQ2_XS_SCALES = offsets(IQ2_XS, "d", "qs", "scales")
_IQ2_S_D, _IQ2_S_QS, _IQ2_S_SIGNS, _IQ2_S_QH, _IQ2_S_SCALES = offsets(IQ2_S, "d", "qs", "signs", "qh", "scales")


@triton.jit
def iq2_xxs_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    group = base + _IQ2_XXS_QS + unit // 4 * 8
    point = tl.load(table + byte_at(group + unit % 4, mask), mask, other=0)
    word = double_word_at(group + 4, mask)
    seven = ((word >> (unit % 4 * 7).to(tl.uint32)) & 127).to(tl.int32)
    scale = half_at(base + _IQ2_XXS_D, mask) * ((0.5 + (word >> 28).to(tl.float32)) * 0.25)
    return turn_sign(point_value(point, PLANE), even_sign(seven, PLANE)) * scale


@triton.jit
def iq2_xs_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = word_at(base + _IQ2_XS_QS + 2 * unit, mask)
    point = tl.load(table + (code & 511), mask, other=0)
    scale = half_at(base + _IQ2_XS_D, mask) * ((0.5 + nibble_scale(base + _IQ2_XS_SCALES, unit // 2, mask)) * 0.25)
    return turn_sign(point_value(point, PLANE), even_sign(code >> 9, PLANE)) * scale


@triton.jit
def iq2_s_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    high = (byte_at(base + _IQ2_S_QH + unit // 4, mask) >> (unit % 4 * 2)) & 3
    point = tl.load(table + (byte_at(base + _IQ2_S_QS + unit, mask) | (high << 8)), mask, other=0)
    sign = (byte_at(base + _IQ2_S_SIGNS + unit, mask) >> PLANE) & 1
    scale = half_at(base + _IQ2_S_D, mask) * ((0.5 + nibble_scale(base + _IQ2_S_SCALES, unit // 2, mask)) * 0.25)
    return turn_sign(point_value(point, PLANE), sign) * scale


DECODERS = {
    "IQ2_XXS": Decoder(iq2_xxs_decode, eight_column, 32, 8, 1, "IQ2_XXS"),
    "IQ2_XS": Decoder(iq2_xs_decode, eight_column, 32, 8, 1, "IQ2_XS"),
    "IQ2_S": Decoder(iq2_s_decode, eight_column, 32, 8, 1, "IQ2_S"),
}
