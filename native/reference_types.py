"""The decode formula of every GGUF type in numpy: slow, obvious, and independent of the kernels and of other packages.

`dequantize` is what `native.reference` multiplies with and what tests compare the kernels' `values` and `unpack` to.
The formulas are in `native/types/*/reference.py`. Only the code books of the IQ types come from the `gguf` package.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.native.types.families import parts


def dequantize(data: np.ndarray, name: str) -> np.ndarray:
    """uint8 (rows, row_bytes) of GGUF type `name` -> float32 (rows, K)."""
    layout = BY_NAME[name]
    assert data.dtype == np.uint8 and data.ndim == 2, (name, data.shape)
    blocks = layout.blocks(np.ascontiguousarray(data))  # (rows, B)
    if layout.row_scale:
        blocks = _with_row_scales(layout, blocks, layout.row_scales(data))
    blocks = blocks.reshape(-1)
    values = _decoders()[name](blocks)  # (B, block_size)
    assert values.shape == (len(blocks), layout.block_size), (name, values.shape)
    return values.astype(np.float32).reshape(len(data), -1)


def _with_row_scales(layout: Layout, blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks (rows, B) with one more field, `row_scale`: that of their row (rows,)."""
    whole = np.empty(blocks.shape, np.dtype([*layout.fields, ("row_scale", layout.row_scale)]))
    for field in layout.dtype.names:
        whole[field] = blocks[field]
    whole["row_scale"] = scales[:, None]
    return whole


@cache
def _decoders() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    return {name: decode for part in parts("reference") for name, decode in part.DECODERS.items()}
