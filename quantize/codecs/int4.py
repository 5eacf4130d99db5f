"""Kimi's INT4 experts to Q4_0 without loss: the same codes and scales in another order.

Q4_0 also holds a 4-bit code with offset 8 and one scale for 32 weights. Going through float32 and a general Q4_0
encoder would round onto another grid (it divides by 8 where Kimi's codes were made by 7) and cost 8 % relative error.
"""

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.source.stored import Int4Weight, StoredWeight

_LAYOUT = BY_NAME["Q4_0"]


def can_repack(weight: StoredWeight) -> bool:
    """Whether `weight` is INT4 in Q4_0's groups."""
    return isinstance(weight, Int4Weight) and weight.group == _LAYOUT.block_size


def repack_rows(weight: Int4Weight, start: int, stop: int) -> np.ndarray:
    """Rows start..stop as Q4_0 blocks, uint8 (rows, row_bytes). A bfloat16 scale fits a float16 exactly down to
    2^-17."""
    codes = weight.read_codes(start, stop).reshape(stop - start, -1, 2, _LAYOUT.block_size // 2)  # (R, B, halves, 16)
    with np.errstate(over="ignore"):
        scales = weight.read_scales(start, stop).astype("<f2")  # (R, B)
    if not np.isfinite(scales).all():
        raise KimiLiteError("A scale of the INT4 weights does not fit Q4_0, whose largest is 65504.", "Choose BF16.")
    packed = np.empty(scales.shape, _LAYOUT.dtype)
    packed["d"] = scales
    packed["qs"] = codes[:, :, 0] | codes[:, :, 1] << 4  # byte j: weight j low, weight j + 16 high
    return packed.view(np.uint8)
