"""Blocks of 32 on the GPU: a byte holds two nibbles, 16 weights apart."""

import triton
import triton.language as tl

from kimi_lite.native.types.blocks_of_32.layout import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from kimi_lite.native.types.gpu_parts import (
    Decoder,
    byte_at,
    half_at,
    halves_column,
    nibble_at,
    offsets,
    signed_byte_at,
)

_Q8_0_D, _Q8_0_QS = offsets(Q8_0, "d", "qs")
_Q4_0_D, _Q4_0_QS = offsets(Q4_0, "d", "qs")
_Q4_1_D, _Q4_1_M, _Q4_1_QS = offsets(Q4_1, "d", "m", "qs")
_Q5_0_D, _Q5_0_QH, _Q5_0_QS = offsets(Q5_0, "d", "qh", "qs")
_Q5_1_D, _Q5_1_M, _Q5_1_QH, _Q5_1_QS = offsets(Q5_1, "d", "m", "qh", "qs")


@triton.jit
def same_column(unit, PLANE: tl.constexpr):
    return unit


@triton.jit
def q4_0_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    return (nibble_at(base + _Q4_0_QS + unit, mask, PLANE) - 8).to(tl.float32) * half_at(base + _Q4_0_D, mask)


@triton.jit
def q4_1_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = nibble_at(base + _Q4_1_QS + unit, mask, PLANE).to(tl.float32)
    return code * half_at(base + _Q4_1_D, mask) + half_at(base + _Q4_1_M, mask)


@triton.jit
def fifth_bit(address, first, unit, mask, PLANE: tl.constexpr):
    """Bit `unit + 16 * PLANE` of the 32 at `address`, in its place above a nibble."""
    bits = byte_at(address + 2 * PLANE + first // 8, mask)
    return ((bits >> (unit % 8)) & 1) << 4


@triton.jit
def q5_0_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = nibble_at(base + _Q5_0_QS + unit, mask, PLANE) | fifth_bit(base + _Q5_0_QH, first, unit, mask, PLANE)
    return (code - 16).to(tl.float32) * half_at(base + _Q5_0_D, mask)


@triton.jit
def q5_1_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = nibble_at(base + _Q5_1_QS + unit, mask, PLANE) | fifth_bit(base + _Q5_1_QH, first, unit, mask, PLANE)
    return code.to(tl.float32) * half_at(base + _Q5_1_D, mask) + half_at(base + _Q5_1_M, mask)


@triton.jit
def q8_0_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    return signed_byte_at(base + _Q8_0_QS + unit, mask).to(tl.float32) * half_at(base + _Q8_0_D, mask)


DECODERS = {
    "Q4_0": Decoder(q4_0_decode, halves_column, 16, 2, 2),
    "Q4_1": Decoder(q4_1_decode, halves_column, 16, 2, 4),
    "Q5_0": Decoder(q5_0_decode, halves_column, 16, 2, 2),
    "Q5_1": Decoder(q5_1_decode, halves_column, 16, 2, 4),
    "Q8_0": Decoder(q8_0_decode, same_column, 32, 1, 2),
}
