"""F32, F16 and BF16: the types without blocks."""

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import Layout

_F16_MAX = 65504.0


def encode(layout: Layout, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """(R, n) float32 to (R, row_bytes) uint8; importance changes nothing. Raises KimiLiteError."""
    return {"F32": encode_f32, "F16": encode_f16, "BF16": encode_bf16}[layout.name](rows)


def encode_f32(rows: np.ndarray) -> np.ndarray:
    """(R, n) float32 to (R, 4 n) uint8: the same bits."""
    return np.ascontiguousarray(rows, dtype="<f4").view(np.uint8)


def encode_f16(rows: np.ndarray) -> np.ndarray:
    """(R, n) float32 to (R, 2 n) uint8, rounded to nearest even; a weight beyond F16 is refused, not turned into
    infinity."""
    with np.errstate(over="ignore"):
        halves = rows.astype("<f2")
    if not np.isfinite(halves).all():
        largest = np.abs(rows).max()
        raise KimiLiteError(
            f"A weight of {largest:.6g} does not fit F16, whose largest is {_F16_MAX:.0f}.", "Choose BF16 or Q8_0."
        )
    return halves.view(np.uint8)


def encode_bf16(rows: np.ndarray) -> np.ndarray:
    """(R, n) float32 to (R, 2 n) uint8, rounded to nearest even. Exact when the weights came from bfloat16.

    Adding 0x7FFF plus the lowest kept bit carries exactly where round-half-to-even goes up. A NaN keeps its top bits
    and becomes quiet, so that no carry turns it into infinity.
    """
    bits = np.ascontiguousarray(rows, dtype="<f4").view("<u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 64, rounded).astype("<u2").view(np.uint8)
