"""Q8_0: blocks of 32 weights as int8 times one float16 scale. The same bytes as llama.cpp's reference quantizer."""

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import Layout


def encode(layout: Layout, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """(R, n) float32 to (R, n / 32 * 34) uint8: scale = max |w| / 127, codes rounded half away from zero, whatever the
    importance. Raises KimiLiteError."""
    blocks = rows.reshape(-1, layout.block_size)  # (B, 32)
    largest = np.abs(blocks).max(axis=1)  # (B,), NaN where a weight is NaN
    scale = largest / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
        stored_scale = scale.astype("<f2")
    if not np.isfinite(stored_scale).all():
        raise KimiLiteError(
            f"A weight of {largest.max():.6g} does not fit Q8_0, whose largest is {127 * 65504}.", "Choose BF16 or F32."
        )
    inverse[~np.isfinite(inverse)] = 0  # a block of zeros, or of weights too small for the scale
    packed = np.empty(len(blocks), layout.dtype)
    packed["d"] = stored_scale
    packed["qs"] = _round_half_away(blocks * inverse[:, None])
    return packed.view(np.uint8).reshape(len(rows), layout.row_bytes(rows.shape[1]))


def _round_half_away(values: np.ndarray) -> np.ndarray:
    """C's `roundf`, in place: whole part plus twice the fraction's whole part, each step exact."""
    whole = np.trunc(values)
    values -= whole
    values += values
    whole += np.trunc(values, out=values)
    return whole
