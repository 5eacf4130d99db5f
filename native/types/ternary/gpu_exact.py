"""Exact products of TQ1_0 and TQ2_0 (`native.types.gpu_words`)."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import half_at, offsets
from kimi_lite.native.types.gpu_words import dot4, word2
from kimi_lite.native.types.ternary.layout import TQ1_0, TQ2_0

_TQ1_0_QS, _TQ1_0_D = offsets(TQ1_0, "qs", "d")
_TQ2_0_QS, _TQ2_0_D = offsets(TQ2_0, "qs", "d")


@triton.jit
def digits(word, power):
    """Of four bytes the digit that is first after multiplication with `power`, two bytes at a time."""
    low, high = (word & 0x00FF00FF) * power & 0x00FF00FF, ((word >> 8) & 0x00FF00FF) * power & 0x00FF00FF
    return ((low * 3 >> 8) & 0x00030003) | ((high * 3) & 0x03000300)


@triton.jit
def tq1_0_codes(base, lane, GROUP: tl.constexpr):
    """Of 32 weights: five digits of 32 bytes, five of 16, four of four (`tq1_0_column`)."""
    if GROUP < 5:
        return digits(word2(base + _TQ1_0_QS + 4 * lane, True), 3**GROUP)
    is_first, byte = lane < 4, 32 + lane % 4 * 4
    if GROUP == 5:
        power = tl.where(is_first, 1, 3)
    elif GROUP == 6:
        power = tl.where(is_first, 9, 27)
    else:
        last = tl.where(lane == 4, 1, tl.where(lane == 5, 3, tl.where(lane == 6, 9, 27)))
        power, byte = tl.where(is_first, 81, last), tl.where(is_first, byte, 48)
    return digits(word2(base + _TQ1_0_QS + byte, True), power)


@triton.jit
def tq1_0_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32) - tl.load(sums + 8 * HALF + lane)
    for chunk in tl.static_range(4):
        total += dot4(tq1_0_codes(base, lane, 2 * chunk + HALF), tl.load(x + 16 * chunk + lane))
    return total.to(tl.float32) * half_at(base + _TQ1_0_D, True)


@triton.jit
def tq2_0_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    total = tl.zeros((base.shape[0], lane.shape[1]), tl.int32) - tl.load(sums + 8 * HALF + lane)
    for chunk in tl.static_range(4):
        bits = word2(base + _TQ2_0_QS + chunk // 2 * 32 + 4 * lane, True) >> (chunk % 2 * 4 + 2 * HALF)
        total += dot4(bits & 0x03030303, tl.load(x + 16 * chunk + lane))
    return total.to(tl.float32) * half_at(base + _TQ2_0_D, True)


VALUES = {"TQ1_0": tq1_0_values, "TQ2_0": tq2_0_values}
