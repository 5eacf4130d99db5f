"""The decode formulas, as ggml has them (ggml-quants.c, dequantize_row_*)."""

import numpy as np

from kimi_lite.native.types.reference_parts import column, flat, two_bits


def _trits(packed: np.ndarray, count: int) -> np.ndarray:
    """(B, n) bytes -> (B, count * n): the first digit of every byte, then the second, ..."""
    powers = 3 ** np.arange(count, dtype=np.uint16)
    remainders = packed[:, None, :] * powers[None, :, None] & 255
    return flat(remainders * 3 >> 8)


def _tq1_0(b):
    codes = np.concatenate([_trits(b["qs"][:, :32], 5), _trits(b["qs"][:, 32:], 5), _trits(b["qh"], 4)], axis=1)
    return (codes.astype(np.float32) - 1) * column(b["d"])


DECODERS = {
    "TQ1_0": _tq1_0,
    "TQ2_0": lambda b: (two_bits(b["qs"]).astype(np.float32) - 1) * column(b["d"]),
}
