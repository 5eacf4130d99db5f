"""TQ1_0, TQ2_0, Q1_0, Q2_0: ternary and two-valued weights, arithmetic only."""

import triton
import triton.language as tl

from kimi_lite.native.gpu.types.words import byte_at, float_of_bits, half_at


@triton.jit
def tq1_0_column(unit, PLANE: tl.constexpr):
    """32 bytes of 5 digits, 16 of 5, 4 of 4. The fifth digit of the last is column 256 and up: no weight."""
    wide = PLANE * 32 + unit
    middle = 160 + PLANE * 16 + (unit - 32)
    return tl.where(unit < 32, wide, tl.where(unit < 48, middle, 240 + PLANE * 4 + (unit - 48)))


@triton.jit
def tq1_0_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    """Digit by multiplication: the byte is the number of five digits as a fraction of 256, rounded up (ggml)."""
    POWER: tl.constexpr = 3**PLANE
    digit = ((((byte_at(base + unit, mask) * POWER) & 255) * 3) >> 8) - 1
    return digit.to(tl.float32) * half_at(base + 52, mask)


@triton.jit
def quarters_column(unit, PLANE: tl.constexpr):
    """Per 32 bytes, four times 32 weights: TQ2_0, Q2_K, Q3_K."""
    return unit // 32 * 128 + PLANE * 32 + unit % 32


@triton.jit
def tq2_0_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = (byte_at(base + unit, mask) >> (2 * PLANE)) & 3
    return (code - 1).to(tl.float32) * half_at(base + 64, mask)


@triton.jit
def eight_column(unit, PLANE: tl.constexpr):
    """Eight neighbours a lane: Q1_0 and the code books of eight."""
    return unit * 8 + PLANE


@triton.jit
def four_column(unit, PLANE: tl.constexpr):
    """Four neighbours a lane: Q2_0 and the code books of four."""
    return unit * 4 + PLANE


@triton.jit
def q1_0_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    """d where the bit is set, -d where it is not."""
    bit = (byte_at(base + 2 + unit, mask) >> PLANE) & 1
    return float_of_bits(half_at(base, mask).to(tl.int32, bitcast=True) ^ ((1 - bit) << 31))


@triton.jit
def q2_0_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = (byte_at(base + 2 + unit, mask) >> (2 * PLANE)) & 3
    return (code - 1).to(tl.float32) * half_at(base, mask)
