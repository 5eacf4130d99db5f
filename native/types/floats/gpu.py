"""F32, F16, BF16: `base` points to elements of the type itself, so that neighbours are loaded together."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import (
    Decoder,
)


@triton.jit
def float_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    return tl.load(base + unit, mask, other=0.0).to(tl.float32)


@triton.jit
def float_column(unit, PLANE: tl.constexpr):
    return unit


DECODERS = {name: Decoder(float_decode, float_column, 1, 1, 1) for name in ("F32", "F16", "BF16")}
