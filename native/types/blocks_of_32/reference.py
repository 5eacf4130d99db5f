"""The decode formulas, as ggml has them (ggml-quants.c, dequantize_row_*)."""

import numpy as np

from kimi_lite.native.types.reference_parts import column, nibbles


def _fifth_bit(b):
    """(B, 32) fifth bits of Q5_0 and Q5_1, in place."""
    return ((b["qh"][:, None] >> np.arange(32, dtype=np.uint32)) & 1).astype(np.uint8) << 4


DECODERS = {
    "Q4_0": lambda b: (nibbles(b["qs"]).astype(np.float32) - 8) * column(b["d"]),
    "Q4_1": lambda b: nibbles(b["qs"]) * column(b["d"]) + column(b["m"]),
    "Q5_0": lambda b: ((nibbles(b["qs"]) | _fifth_bit(b)).astype(np.float32) - 16) * column(b["d"]),
    "Q5_1": lambda b: (nibbles(b["qs"]) | _fifth_bit(b)) * column(b["d"]) + column(b["m"]),
    "Q8_0": lambda b: b["qs"] * column(b["d"]),
}
