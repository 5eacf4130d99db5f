"""IQ1, IQ2, IQ3, IQ4_XS: a lane is an index into a list of points of 8 (IQ3: 4) weights, read from `table`.

Tables (`native.gpu.tables`): IQ2 int64 points of eight bytes, IQ3 int32 points of four, IQ1 int16 points of eight times
two bits (the value plus 1), IQ4 int8 values. The largest has 8 KiB: they stay in the L1 cache.
"""

import triton
import triton.language as tl

from kimi_lite.native.gpu.types.words import byte_at, double_word_at, half_at, turn_sign, word_at


@triton.jit
def point_value(point, PLANE: tl.constexpr):
    return ((point >> (8 * PLANE)).to(tl.int32) & 255).to(tl.float32)


@triton.jit
def even_sign(seven, PLACE):
    """Bit `PLACE` of seven sign bits whose eighth makes their number even."""
    parity = seven ^ (seven >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    return ((seven | (parity << 7)) >> PLACE) & 1


@triton.jit
def iq2_xxs_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    group = base + 2 + unit // 4 * 8
    point = tl.load(table + byte_at(group + unit % 4, mask), mask, other=0)
    word = double_word_at(group + 4, mask)
    seven = ((word >> (unit % 4 * 7).to(tl.uint32)) & 127).to(tl.int32)
    scale = half_at(base, mask) * ((0.5 + (word >> 28).to(tl.float32)) * 0.25)
    return turn_sign(point_value(point, PLANE), even_sign(seven, PLANE)) * scale


@triton.jit
def nibble_scale(address, group, mask):
    """The 4 bits of one of the groups of 16 (IQ2) or 32 (IQ3_S) weights, two groups a byte."""
    return ((byte_at(address + group // 2, mask) >> (group % 2 * 4)) & 15).to(tl.float32)


@triton.jit
def iq2_xs_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = word_at(base + 2 + 2 * unit, mask)
    point = tl.load(table + (code & 511), mask, other=0)
    scale = half_at(base, mask) * ((0.5 + nibble_scale(base + 66, unit // 2, mask)) * 0.25)
    return turn_sign(point_value(point, PLANE), even_sign(code >> 9, PLANE)) * scale


@triton.jit
def iq2_s_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    high = (byte_at(base + 66 + unit // 4, mask) >> (unit % 4 * 2)) & 3
    point = tl.load(table + (byte_at(base + 2 + unit, mask) | (high << 8)), mask, other=0)
    sign = (byte_at(base + 34 + unit, mask) >> PLANE) & 1
    scale = half_at(base, mask) * ((0.5 + nibble_scale(base + 74, unit // 2, mask)) * 0.25)
    return turn_sign(point_value(point, PLANE), sign) * scale


@triton.jit
def iq3_xxs_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    point = tl.load(table + byte_at(base + 2 + unit, mask), mask, other=0)
    word = double_word_at(base + 66 + unit // 8 * 4, mask)
    seven = ((word >> (unit % 8 // 2 * 7).to(tl.uint32)) & 127).to(tl.int32)
    scale = half_at(base, mask) * ((0.5 + (word >> 28).to(tl.float32)) * 0.5)
    return turn_sign(point_value(point, PLANE), even_sign(seven, unit % 2 * 4 + PLANE)) * scale


@triton.jit
def iq3_s_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    high = (byte_at(base + 66 + unit // 8, mask) >> (unit % 8)) & 1
    point = tl.load(table + (byte_at(base + 2 + unit, mask) | (high << 8)), mask, other=0)
    sign = (byte_at(base + 74 + unit // 2, mask) >> (unit % 2 * 4 + PLANE)) & 1
    scale = half_at(base, mask) * (1.0 + 2.0 * nibble_scale(base + 106, unit // 8, mask))
    return turn_sign(point_value(point, PLANE), sign) * scale


@triton.jit
def iq1_value(point, is_lowered, PLANE: tl.constexpr):
    """-1, 0 or 1, an eighth more or less."""
    return ((point >> (2 * PLANE)) & 3).to(tl.float32) - tl.where(is_lowered, 1.125, 0.875)


@triton.jit
def iq1_s_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    high = word_at(base + 34 + unit // 4 * 2, mask)
    index = byte_at(base + 2 + unit, mask) | (((high >> (unit % 4 * 3)) & 7) << 8)
    point = tl.load(table + index, mask, other=0).to(tl.int32)
    scale = half_at(base, mask) * (2 * ((high >> 12) & 7) + 1).to(tl.float32)
    return scale * iq1_value(point, (high & 0x8000) != 0, PLANE)


@triton.jit
def iq1_m_scale(base, mask):
    """The float16 whose four nibbles are the highest ones of the four scale words."""
    first, second = word_at(base + 48, mask) >> 12, (word_at(base + 50, mask) >> 8) & 0xF0
    third, fourth = (word_at(base + 52, mask) >> 4) & 0xF00, word_at(base + 54, mask) & 0xF000
    return (first | second | third | fourth).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def iq1_m_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    nibble = byte_at(base + 32 + unit // 2, mask) >> (unit % 2 * 4)
    point = tl.load(table + (byte_at(base + unit, mask) | ((nibble & 7) << 8)), mask, other=0).to(tl.int32)
    three = (word_at(base + 48 + unit // 8 * 2, mask) >> (unit // 2 % 4 * 3)) & 7
    scale = iq1_m_scale(base, mask) * (2 * three + 1).to(tl.float32)
    return scale * iq1_value(point, (nibble & 8) != 0, PLANE)


@triton.jit
def iq4_xs_column(unit, PLANE: tl.constexpr):
    return unit // 16 * 32 + PLANE * 16 + unit % 16


@triton.jit
def iq4_xs_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    group = first // 16
    low = (byte_at(base + 4 + group // 2, mask) >> (group % 2 * 4)) & 15
    high = (word_at(base + 2, mask) >> (2 * group)) & 3
    scale = half_at(base, mask) * ((low | (high << 4)) - 32).to(tl.float32)
    code = (byte_at(base + 8 + unit, mask) >> (4 * PLANE)) & 15
    return tl.load(table + code, mask, other=0).to(tl.float32) * scale
