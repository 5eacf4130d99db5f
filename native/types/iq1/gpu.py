"""IQ1_S and IQ1_M: `table` has int16 points of eight times two bits, the value plus 1."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import (
    Decoder,
    byte_at,
    eight_column,
    half_at,
    offsets,
    word_at,
)
from kimi_lite.native.types.iq1.layout import IQ1_M, IQ1_S

_IQ1_S_D, _IQ1_S_QS, _IQ1_S_QH = offsets(IQ1_S, "d", "qs", "qh")
_IQ1_M_QS, _IQ1_M_QH, _IQ1_M_SCALES = offsets(IQ1_M, "qs", "qh", "scales")


@triton.jit
def iq1_value(point, is_lowered, PLANE: tl.constexpr):
    """-1, 0 or 1, an eighth more or less."""
    return ((point >> (2 * PLANE)) & 3).to(tl.float32) - tl.where(is_lowered, 1.125, 0.875)


@triton.jit
def iq1_s_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    high = word_at(base + _IQ1_S_QH + unit // 4 * 2, mask)
    index = byte_at(base + _IQ1_S_QS + unit, mask) | (((high >> (unit % 4 * 3)) & 7) << 8)
    point = tl.load(table + index, mask, other=0).to(tl.int32)
    scale = half_at(base + _IQ1_S_D, mask) * (2 * ((high >> 12) & 7) + 1).to(tl.float32)
    return scale * iq1_value(point, (high & 0x8000) != 0, PLANE)


@triton.jit
def iq1_m_scale(base, mask):
    """The float16 whose four nibbles are the highest ones of the four scale words."""
    words = base + _IQ1_M_SCALES
    first, second = word_at(words, mask) >> 12, (word_at(words + 2, mask) >> 8) & 0xF0
    third, fourth = (word_at(words + 4, mask) >> 4) & 0xF00, word_at(words + 6, mask) & 0xF000
    return (first | second | third | fourth).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def iq1_m_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    nibble = byte_at(base + _IQ1_M_QH + unit // 2, mask) >> (unit % 2 * 4)
    point = tl.load(table + (byte_at(base + _IQ1_M_QS + unit, mask) | ((nibble & 7) << 8)), mask, other=0).to(tl.int32)
    three = (word_at(base + _IQ1_M_SCALES + unit // 8 * 2, mask) >> (unit // 2 % 4 * 3)) & 7
    scale = iq1_m_scale(base, mask) * (2 * three + 1).to(tl.float32)
    return scale * iq1_value(point, (nibble & 8) != 0, PLANE)


DECODERS = {
    "IQ1_S": Decoder(iq1_s_decode, eight_column, 32, 8, 1, "IQ1_S"),
    "IQ1_M": Decoder(iq1_m_decode, eight_column, 32, 8, 1, "IQ1_S"),
}
