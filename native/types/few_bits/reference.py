"""The decode formulas, as ggml has them (ggml-quants.c, dequantize_row_*)."""

import numpy as np

from kimi_lite.native.types.reference_parts import bits, column, flat


def _q1_0(b):
    ones = np.unpackbits(b["qs"], axis=1, bitorder="little")
    return np.where(ones == 1, column(b["d"]), -column(b["d"]))


def _q2_0(b):
    codes = bits(b["qs"], [0, 2, 4, 6], 3).transpose(0, 2, 1)  # four neighbours a byte
    return (flat(codes).astype(np.float32) - 1) * column(b["d"])


DECODERS = {
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "LITE2_128": _q2_0,
}
