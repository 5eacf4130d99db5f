"""TQ2_0 (blocks of 256), Q2_0 (64) and LITE2_128 (128): two bits a weight that decode to -1, 0, 1 and 2 times one
float16 scale.

Stock encoders never write the fourth code. Ours does, with the sign of the scale chosen for each block, so that the
long side of the values is on the longer side of the codes: relative errors of 0.371 and 0.352 on Gaussian weights where
the stock ones have 0.81 and 0.72. Every known decoder reads the fourth code and a negative scale.
"""

import numpy as np
from numba import types

from kimi_lite.native.cpu.compiler import function
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.quantize.codecs.fit import fit_scales, spread_importance

_SIGNATURE = types.void(
    types.Array(types.float32, 2, "C", readonly=True),  # blocks (B, 256, 128 or 64)
    types.Array(types.float32, 1, "C", readonly=True),  # scales (B,)
    types.Array(types.uint8, 2, "C"),  # codes 0..3, as many
)


def encode(layout: Layout, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """(R, n) float32 and the importance of the n columns to (R, row_bytes) uint8. Raises KimiLiteError."""
    codes, scales = _fit_codes(layout, rows, importance)
    if layout.name == "TQ2_0":
        return pack_tq2_0(codes, scales, len(rows))
    return pack_neighbours(layout, codes, scales, len(rows))


def pack_tq2_0(codes: np.ndarray, scales: np.ndarray, num_rows: int) -> np.ndarray:
    """Codes 0..3 (B, 256) uint8 and scales (B,), both of whole rows, to uint8 (num_rows, row_bytes)."""
    planes = codes.reshape(-1, 2, 4, 32)  # byte j of a half: weights j, j + 32, j + 64 and j + 96
    quads = planes[:, :, 0] | planes[:, :, 1] << 2 | planes[:, :, 2] << 4 | planes[:, :, 3] << 6
    return _join(BY_NAME["TQ2_0"], quads.reshape(len(codes), 64), scales, num_rows)


def pack_q2_0(codes: np.ndarray, scales: np.ndarray, num_rows: int) -> np.ndarray:
    """As `pack_neighbours`, of Q2_0."""
    return pack_neighbours(BY_NAME["Q2_0"], codes, scales, num_rows)


def pack_neighbours(layout: Layout, codes: np.ndarray, scales: np.ndarray, num_rows: int) -> np.ndarray:
    """Codes 0..3 (B, block) uint8 and scales (B,), both of whole rows, to uint8 (num_rows, row_bytes) of Q2_0 or
    LITE2_128: four codes to a byte."""
    words = codes.view("<u4")  # (B, block / 4): four codes each, a byte apart
    quads = (words | words >> 6 | words >> 12 | words >> 18).astype(np.uint8)
    return _join(layout, quads, scales, num_rows)


def _fit_codes(layout: Layout, rows: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0..3 (B, block) uint8 and scales (B,)."""
    blocks = np.ascontiguousarray(rows).reshape(-1, layout.block_size)
    scales = fit_scales(blocks, spread_importance(importance, rows.shape[1], layout.block_size), max_code=2)
    codes = np.empty(blocks.shape, np.uint8)
    _choose(blocks, scales, codes)
    return codes, scales


def _join(layout: Layout, quads: np.ndarray, scales: np.ndarray, num_rows: int) -> np.ndarray:
    packed = np.empty(len(quads), layout.dtype)
    packed["qs"], packed["d"] = quads, scales
    return packed.view(np.uint8).reshape(num_rows, -1)


@function(_SIGNATURE, error_model="numpy")
def _choose(blocks, scales, codes):
    """The nearest of -1, 0, 1, 2 times the scale, plus 1."""
    for b in range(len(blocks)):
        half, more = abs(scales[b]) * np.float32(0.5), abs(scales[b]) * np.float32(1.5)
        sign = np.float32(1) if scales[b] >= 0 else np.float32(-1)
        for i in range(blocks.shape[1]):
            x = blocks[b, i] * sign
            codes[b, i] = np.uint8(1) + np.uint8(x > half) + np.uint8(x > more) - np.uint8(x < -half)
