"""Exact products of Q1_0, Q2_0 and LITE2_128 (`native.types.gpu_words`)."""

import triton
import triton.language as tl

from kimi_lite.native.types.few_bits.layout import LITE2_128, Q1_0, Q2_0
from kimi_lite.native.types.gpu_parts import byte_at, offsets
from kimi_lite.native.types.gpu_words import bits_to_bytes, d_first, dot4, first_values, span_values, word2

[_Q1_0_QS], [_Q2_0_QS], [_LITE2_QS] = offsets(Q1_0, "qs"), offsets(Q2_0, "qs"), offsets(LITE2_128, "qs")
_Q1_0_BYTES, _Q2_0_BYTES = tl.constexpr(Q1_0.block_bytes), tl.constexpr(Q2_0.block_bytes)
_LITE2_BYTES = tl.constexpr(LITE2_128.block_bytes)


@triton.jit
def q1_0_codes(block, part, lane, mask, table, BIAS: tl.constexpr):
    """0 and 2."""
    return bits_to_bytes((word2(block + _Q1_0_QS + 4 * part, mask) >> (4 * lane)) & 15) << 1


@triton.jit
def q1_0_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return span_values(
        base, x, steps, sums, limit, lane, table, BIAS, HALF, q1_0_codes, d_first, 1, 128, _Q1_0_BYTES
    )  # fmt: skip


@triton.jit
def q2_0_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    """Lane l of 16 has every fourth of the 16 weights from 16 (l / 4) of a chunk on: one field of four bytes."""
    value = first_values(base, steps, sums, limit, lane, HALF, d_first, 1, 64, _Q2_0_BYTES)
    field = lane % 4
    for chunk in tl.static_range(4):
        block, mask = base + chunk * _Q2_0_BYTES, limit > 2 * chunk + HALF
        codes = (word2(block + _Q2_0_QS + 4 * (2 * HALF + lane // 4), mask) >> (2 * field)) & 0x03030303
        packed = tl.zeros_like(lane)
        for place in tl.static_range(4):
            word = tl.load(x + 16 * chunk + lane // 4 * 4 + place, mask, other=0)
            packed |= ((word >> (8 * field)) & 255) << (8 * place)
        scale = d_first(block, mask) * tl.load(steps + 2 * chunk + HALF, mask, other=0.0)
        value = tl.fma(dot4(codes, packed).to(tl.float32), scale + tl.zeros_like(value), value)
    return value


@triton.jit
def lite2_128_codes(block, part, lane, mask, table, BIAS: tl.constexpr):
    """A byte has the four codes of a lane."""
    four = byte_at(block + _LITE2_QS + 8 * part + lane, mask)
    return (four | (four << 6) | (four << 12) | (four << 18)) & 0x03030303


@triton.jit
def lite2_128_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return span_values(
        base, x, steps, sums, limit, lane, table, BIAS, HALF, lite2_128_codes, d_first, 1, 128, _LITE2_BYTES
    )  # fmt: skip


VALUES = {"Q1_0": q1_0_values, "Q2_0": q2_0_values, "LITE2_128": lite2_128_values}
