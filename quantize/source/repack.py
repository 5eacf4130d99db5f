"""A checkpoint's codes in a GGUF type that can hold these very codes: repacked, so nothing is lost.

Kimi's INT4 experts become Q4_0: a 4-bit code with offset 8 and one scale for 32 weights, in another order. Going
through float32 and a general Q4_0 encoder would round onto another grid (it divides by 8 where Kimi's codes were made
by 7) and cost 8 % relative error. The 2-bit GSQ release becomes Q2_0: GSQ's codes stand for -2, -1, 0, 1 times a scale
for 128 columns, Q2_0's for -1, 0, 1, 2 times one for 64: the negative scale, written twice, and the codes counted from
the other end.
"""

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.codecs.two_bits import pack_q2_0
from kimi_lite.quantize.source.stored import Int2Weight, Int4Weight, StoredWeight

_Q2_0, _Q4_0 = BY_NAME["Q2_0"], BY_NAME["Q4_0"]


def kept_type(weight: StoredWeight) -> str | None:
    """The GGUF type that holds the weight's codes as they are; None where there is none."""
    if isinstance(weight, Int4Weight) and weight.group == _Q4_0.block_size:
        return _Q4_0.name
    if isinstance(weight, Int2Weight) and weight.group % _Q2_0.block_size == 0:
        return _Q2_0.name
    return None


def repack_rows(weight: Int2Weight | Int4Weight, start: int, stop: int) -> np.ndarray:
    """Rows start..stop as blocks of `kept_type(weight)`, uint8 (rows, row_bytes). A bfloat16 scale fits a float16
    exactly down to 2^-17; raises KimiLiteError where one is too large."""
    return _q4_0_rows(weight, start, stop) if isinstance(weight, Int4Weight) else _q2_0_rows(weight, start, stop)


def _q4_0_rows(weight: Int4Weight, start: int, stop: int) -> np.ndarray:
    codes = weight.read_codes(start, stop).reshape(stop - start, -1, 2, _Q4_0.block_size // 2)  # (R, B, halves, 16)
    with np.errstate(over="ignore"):
        scales = weight.read_scales(start, stop).astype("<f2")  # (R, B)
    if not np.isfinite(scales).all():
        raise KimiLiteError("A scale of the INT4 weights does not fit Q4_0, whose largest is 65504.", "Choose BF16.")
    packed = np.empty(scales.shape, _Q4_0.dtype)
    packed["d"] = scales
    packed["qs"] = codes[:, :, 0] | codes[:, :, 1] << 4  # byte j: weight j low, weight j + 16 high
    return packed.view(np.uint8)


def _q2_0_rows(weight: Int2Weight, start: int, stop: int) -> np.ndarray:
    codes = 3 - weight.read_codes(start, stop).reshape(-1, _Q2_0.block_size)  # (B, 64)
    scales = -np.repeat(weight.read_scales(start, stop).reshape(-1), weight.group // _Q2_0.block_size)  # (B,)
    if not (np.abs(scales) < 65520).all():
        raise KimiLiteError("A scale of the 2-bit weights does not fit Q2_0, whose largest is 65504.", "Choose BF16.")
    return pack_q2_0(codes, scales, stop - start)
