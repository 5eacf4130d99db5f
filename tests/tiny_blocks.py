"""Float rows to GGUF blocks of any type, for tests: the `gguf` package where it can encode, random blocks where it
cannot.

A random block is as good as an encoded one for testing a reader: both paths decode the same bytes. Only the standard
deviation of the decoded weights is kept, so that a model made of them stays numerically sane. Used by `tests.tiny`.
"""

import gguf
import numpy as np

from kimi_lite.native.layouts import Layout
from kimi_lite.native.types.random_blocks import random_rows

_ENCODABLE = frozenset({"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"})


def encode_rows(weights: np.ndarray, layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """float32 (..., inputs) -> uint8 (..., row_bytes). Types that `gguf` cannot encode get random weights, equally
    spread."""
    assert weights.shape[-1] % layout.block_size == 0, (layout.name, weights.shape)
    if layout.name in _ENCODABLE:
        encoded = gguf.quants.quantize(np.ascontiguousarray(weights), gguf.GGMLQuantizationType(layout.ggml_id))
        return np.ascontiguousarray(encoded).view(np.uint8)
    row_weights = weights.shape[-1]
    rows = random_rows(layout, weights.size // row_weights, row_weights, float(weights.std()), rng)
    return rows.reshape(*weights.shape[:-1], layout.row_bytes(row_weights))
