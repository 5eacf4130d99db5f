"""Exact products of Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 (`native.types.gpu_words`)."""

import triton
import triton.language as tl

from kimi_lite.native.types.blocks_of_32.layout import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from kimi_lite.native.types.gpu_parts import half_at, offsets
from kimi_lite.native.types.gpu_words import bits_to_bytes, d_first, dot4, span_values, sum_of_32, word2

[_Q8_0_QS], [_Q4_0_QS], [_Q4_1_M, _Q4_1_QS] = offsets(Q8_0, "qs"), offsets(Q4_0, "qs"), offsets(Q4_1, "m", "qs")
_Q5_0_QH, _Q5_0_QS = offsets(Q5_0, "qh", "qs")
_Q5_1_M, _Q5_1_QH, _Q5_1_QS = offsets(Q5_1, "m", "qh", "qs")
_Q8_0_BYTES, _Q4_0_BYTES, _Q4_1_BYTES, _Q5_0_BYTES, _Q5_1_BYTES = (
    tl.constexpr(layout.block_bytes) for layout in (Q8_0, Q4_0, Q4_1, Q5_0, Q5_1)
)


@triton.jit
def nibbles(address, lane, mask):
    """Four codes: low nibbles for lanes 0 .. 3, high ones for 4 .. 7."""
    return (word2(address + lane % 4 * 4, mask) >> (lane // 4 * 4)) & 0x0F0F0F0F


@triton.jit
def fifth_bits(address, lane, mask):
    """Bit 4 of four codes."""
    return bits_to_bytes((word2(address, mask) >> (4 * lane)) & 15) << 4


@triton.jit
def q8_0_codes(block, part, lane, mask, table, BIAS: tl.constexpr):
    codes = word2(block + _Q8_0_QS + 4 * lane, mask)
    return codes ^ -2139062144 if BIAS == 128 else codes  # 0x80808080: adds 128


@triton.jit
def q4_0_codes(block, part, lane, mask, table, BIAS: tl.constexpr):
    return nibbles(block + _Q4_0_QS, lane, mask)


@triton.jit
def q5_0_codes(block, part, lane, mask, table, BIAS: tl.constexpr):
    return nibbles(block + _Q5_0_QS, lane, mask) | fifth_bits(block + _Q5_0_QH, lane, mask)


@triton.jit
def q4_1_codes(block, part, lane, mask, table, BIAS: tl.constexpr):
    return nibbles(block + _Q4_1_QS, lane, mask)


@triton.jit
def q5_1_codes(block, part, lane, mask, table, BIAS: tl.constexpr):
    return nibbles(block + _Q5_1_QS, lane, mask) | fifth_bits(block + _Q5_1_QH, lane, mask)


@triton.jit
def q8_0_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return span_values(
        base, x, steps, sums, limit, lane, table, BIAS, HALF, q8_0_codes, d_first, BIAS, 32, _Q8_0_BYTES, BIAS == 0
    )


@triton.jit
def q4_0_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return span_values(
        base, x, steps, sums, limit, lane, table, BIAS, HALF, q4_0_codes, d_first, 8, 32, _Q4_0_BYTES
    )  # fmt: skip


@triton.jit
def q5_0_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return span_values(
        base, x, steps, sums, limit, lane, table, BIAS, HALF, q5_0_codes, d_first, 16, 32, _Q5_0_BYTES
    )  # fmt: skip


@triton.jit
def with_minima(
    base, x, steps, sums, limit, lane, table, HALF: tl.constexpr, CODES: tl.constexpr, M: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """Lane l < 8 begins with the minimum of the l-th block times the scaled sum of its activations."""
    value = tl.zeros((base.shape[0], lane.shape[1]), tl.float32)
    if HALF == 0:
        mask = lane < limit
        total = tl.load(steps + lane, mask, other=0.0) * sum_of_32(sums, tl.minimum(lane, limit - 1)).to(tl.float32)
        value = half_at(base + lane * BLOCK_BYTES + M, mask) * total
    for chunk in tl.static_range(4):
        group = 2 * chunk + HALF
        block, mask = base + group * BLOCK_BYTES, limit > group
        total = dot4(CODES(block, 0, lane, mask, table, 0), tl.load(x + 16 * chunk + lane, mask, other=0))
        scale = d_first(block, mask) * tl.load(steps + group, mask, other=0.0)
        value = tl.fma(total.to(tl.float32), scale + tl.zeros_like(value), value)
    return value


@triton.jit
def q4_1_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return with_minima(base, x, steps, sums, limit, lane, table, HALF, q4_1_codes, _Q4_1_M, _Q4_1_BYTES)


@triton.jit
def q5_1_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return with_minima(base, x, steps, sums, limit, lane, table, HALF, q5_1_codes, _Q5_1_M, _Q5_1_BYTES)


VALUES = {
    "Q8_0": q8_0_values,
    "Q4_0": q4_0_values,
    "Q4_1": q4_1_values,
    "Q5_0": q5_0_values,
    "Q5_1": q5_1_values,
}
