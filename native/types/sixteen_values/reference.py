"""The decode formulas, as ggml has them (ggml-quants.c, dequantize_row_*)."""

import numpy as np

from kimi_lite.native.types.reference_parts import bits, column, flat, nibbles
from kimi_lite.native.types.sixteen_values.layout import FLOAT4_VALUES, IQ4_VALUES

_IQ4, _FP4 = np.array(IQ4_VALUES, np.float32), np.array(FLOAT4_VALUES, np.float32)


def _mxfp4(b):
    exponent = b["e"].astype(np.float64) - 128  # E8M0, halved because the table is doubled
    return _FP4[nibbles(b["qs"])] * np.exp2(exponent)[:, None]


def _nvfp4(b):
    d = b["d"].astype(np.int32)  # (B, 4) UE4M3, halved because the table is doubled
    exponent, mantissa = (d >> 3) & 15, d & 7
    scale = np.where(exponent == 0, mantissa * 2.0**-10, (1 + mantissa / 8) * np.exp2(exponent - 8.0))
    scale[(d == 0) | (d == 0x7F)] = 0
    codes = nibbles(b["qs"].reshape(-1, 8)).reshape(len(b), 4, 16)
    return flat(_FP4[codes] * scale[:, :, None])


def _iq4_xs(b):
    low = flat(bits(b["scales_l"], [0, 4], 15).transpose(0, 2, 1)).astype(np.int32)  # (B, 8)
    high = (b["scales_h"][:, None].astype(np.int32) >> (2 * np.arange(8))) & 3
    codes = nibbles(b["qs"].reshape(-1, 16)).reshape(len(b), 8, 32)
    return flat(_IQ4[codes] * (column(b["d"]) * ((low | (high << 4)) - 32))[..., None])


DECODERS = {
    "IQ4_NL": lambda b: _IQ4[nibbles(b["qs"])] * column(b["d"]),
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
