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
    blocks = with_row_scales(layout, np.ascontiguousarray(data)).reshape(-1)
    values = _decoders()[name](blocks)  # (B, block_size)
    assert values.shape == (len(blocks), layout.block_size), (name, values.shape)
    return values.astype(np.float32).reshape(len(data), -1)


def with_row_scales(layout: Layout, data: np.ndarray) -> np.ndarray:
    """uint8 (rows, row_bytes) -> blocks (rows, B); where rows have a scale, with one more field for it, `row_scale`."""
    blocks = layout.blocks(data)
    if not layout.row_scale:
        return blocks
    whole = np.empty(blocks.shape, np.dtype([*layout.fields, ("row_scale", layout.row_scale)]))
    for field in layout.dtype.names:
        whole[field] = blocks[field]
    whole["row_scale"] = layout.row_scales(data)[:, None]
    return whole


@cache
def _decoders() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    return {name: decode for part in parts("reference") for name, decode in part.DECODERS.items()}
