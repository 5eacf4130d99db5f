"""ggml's own encoders, called in the shared library that the `ggml` extra (llama-cpp-python) installs.

They stand in for the types this package does not encode itself, and are the reference its own encoders are tested
against. Only `libggml-base` is opened: no model code, no import of `llama_cpp`. ctypes gives up Python's lock during a
call, so threads encode at the same time. C signature: ggml.h `ggml_quantize_chunk`.
"""

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import Layout

_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")


def encode(layout: Layout, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Float32 rows (R, n) to uint8 rows (R, row_bytes), as `llama-quantize` would with this row of its importance
    matrix."""
    check(layout, importance is not None)
    if not np.isfinite(rows).all():
        raise KimiLiteError(
            f"A weight is not finite and cannot be stored as {layout.name}.", "Convert to F32 and look at it."
        )
    source = np.ascontiguousarray(rows, dtype=np.float32)
    encoded = np.empty((len(rows), layout.row_bytes(rows.shape[1])), np.uint8)
    column_importance = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    assert column_importance is None or column_importance.shape == rows.shape[1:], (column_importance.shape, rows.shape)
    weights = None if column_importance is None else column_importance.ctypes.data
    num_bytes = _library().ggml_quantize_chunk(
        layout.ggml_id, source.ctypes.data, encoded.ctypes.data, 0, *rows.shape, weights
    )
    assert num_bytes == encoded.nbytes, (layout.name, rows.shape, num_bytes)
    return encoded


def check(layout: Layout, has_importance: bool) -> None:
    """Raises KimiLiteError where the library is missing or would end the process: some types need an importance
    matrix."""
    if layout.block_size == 1 or layout.name in ("Q2_0", "LITE2_128"):  # the packaged ggml is older; this one is ours
        raise KimiLiteError(f"ggml does not encode {layout.name}.", "Choose another type.")
    if not has_importance and _library().ggml_quantize_requires_imatrix(layout.ggml_id):
        raise KimiLiteError(
            f"{layout.name} needs an importance matrix, and none is used here.",
            "Name one with --imatrix, or choose TQ1_0, TQ2_0 or Q2_K, which work without.",
        )


@cache
def _library() -> ctypes.CDLL:
    package = importlib.util.find_spec("llama_cpp")  # finds the folder and runs nothing
    folders = [Path(place) / "lib" for place in package.submodule_search_locations] if package else []
    found = [file for folder in folders for file in folder.glob(f"*ggml-base.{_SUFFIX}")]
    if not found:
        raise KimiLiteError(
            "Encoding this type needs ggml's library, which is not installed.",
            'Install it with `pip install "kimi-lite[ggml]"`, or choose Q8_0, BF16, F16 or F32, which need nothing.',
        )
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # source, float32 rows
        ctypes.c_void_p,  # destination
        ctypes.c_int64,  # first weight
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # weights in a row
        ctypes.c_void_p,  # importance of each column, or NULL
    ]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    return library
