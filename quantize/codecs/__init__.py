"""Encoders: float32 rows to the bytes of a GGUF type. One small file for each family of types; ggml's own C encoders,
from the `ggml` extra, serve the K and IQ types and others that have no file here.

Which file writes a type is in its row (`Layout.encoder`); the file has `encode(layout, rows, importance)`.
Importance changes nothing in exact types; our own need no other package.
"""

from importlib import import_module

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.quantize.codecs import ggml
from kimi_lite.quantize.codecs.importance import fill_unknown

_EXACT_ENCODERS = ("floats", "q8_0")
EXACT_TYPES = frozenset(name for name, layout in BY_NAME.items() if layout.encoder in _EXACT_ENCODERS)


def encode(layout: Layout, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Float32 rows (R, n) to uint8 rows (R, row_bytes); n is a multiple of the block. `importance` (n,) float32 weighs
    the squared errors of the columns; what is not above zero is unknown. Raises KimiLiteError where the type cannot
    hold a value: not finite, or too large a scale."""
    assert rows.dtype == np.float32, rows.dtype
    assert rows.ndim == 2, rows.shape
    assert rows.shape[1] % layout.block_size == 0, (layout.name, rows.shape)
    importance = None if importance is None else fill_unknown(importance)
    if layout.encoder == "none":
        raise KimiLiteError(f"{layout.name} can be read and not written.", "Choose another type.")
    encoded = import_module(f"{__name__}.{layout.encoder}").encode(layout, rows, importance)
    assert encoded.shape == (len(rows), layout.row_bytes(rows.shape[1])), (layout.name, rows.shape, encoded.shape)
    return encoded


def find_layout(type_name: str, has_importance: bool = False) -> Layout:
    """The layout of a type's name, in any case, after checking that this machine can encode it."""
    layout = BY_NAME.get(type_name.upper())
    if layout is None:
        raise KimiLiteError(f"There is no type {type_name!r}.", f"Choose one of {', '.join(sorted(BY_NAME))}.")
    if layout.encoder == "none":
        raise KimiLiteError(f"{layout.name} can be read and not written.", "Choose another type.")
    if layout.encoder == "ggml":
        ggml.check(layout, has_importance)
    return layout
