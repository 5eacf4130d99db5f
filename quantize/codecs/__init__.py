"""Encoders: float32 rows to the bytes of a GGUF type. One small file for each family of types; ggml's own C encoders, from
the `ggml` extra, serve the types that have no file here yet.

Called by `quantize.writer` from several threads at once, so encoders keep no state.
"""

import numpy as np

from kimi_lite.errors import KimiLiteError
from native.layouts import BY_NAME, Layout
from quantize.codecs import floats, ggml, q8_0

OWN_ENCODERS = {"F32": floats.encode_f32, "F16": floats.encode_f16, "BF16": floats.encode_bf16, "Q8_0": q8_0.encode}


def encode(layout: Layout, rows: np.ndarray) -> np.ndarray:
    """Float32 rows (R, n) to uint8 rows (R, row_bytes); n is a multiple of the block. Raises KimiLiteError where the type
    cannot hold a value: not finite, or beyond the largest scale."""
    assert rows.dtype == np.float32, rows.dtype
    assert rows.ndim == 2, rows.shape
    assert rows.shape[1] % layout.block_size == 0, (layout.name, rows.shape)
    encoder = OWN_ENCODERS.get(layout.name)
    encoded = encoder(rows) if encoder else ggml.encode(layout, rows)
    assert encoded.shape == (len(rows), layout.row_bytes(rows.shape[1])), (layout.name, rows.shape, encoded.shape)
    return encoded


def find_layout(type_name: str) -> Layout:
    """The layout of a type's name, in any case, after checking that this machine can encode it."""
    layout = BY_NAME.get(type_name.upper())
    if layout is None:
        raise KimiLiteError(f"There is no type {type_name!r}.", f"Choose one of {', '.join(sorted(BY_NAME))}.")
    if layout.name not in OWN_ENCODERS:
        ggml.check(layout)
    return layout
