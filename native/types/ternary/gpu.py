"""TQ1_0 and TQ2_0: arithmetic only."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import (
    Decoder,
    byte_at,
    half_at,
    offsets,
    quarters_column,
)
from kimi_lite.native.types.ternary.layout import TQ1_0, TQ2_0

_TQ1_0_QS, _TQ1_0_D = offsets(TQ1_0, "qs", "d")
_TQ2_0_QS, _TQ2_0_D = offsets(TQ2_0, "qs", "d")


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
    digit = ((((byte_at(base + _TQ1_0_QS + unit, mask) * POWER) & 255) * 3) >> 8) - 1
    return digit.to(tl.float32) * half_at(base + _TQ1_0_D, mask)


@triton.jit
def tq2_0_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = (byte_at(base + _TQ2_0_QS + unit, mask) >> (2 * PLANE)) & 3
    return (code - 1).to(tl.float32) * half_at(base + _TQ2_0_D, mask)


DECODERS = {
    "TQ1_0": Decoder(tq1_0_decode, tq1_0_column, 52, 5, 2, is_padded=True),
    "TQ2_0": Decoder(tq2_0_decode, quarters_column, 64, 4, 2),
}
