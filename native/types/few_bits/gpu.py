"""Q1_0, Q2_0 and LITE2_128: arithmetic only."""

import triton
import triton.language as tl

from kimi_lite.native.types.few_bits.layout import LITE2_128, Q1_0, Q2_0
from kimi_lite.native.types.gpu_parts import (
    Decoder,
    byte_at,
    eight_column,
    float_of_bits,
    four_column,
    half_at,
    offsets,
)

_Q1_0_D, _Q1_0_QS = offsets(Q1_0, "d", "qs")
_Q2_0_D, _Q2_0_QS = offsets(Q2_0, "d", "qs")
_LITE2_D, _LITE2_QS = offsets(LITE2_128, "d", "qs")


@triton.jit
def q1_0_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    """d where the bit is set, -d where it is not."""
    bit = (byte_at(base + _Q1_0_QS + unit, mask) >> PLANE) & 1
    return float_of_bits(half_at(base + _Q1_0_D, mask).to(tl.int32, bitcast=True) ^ ((1 - bit) << 31))


@triton.jit
def q2_0_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = (byte_at(base + _Q2_0_QS + unit, mask) >> (2 * PLANE)) & 3
    return (code - 1).to(tl.float32) * half_at(base + _Q2_0_D, mask)


@triton.jit
def lite2_128_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = (byte_at(base + _LITE2_QS + unit, mask) >> (2 * PLANE)) & 3
    return (code - 1).to(tl.float32) * half_at(base + _LITE2_D, mask)


DECODERS = {
    "Q1_0": Decoder(q1_0_decode, eight_column, 16, 8, 1),
    "Q2_0": Decoder(q2_0_decode, four_column, 16, 4, 1),
    "LITE2_128": Decoder(lite2_128_decode, four_column, 32, 4, 1),
}
