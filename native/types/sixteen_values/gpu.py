"""IQ4_NL, IQ4_XS look their values up in `table` (int8); those of MXFP4 and NVFP4 are computed."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import (
    Decoder,
    byte_at,
    float_of_bits,
    half_at,
    halves_column,
    nibble_at,
    offsets,
    word_at,
)
from kimi_lite.native.types.sixteen_values.layout import IQ4_NL, IQ4_XS, MXFP4, NVFP4

_IQ4_NL_D, _IQ4_NL_QS = offsets(IQ4_NL, "d", "qs")
_IQ4_XS_D, _IQ4_XS_SCALES_H, _IQ4_XS_SCALES_L, _IQ4_XS_QS = offsets(IQ4_XS, "d", "scales_h", "scales_l", "qs")
_MXFP4_E, _MXFP4_QS = offsets(MXFP4, "e", "qs")
_NVFP4_D, _NVFP4_QS = offsets(NVFP4, "d", "qs")


@triton.jit
def iq4_nl_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    """`table`: the 16 values, int8."""
    code = nibble_at(base + _IQ4_NL_QS + unit, mask, PLANE)
    return tl.load(table + code, mask, other=0).to(tl.float32) * half_at(base + _IQ4_NL_D, mask)


@triton.jit
def iq4_xs_column(unit, PLANE: tl.constexpr):
    return unit // 16 * 32 + PLANE * 16 + unit % 16


@triton.jit
def iq4_xs_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    group = first // 16
    low = (byte_at(base + _IQ4_XS_SCALES_L + group // 2, mask) >> (group % 2 * 4)) & 15
    high = (word_at(base + _IQ4_XS_SCALES_H, mask) >> (2 * group)) & 3
    scale = half_at(base + _IQ4_XS_D, mask) * ((low | (high << 4)) - 32).to(tl.float32)
    code = (byte_at(base + _IQ4_XS_QS + unit, mask) >> (4 * PLANE)) & 15
    return tl.load(table + code, mask, other=0).to(tl.float32) * scale


@triton.jit
def fp4_value(code):
    """Twice the E2M1 value of a code: 0 1 2 3 4 6 8 12, then the same negative."""
    size = code & 7
    large = (2 + (size & 1)) << tl.maximum((size >> 1) - 1, 0)
    size = tl.where(size < 2, size, large).to(tl.float32)
    return tl.where(code < 8, size, -size)


@triton.jit
def mxfp4_scale(block, mask):
    """The E8M0 scale, halved, as the values are doubled: 2^(e - 128), below 2^-126 a subnormal."""
    exponent = byte_at(block + _MXFP4_E, mask)
    return float_of_bits(tl.where(exponent < 2, 0x00200000 << tl.minimum(exponent, 1), (exponent - 1) << 23))


@triton.jit
def mxfp4_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    """Blocks of 17 bytes."""
    return fp4_value(nibble_at(base + _MXFP4_QS + unit, mask, PLANE)) * mxfp4_scale(base, mask)


@triton.jit
def nvfp4_column(unit, PLANE: tl.constexpr):
    return unit // 8 * 16 + unit % 8 + 8 * PLANE


@triton.jit
def nvfp4_scale(block, part, mask):
    """One of four UE4M3 scales a block, halved too: (1 + m / 8) 2^(e - 8), or m 2^-10 where e is 0; 0x7f is no number:
    zero."""
    code = byte_at(block + _NVFP4_D + part, mask)
    exponent, mantissa = (code >> 3) & 15, (code & 7).to(tl.float32)
    normal = (1.0 + mantissa * 0.125) * float_of_bits((exponent + 119) << 23)
    scale = tl.where(exponent == 0, mantissa * 0.0009765625, normal)
    return tl.where((code == 0) | (code == 0x7F), 0.0, scale)


@triton.jit
def nvfp4_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    return fp4_value(nibble_at(base + _NVFP4_QS + unit, mask, PLANE)) * nvfp4_scale(base, first // 8, mask)


DECODERS = {
    "IQ4_NL": Decoder(iq4_nl_decode, halves_column, 16, 2, 2, "IQ4"),
    "IQ4_XS": Decoder(iq4_xs_decode, iq4_xs_column, 128, 2, 4, "IQ4"),
    "MXFP4": Decoder(mxfp4_decode, halves_column, 16, 2, 1),
    "NVFP4": Decoder(nvfp4_decode, nvfp4_column, 32, 2, 4),
}
