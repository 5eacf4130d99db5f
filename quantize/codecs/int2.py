"""The 2-bit GSQ release's experts to Q2_0 without loss: the same codes with the scale's sign turned.

GSQ's codes stand for -2, -1, 0, 1 times a scale for 128 columns, Q2_0's for -1, 0, 1, 2 times one for 64: the negative
scale, written twice, and the codes counted from the other end.
"""

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.codecs.two_bits import pack_q2_0
from kimi_lite.quantize.source.stored import Int2Weight, StoredWeight

_BLOCK = BY_NAME["Q2_0"].block_size


def can_repack(weight: StoredWeight) -> bool:
    """Whether `weight` has 2-bit codes in groups of whole blocks."""
    return isinstance(weight, Int2Weight) and weight.group % _BLOCK == 0


def repack_rows(weight: Int2Weight, start: int, stop: int) -> np.ndarray:
    """Rows start..stop as Q2_0 blocks, uint8 (rows, row_bytes). A bfloat16 scale fits a float16 exactly down to
    2^-17."""
    codes = 3 - weight.read_codes(start, stop).reshape(-1, _BLOCK)  # (B, 64)
    scales = -np.repeat(weight.read_scales(start, stop).reshape(-1), weight.group // _BLOCK)  # (B,)
    if not (np.abs(scales) < 65520).all():
        raise KimiLiteError("A scale of the 2-bit weights does not fit Q2_0, whose largest is 65504.", "Choose BF16.")
    return pack_q2_0(codes, scales, stop - start)
