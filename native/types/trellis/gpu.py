"""IQ1_KT, IQ2_KT, IQ3_KT, IQ4_KT: a lane is a state, its planes are the weights that come of it; the row's scale is the
kernels'."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import Decoder, byte_at, eight_column, four_column, offsets, turn_sign, word_at
from kimi_lite.native.types.trellis.layout import (
    CENTRE,
    FIRST_STATE,
    IQ1_KT,
    IQ2_KT,
    IQ3_KT,
    IQ4_KT,
    POWERS,
    SIX_BITS,
)

_SH, _IQ1_QL, _IQ1_QH = offsets(IQ1_KT, "sh", "ql", "qh")
_SCALES, _QS = offsets(IQ2_KT, "scales", "qs")  # the same in IQ3_KT
[_SIGNS] = offsets(IQ3_KT, "qh")
_WORDS, _IQ4_QL, _IQ4_QH = offsets(IQ4_KT, "qs", "ql", "qh")
_CENTRE, _FIRST_STATE, _SIX_BITS = tl.constexpr(CENTRE), tl.constexpr(FIRST_STATE), tl.constexpr(SIX_BITS)
_P1, _P2, _P3, _P4, _P5, _P6, _P7, _P8 = (tl.constexpr(power) for power in POWERS)


@triton.jit
def sum_of_bytes(states):
    """int32: the sum of the six low bits of the four bytes of uint32 states, 0 .. 252."""
    return (((states & _SIX_BITS) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def power(PLANE: tl.constexpr):
    """uint32: what makes weight PLANE of a state."""
    if PLANE == 0:
        return tl.full((), _P1, tl.uint32)
    if PLANE == 1:
        return tl.full((), _P2, tl.uint32)
    if PLANE == 2:
        return tl.full((), _P3, tl.uint32)
    if PLANE == 3:
        return tl.full((), _P4, tl.uint32)
    if PLANE == 4:
        return tl.full((), _P5, tl.uint32)
    if PLANE == 5:
        return tl.full((), _P6, tl.uint32)
    if PLANE == 6:
        return tl.full((), _P7, tl.uint32)
    return tl.full((), _P8, tl.uint32)


@triton.jit
def weight_of(index, PLANE: tl.constexpr):
    """The integer that is weight PLANE of an int32 index, as float32."""
    state = (index + _FIRST_STATE).to(tl.uint32) * power(PLANE)
    return (sum_of_bytes(state) - _CENTRE).to(tl.float32)


@triton.jit
def iq1_kt_index(base, unit, mask):
    low = byte_at(base + _IQ1_QL + unit, mask)
    nibble = (byte_at(base + _IQ1_QH + unit % 16, mask) >> (unit // 16 * 4)) & 15
    top = (byte_at(base + _SH + unit // 4, mask) >> (4 + unit % 4)) & 1
    return low | (nibble << 8) | (top << 12)


@triton.jit
def nibble_of_half(address, group, mask):
    """The 4 bits of one of 8 groups: those of groups i and i + 4 are in byte i."""
    return (byte_at(address + group % 4, mask) >> (group // 4 * 4)) & 15


@triton.jit
def iq1_kt_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    """`table`: the 16 scales, int8."""
    scale = tl.load(table + (byte_at(base + _SH + unit // 4, mask) & 15), mask, other=0).to(tl.float32)
    return weight_of(iq1_kt_index(base, unit, mask), PLANE) * scale


@triton.jit
def iq2_kt_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    scale = tl.load(table + nibble_of_half(base + _SCALES, unit // 4, mask), mask, other=0).to(tl.float32)
    return weight_of(word_at(base + _QS + 2 * unit, mask), PLANE) * scale


@triton.jit
def iq3_kt_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    scale = nibble_of_half(base + _SCALES, unit // 4, mask).to(tl.float32)
    sign = byte_at(base + _SIGNS + unit % 4 * 8 + PLANE, mask) >> (unit // 4)
    return turn_sign(tl.abs(weight_of(word_at(base + _QS + 2 * unit, mask), PLANE)) * scale, sign & 1)


@triton.jit
def iq4_kt_index(base, unit, mask):
    """The lowest bit of the word of 8 groups is bit 15 of their indices."""
    low = byte_at(base + _IQ4_QL + unit, mask)
    nibble = (byte_at(base + _IQ4_QH + unit % 32, mask) >> (unit // 32 * 4)) & 15
    word = base + _WORDS + unit // 8 * 4
    moved = byte_at(word, mask) & 1
    place = 3 * (unit % 8)  # of three bits, in three bytes
    high = byte_at(word + 1, mask) | (word_at(word + 2, mask) << 8)
    return low | (nibble << 8) | (((high >> place) & 7) << 12) | (moved << 15)


@triton.jit
def iq4_kt_scale(base, group, mask):
    return (byte_at(base + _WORDS + group * 4, mask) >> 1) - 64


@triton.jit
def iq4_kt_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    return weight_of(iq4_kt_index(base, unit, mask), PLANE) * iq4_kt_scale(base, unit // 8, mask).to(tl.float32)


DECODERS = {
    "IQ1_KT": Decoder(iq1_kt_decode, eight_column, 32, 8, 1, "IQ4"),
    "IQ2_KT": Decoder(iq2_kt_decode, eight_column, 32, 8, 1, "IQ4"),
    "IQ3_KT": Decoder(iq3_kt_decode, eight_column, 32, 8, 1),
    "IQ4_KT": Decoder(iq4_kt_decode, four_column, 64, 4, 1),
}
