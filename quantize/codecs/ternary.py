"""TQ1_0: 256 codes -1, 0, 1 and one float16 scale in 54 bytes, five codes to a byte (1.6875 bits a weight).

The scale is the one of least weighted squared error (`quantize.codecs.fit`): a relative error of 0.435 on Gaussian
weights, where the stock encoder has 0.81 and IQ1_M, which is larger, 0.454.
"""

import numpy as np
from numba import njit, types

from kimi_lite.native.cpu.compiler import function
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.quantize.codecs.fit import fit_scales, spread_importance

_LAYOUT = BY_NAME["TQ1_0"]
_SIGNATURE = types.void(
    types.Array(types.float32, 2, "C", readonly=True),  # blocks (B, 256)
    types.Array(types.float32, 1, "C", readonly=True),  # scales (B,)
    types.Array(types.uint8, 2, "C"),  # out (B, 54)
)


def encode(layout: Layout, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """(R, n) float32 and the importance of the n columns to (R, n / 256 * 54) uint8. Raises KimiLiteError."""
    row, size = rows.shape[1], layout.block_size
    blocks = np.ascontiguousarray(rows).reshape(-1, size)  # (B, 256)
    scales = fit_scales(blocks, spread_importance(importance, row, size), max_code=1)
    return _pack_blocks(blocks, scales, len(rows))


def pack_tq1_0(codes: np.ndarray, scales: np.ndarray, num_rows: int) -> np.ndarray:
    """Codes 0..2 (B, 256) uint8 for -1, 0, 1 and scales (B,), both of whole rows, to uint8 (num_rows, row_bytes)."""
    packed = _pack_blocks(codes.astype(np.float32) - 1, np.ones(len(codes), np.float32), num_rows)
    packed.reshape(-1, _LAYOUT.block_bytes).view(_LAYOUT.dtype)["d"] = scales[:, None]
    return packed


def _pack_blocks(blocks: np.ndarray, scales: np.ndarray, num_rows: int) -> np.ndarray:
    packed = np.empty((len(blocks), _LAYOUT.block_bytes), np.uint8)
    _pack(blocks, scales, packed)
    packed.view(_LAYOUT.dtype)["d"] = scales[:, None]
    return packed.reshape(num_rows, -1)


@njit(error_model="numpy")
def _digit(value, threshold):
    """0, 1 or 2 for the codes -1, 0, 1."""
    return np.uint32(1) + np.uint32(value > threshold) - np.uint32(value < -threshold)


@function(_SIGNATURE, error_model="numpy")
def _pack(blocks, scales, out):
    """Digits base 3, the first one highest; a byte holds the number as a fraction of 243, so that decoding is
    multiplying. Bytes 0..31 take weights 0..159, bytes 32..47 the next 80 and bytes 48..51 the last 16, four to a
    byte."""
    for b in range(len(blocks)):
        x, threshold = blocks[b], scales[b] * np.float32(0.5)
        for first, width, start in ((0, 32, 0), (32, 16, 160)):
            for i in range(width):
                number = np.uint32(0)
                for n in range(5):
                    number = number * np.uint32(3) + _digit(x[start + n * width + i], threshold)
                out[b, first + i] = (number * np.uint32(256) + np.uint32(242)) // np.uint32(243)
        for i in range(4):
            number = np.uint32(0)
            for n in range(4):
                number = number * np.uint32(3) + _digit(x[240 + 4 * n + i], threshold)
            out[b, 48 + i] = (number * np.uint32(3 * 256) + np.uint32(242)) // np.uint32(243)
