"""Random blocks; the FP4 types have scales of one byte."""

import numpy as np

from kimi_lite.native.types.random_blocks import ByteScales, Maker

_E8M0 = np.exp2(np.arange(255) - 128.0)  # halved, as the values are doubled; 255 is NaN
_E8M0_REGIMES = {
    "normal": (118, 134),
    "negative": (118, 134),
    "denormal": (0, 3),
    "huge": (170, 180),
    "zero": (100, 101),
}
_UE4M3_REGIMES = {"normal": (1, 0x7F), "negative": (1, 0x80), "denormal": (1, 8), "huge": (0x78, 0x7F), "zero": (0, 1)}


def _half_ue4m3() -> np.ndarray:
    """The scales of codes 0 to 126, halved, as the values are doubled; 127 is NaN."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)) / 2


MAKERS = {
    "IQ4_NL": Maker(is_lopsided=True),
    "IQ4_XS": Maker(),
    "MXFP4": ByteScales("e", _E8M0, _E8M0_REGIMES),
    "NVFP4": ByteScales("d", _half_ue4m3(), _UE4M3_REGIMES),
}
