"""A weight matrix as kernels see it: a table of its address, sizes and the kernels of its type."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numba import njit, types

from kimi_lite.native.calls import call3, call5, call7, call8
from kimi_lite.native.cpu.activations import KINDS
from kimi_lite.native.cpu.blocks import activation_kind, load16, row_scale, unpack
from kimi_lite.native.cpu.compiler import Kernel
from kimi_lite.native.cpu.dot import rows_kernel
from kimi_lite.native.cpu.panel import AHEAD, AHEAD_LINES, gemm_kernel, panel_bytes, panel_kernel
from kimi_lite.native.cpu.tile_panel import tile_gemm_kernel, tile_panel_bytes, tile_panel_kernel, uses_tiles
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.native.simd import (
    int_to_f32x16,
    load_f32,
    load_i8x16,
    load_i64,
    splat_f32x16,
    store_f32x16,
    store_i64,
    widen_i8x16,
    widen_signed_i8x16,
)

DATA, ROW_BYTES, NUM_ROWS, K, ROWS_FN, PANEL_FN, GEMM_FN, VALUES_FN, TILE_KIND = (8 * i for i in range(9))
MATRIX_BYTES = 72
VALUES_SIGNATURE = types.void(types.int64, types.int64, types.int64)  # (weights, num_weights, out)


def _float_values(name: str, weight_bytes: int):
    def values(weights, num_weights, out):
        for i in range(0, num_weights, 16):
            store_f32x16(out + 4 * i, load16(name, weights + i * weight_bytes))

    return values


def _block_values(name: str, block_size: int, block_bytes: int, group: int, is_signed: bool):
    """Codes and scales go through the VALUES_PADDING bytes behind the result, so no stack is needed."""
    header_bytes = BY_NAME[name].header_bytes

    def values(weights, num_weights, out):
        first, of_row = weights + header_bytes, row_scale(name, weights)
        stage = out + 4 * num_weights  # the caller leaves VALUES_PADDING bytes behind the result
        scales, minima = stage + 256, stage + 320
        for b in range(num_weights // block_size):
            unpack(name, first + b * block_bytes, stage, scales, minima)
            for i in range(0, block_size, 16):
                scale = splat_f32x16(load_f32(scales + 4 * (i // group)) * of_row)
                minimum = load_f32(minima + 4 * (i // group))
                codes = load_i8x16(stage + i)
                wide = widen_signed_i8x16(codes) if is_signed else widen_i8x16(codes)
                store_f32x16(out + 4 * (b * block_size + i), int_to_f32x16(wide) * scale - minimum)

    return values


def matrix_kernels(name: str) -> tuple[Kernel, ...]:
    """What a matrix of this type needs, in the order of its table: rows, panel, gemm, values."""
    tiles = uses_tiles(name)
    panel, gemm = (tile_panel_kernel, tile_gemm_kernel) if tiles else (panel_kernel, gemm_kernel)
    return rows_kernel(name), panel(name), gemm(name), values_kernel(name)


def panel_scratch_bytes(k: int) -> int:
    """Bytes of scratch that a panel of K columns takes, whatever its type and form."""
    return max(panel_bytes(k), tile_panel_bytes(k))


VALUES_PADDING = 384  # bytes that `values` may scribble on behind its result


@cache
def values_kernel(name: str):
    """The compiled `values(weights, num_weights, out)` of type `name`: a run of whole blocks as float32, from the
    beginning of a row on where the type's rows have a scale."""
    layout = BY_NAME[name]
    if layout.product == "float":
        values = _float_values(name, layout.block_bytes)
    else:
        values = _block_values(name, layout.block_size, layout.block_bytes, layout.group, layout.is_signed)
    return Kernel(values, VALUES_SIGNATURE)


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A weight matrix (rows, k) ready to be multiplied; keeps its bytes alive, or mapped."""

    data: np.ndarray  # uint8 (rows, >= row_bytes), read only
    layout: Layout
    k: int
    table: np.ndarray  # int64 (9,), for kernels

    @classmethod
    def of(cls, data: np.ndarray, layout_name: str, k: int) -> "Matrix":
        """`data` uint8 (rows, row_bytes), rows of `k` weights.

        `k` may be less than a whole row (the columns from the start of `data`'s rows), in whole blocks.
        """
        layout = BY_NAME[layout_name]
        assert data.ndim == 2 and data.dtype == np.uint8 and data.strides[1] == 1, (
            data.shape,
            data.dtype,
            data.strides,
        )
        assert k % layout.block_size == 0 and k % 16 == 0, (k, layout_name)
        assert layout.row_bytes(k) <= data.shape[1], (k, data.shape)
        addresses = [kernel.address for kernel in matrix_kernels(layout_name)]
        tile_kind = KINDS[activation_kind(layout_name)] if uses_tiles(layout_name) else 0
        table = np.array([data.ctypes.data, data.strides[0], data.shape[0], k, *addresses, tile_kind], np.int64)
        return cls(data, layout, k, table)

    @property
    def address(self) -> int:
        return self.table.ctypes.data

    @property
    def num_rows(self) -> int:
        return len(self.data)

    @property
    def kind(self) -> int:
        """The int8 form of activations it multiplies (32 or 256), 0 for float32."""
        return activation_kind(self.layout.name)


def dequantize(data: np.ndarray, layout_name: str) -> np.ndarray:
    """uint8 (rows, row_bytes) of any type that the kernels know -> float32 (rows, K)."""
    layout = BY_NAME[layout_name]
    k = layout.row_weights(data.shape[1])
    out = np.empty(data.shape[0] * k + VALUES_PADDING // 4, np.float32)
    rows = np.ascontiguousarray(data)
    if len(data) * k % 16:  # a vector of floats: the kernel loads 16 at a time, and a file may end here
        rows = np.concatenate([rows.reshape(-1), np.zeros(64, np.uint8)])
    decode = values_kernel(layout_name)
    if layout.row_scale:
        for row in range(len(rows)):
            decode(rows[row].ctypes.data, k, out[row * k :].ctypes.data)
    else:
        decode(rows.ctypes.data, data.shape[0] * k, out.ctypes.data)
    return out[: data.shape[0] * k].reshape(data.shape[0], k)


@njit
def matrix_rows(matrix, first, num_rows, activations, tokens, num_tokens, out, out_stride):
    """`num_rows` float32 products of the rows from `first` with the activations of each token; see `dot.py`."""
    row_bytes = load_i64(matrix + ROW_BYTES)
    weights = load_i64(matrix + DATA) + first * row_bytes
    call8(load_i64(matrix + ROWS_FN), weights, row_bytes, num_rows, activations, tokens, num_tokens, out, out_stride)


@njit
def matrix_panel(matrix, first, num_rows, panel):
    """Unpacks up to 16 rows into `panel`."""
    row_bytes = load_i64(matrix + ROW_BYTES)
    weights = load_i64(matrix + DATA) + first * row_bytes
    call5(load_i64(matrix + PANEL_FN), weights, row_bytes, num_rows, load_i64(matrix + K), panel)


@njit
def fetch_meanwhile(panel, matrix, first, num_rows):
    """Between `matrix_panel` and `panel_product`: rows to bring into the cache during the product, which leaves memory
    idle. Rows that the matrix has not are not."""
    row_bytes = load_i64(matrix + ROW_BYTES)
    count = min(num_rows, load_i64(matrix + NUM_ROWS) - first)
    store_i64(panel + AHEAD, load_i64(matrix + DATA) + first * row_bytes)
    store_i64(panel + AHEAD_LINES, max(0, count * row_bytes // 64))


@njit
def panel_product(matrix, panel, activations, tokens, packs, num_tokens, out, out_stride, mode):
    """Multiplies a panel of `matrix` with many tokens: their int32 numbers are at `tokens`, and where the matrix has a
    TILE_KIND they are packed at `packs`; see `panel.py` and `tile_panel.py`."""
    source = tokens if load_i64(matrix + TILE_KIND) == 0 else packs
    call7(load_i64(matrix + GEMM_FN), panel, activations, source, num_tokens, out, out_stride, mode)


@njit
def matrix_values(matrix, first_row, num_rows, out):
    """Whole rows as float32, K a row; `out` has VALUES_PADDING bytes behind the result."""
    row_bytes, k = load_i64(matrix + ROW_BYTES), load_i64(matrix + K)
    for row in range(num_rows):
        weights = load_i64(matrix + DATA) + (first_row + row) * row_bytes
        call3(load_i64(matrix + VALUES_FN), weights, k, out + 4 * k * row)
