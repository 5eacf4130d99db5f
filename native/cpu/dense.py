"""Dense products of many rows: matrices packed for them once, and the operations around them. All are program kernels.

What a vision tower or any encoder spends its time in: hundreds to thousands of rows of activations go through each
matrix at once. A matrix is packed when it is loaded: 16 rows side by side (a panel), float32, float16 or bfloat16 as in
the file, or int8 with a scale for every GROUP columns. Products of floats keep float32 activations and sums; int8
matrices take activations that are rounded to int8, with a scale for every GROUP columns of a row.

    DenseMatrix.of_floats(values, "F16")    DenseRows(capacity, k, is_int8)    Span: which rows an operation works on
    dense_op(span, rows, matrix, out, bias, activation="gelu")                 layer_norm_op(span, x, norm, rows)

Rows of buffers are counted in tiles: capacities are multiples of TILE_ROWS, what lies behind the last row is computed
too and never read.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from kimi_lite.native.cpu.activations import SMALLEST_PEAK, aligned_zeros
from kimi_lite.native.cpu.compiler import FASTMATH, function, kernel
from kimi_lite.native.cpu.dense_tiles import FLOAT_BYTES, GROUP, TILE_ROWS, TILE_VECTORS, byte_tile, float_tile
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.cpu.threads import next_task
from kimi_lite.native.cpu.vector_math import exp_f32x16
from kimi_lite.native.simd import (
    divide_f32x16,
    f32_bits,
    f32_from_bits,
    f32_to_i32x16,
    fma_f32x16,
    largest_i32x16,
    load_f32,
    load_f32x16,
    load_i64,
    max_i32x16,
    narrow_i32x16,
    round_f32x16,
    scalar_from_bits,
    splat_f32x16,
    store_f32,
    store_f32x16,
    store_i8x16,
    sum_f32x16,
    zero_f32x16,
    zero_i32x16,
)
from kimi_lite.native.simd_dot import HAS_FULL_UNSIGNED_DOT

_FAST = {"fastmath": FASTMATH, "error_model": "numpy"}
PANEL_ROWS = 16
TASK_ROWS = 8 * TILE_ROWS  # rows of activations that one task multiplies with its panels
_TASK_PANELS = 4 * TILE_VECTORS
_BIAS = 128 if HAS_FULL_UNSIGNED_DOT else 0  # what the stored codes of activations have added
ACTIVATIONS = {"": 0, "gelu_tanh": 1, "gelu": 2}
_SQRT_HALF, _TWO_SQRT_2_PI = 0.7071067811865476, 1.5957691216057308
# erf on x >= 0: Abramowitz & Stegun 7.1.26, absolute error 1.5e-7
_P, _A1, _A2, _A3, _A4, _A5 = 0.3275911, 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429
_SIGN = -0x80000000


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# Which rows -----------------------------------------------------------------------------------------------------------

_FIRST, _COUNT, _SCRATCH, _SCRATCH_STRIDE = (8 * i for i in range(4))


class Span:
    """The rows `first .. first + count` that a run of a program works on, and each thread's scratch memory."""

    def __init__(self, num_threads: int, scratch_bytes: int) -> None:
        stride = round_up(scratch_bytes, 4096) + 4096
        self._scratch = aligned_zeros((num_threads, stride), np.uint8)
        self._table = np.array([0, 0, self._scratch.ctypes.data, stride], np.int64)

    @property
    def address(self) -> int:
        return self._table.ctypes.data

    def set(self, first: int, count: int) -> None:
        """Buffers of a chunk hold these rows from their row 0 on, buffers of the whole item from `first` on."""
        self._table[_FIRST // 8], self._table[_COUNT // 8] = first, count


@njit
def span_first(span):
    return load_i64(span + _FIRST)


@njit
def span_count(span):
    return load_i64(span + _COUNT)


@njit
def span_scratch(span, thread):
    return load_i64(span + _SCRATCH) + thread * load_i64(span + _SCRATCH_STRIDE)


# Rows of activations --------------------------------------------------------------------------------------------------

_VALUES, _STRIDE, _CODES, _SCALES, _NUM_GROUPS, _K = (8 * i for i in range(6))


class DenseRows:
    """What a product reads: `capacity` rows (a multiple of TILE_ROWS) of k values, float32 or int8."""

    def __init__(self, capacity: int, k: int, is_int8: bool) -> None:
        assert capacity % TILE_ROWS == 0, capacity
        self.capacity, self.k, self.is_int8, groups = capacity, k, is_int8, round_up(k, GROUP) // GROUP
        width = round_up(k, PANEL_ROWS * TILE_VECTORS)  # so that it may be a product's output
        self.values = aligned_zeros((1 if is_int8 else capacity, width), np.float32, 64)
        self.codes = aligned_zeros((capacity if is_int8 else 1, groups * GROUP), np.uint8, 64)
        self.scales = aligned_zeros((capacity if is_int8 else 1, groups), np.float32)
        codes, scales = (self.codes.ctypes.data, self.scales.ctypes.data) if is_int8 else (0, 0)
        stride = self.values.strides[0]
        self._table = np.array([self.values.ctypes.data, stride, codes, scales, groups, k], np.int64)

    @property
    def address(self) -> int:
        return self._table.ctypes.data


@njit(**_FAST)
def quantize_row(x, k, codes, scales):
    """Rounds k float32 at x, zeros behind them up to GROUP: codes + _BIAS as bytes, a scale for each GROUP. A group
    with an infinity or a NaN gets a NaN scale."""
    for group in range(-(-k // GROUP)):
        first, last = group * GROUP, min(k, group * GROUP + GROUP)
        largest = zero_i32x16()
        for i in range(first, last, 16):
            largest = max_i32x16(largest, f32_bits(load_f32x16(x + 4 * i)) & 0x7FFFFFFF)
        bits = largest_i32x16(largest)
        peak = scalar_from_bits(bits)
        if peak < types.float32(SMALLEST_PEAK):
            peak = types.float32(0)
        is_finite = bits < 0x7F800000
        inverse = splat_f32x16(types.float32(127) / peak if peak > 0 and is_finite else types.float32(0))
        store_f32(scales + 4 * group, peak / types.float32(127) if is_finite else types.float32(np.nan))
        for i in range(first, first + GROUP, 16):
            value = round_f32x16(load_f32x16(x + 4 * i) * inverse) if i < last else zero_f32x16()
            store_i8x16(codes + i, narrow_i32x16(f32_to_i32x16(value) + _BIAS))


@njit(**_FAST)
def place_row(rows, row, stage):
    """Float32 values at `stage`, zeros behind them up to a multiple of 16, as one row of DenseRows."""
    k = load_i64(rows + _K)
    if load_i64(rows + _CODES) != 0:
        groups = load_i64(rows + _NUM_GROUPS)
        codes, scales = load_i64(rows + _CODES) + row * groups * GROUP, load_i64(rows + _SCALES) + 4 * row * groups
        quantize_row(stage, k, codes, scales)
        return
    target = load_i64(rows + _VALUES) + row * load_i64(rows + _STRIDE)
    for i in range(0, k, 16):
        store_f32x16(target + 4 * i, load_f32x16(stage + 4 * i))


@kernel
def _rows_kernel(args, thread, team):
    span, x, stride, is_global, rows = (
        load_i64(args),
        load_i64(args + 8),
        load_i64(args + 16),
        load_i64(args + 24),
        load_i64(args + 32),
    )
    first = span_first(span) if is_global else 0
    row = next_task(team)
    while row < span_count(span):
        place_row(rows, row, x + (first + row) * stride)
        row = next_task(team)


def rows_op(span: Span, x: np.ndarray, rows: DenseRows, is_global: bool) -> Op:
    """rows[i] = x[i] (x of a chunk) or x[first + i] (x of the whole item); x: float32 (capacity, >= k rounded up to
    16)."""
    assert x.dtype == np.float32 and x.shape[1] >= round_up(rows.k, 16), (x.dtype, x.shape, rows.k)
    return Op.of(_rows_kernel, span, x, x.strides[0], is_global, rows)


# LayerNorm ------------------------------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """LayerNorm's weight and bias, float32 (K,), and eps."""

    weight: np.ndarray
    bias: np.ndarray
    eps: float


@njit(**_FAST)
def layer_norm(x, weight, bias, out, k, eps):
    """out = (x - mean) / sqrt(variance + eps) * weight + bias, float32 (K,), K a multiple of 16 (Ba et al. 2016)."""
    total = zero_f32x16()
    for i in range(0, 4 * k, 64):
        total = total + load_f32x16(x + i)
    mean = splat_f32x16(sum_f32x16(total) / types.float32(k))
    squares = zero_f32x16()
    for i in range(0, 4 * k, 64):
        value = load_f32x16(x + i) - mean
        squares = fma_f32x16(value, value, squares)
    factor = splat_f32x16(types.float32(1) / np.sqrt(sum_f32x16(squares) / types.float32(k) + eps))
    for i in range(0, 4 * k, 64):
        value = (load_f32x16(x + i) - mean) * factor
        store_f32x16(out + i, fma_f32x16(value, load_f32x16(weight + i), load_f32x16(bias + i)))


@kernel
def _layer_norm_kernel(args, thread, team):
    span, x, stride, weight = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
    bias, eps, rows = load_i64(args + 32), load_f32(args + 40), load_i64(args + 48)
    k, first, stage = load_i64(rows + _K), span_first(span), span_scratch(span, thread)
    row = next_task(team)
    while row < span_count(span):
        layer_norm(x + (first + row) * stride, weight, bias, stage, k, eps)
        place_row(rows, row, stage)
        row = next_task(team)


def layer_norm_op(span: Span, x: np.ndarray, norm: Norm, rows: DenseRows) -> Op:
    """rows[i] = LayerNorm(x[first + i]). x: float32 (capacity, >= k)."""
    weight, bias, eps = norm
    assert weight.shape == bias.shape == (rows.k,) and rows.k % 16 == 0, (weight.shape, bias.shape, rows.k)
    assert x.dtype == weight.dtype == bias.dtype == np.float32, (x.dtype, weight.dtype, bias.dtype)
    return Op.of(_layer_norm_kernel, span, x, x.strides[0], weight, bias, float(eps), rows)


# Matrices -------------------------------------------------------------------------------------------------------------

_PANELS, _PANEL_BYTES, _NUM_PANELS, _MATRIX_SCALES, _STARTS = (8 * i for i in range(5))


@function("void(float32[:, ::1], int8[:, :, :, ::1], float32[:, :, ::1], int32[:, :, ::1])", error_model="numpy")
def _quantize_panels(values, codes, scales, starts):
    """values (rows, k) -> codes (panels, K / 4, 16, 4), scales and starts (panels, K / GROUP, 16), else zeros."""
    for row in range(values.shape[0]):
        panel, lane = row // PANEL_ROWS, row % PANEL_ROWS
        for group in range(scales.shape[1]):
            columns = values[row, group * GROUP : group * GROUP + GROUP]
            peak = np.abs(columns).max()
            inverse = types.float32(127) / peak if peak > SMALLEST_PEAK else types.float32(0)
            total = 0
            for i in range(len(columns)):
                code = int(np.rint(columns[i] * inverse))
                total += code
                codes[panel, (group * GROUP + i) // 4, lane, i % 4] = code
            scales[panel, group, lane] = peak / types.float32(127)
            starts[panel, group, lane] = -_BIAS * total


@dataclass(frozen=True, slots=True, eq=False)
class DenseMatrix:
    """A matrix (rows, k), packed; `dtype` F32, F16, BF16 or int8."""

    dtype: str
    num_rows: int
    k: int
    table: np.ndarray  # int64, for kernels
    owners: tuple[np.ndarray, ...]

    @property
    def address(self) -> int:
        return self.table.ctypes.data

    @property
    def num_bytes(self) -> int:
        return sum(owner.nbytes for owner in self.owners)

    @property
    def padded_rows(self) -> int:
        """What an output must hold of each row."""
        return round_up(self.num_rows, PANEL_ROWS * TILE_VECTORS)

    @classmethod
    def of_floats(cls, values: np.ndarray, dtype: str) -> "DenseMatrix":
        """values (rows, k): float32 for F32, float16 for F16, uint16 (the bits) for BF16."""
        rows, k = values.shape
        assert values.itemsize == FLOAT_BYTES[dtype], (values.dtype, dtype)
        padded = round_up(rows, PANEL_ROWS * TILE_VECTORS)
        panels = aligned_zeros((padded // PANEL_ROWS, k, PANEL_ROWS), values.dtype)
        whole = rows // PANEL_ROWS
        panels[:whole] = values[: whole * PANEL_ROWS].reshape(whole, PANEL_ROWS, k).swapaxes(1, 2)
        if rows % PANEL_ROWS:
            panels[whole, :, : rows % PANEL_ROWS] = values[whole * PANEL_ROWS :].T
        table = np.array([panels.ctypes.data, panels.strides[0], len(panels), 0, 0], np.int64)
        return cls(dtype, rows, k, table, (panels,))

    @classmethod
    def of_int8(cls, values: np.ndarray) -> "DenseMatrix":
        """values: float32 (rows, k), rounded to int8 with a scale for every GROUP columns of a row."""
        (rows, k), values = values.shape, np.ascontiguousarray(values, np.float32)
        groups, padded = round_up(k, GROUP) // GROUP, round_up(rows, PANEL_ROWS * TILE_VECTORS)
        codes = aligned_zeros((padded // PANEL_ROWS, groups * GROUP // 4, PANEL_ROWS, 4), np.int8)
        scales = aligned_zeros((len(codes), groups, PANEL_ROWS), np.float32)
        starts = aligned_zeros((len(codes), groups, PANEL_ROWS), np.int32)
        _quantize_panels(values, codes, scales, starts)
        table = np.array(
            [codes.ctypes.data, codes.strides[0], len(codes), scales.ctypes.data, starts.ctypes.data], np.int64
        )
        return cls("int8", rows, k, table, (codes, scales, starts))


# Products -------------------------------------------------------------------------------------------------------------


@njit(**_FAST)
def _gelu_tanh(x):
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = x / (1 + e^(-2 u)) (Hendrycks & Gimpel 2016)."""
    u = fma_f32x16(x * x * x, splat_f32x16(types.float32(0.044715)), x) * -_TWO_SQRT_2_PI
    return divide_f32x16(x, exp_f32x16(u) + 1.0)


@njit(**_FAST)
def _gelu(x):
    """0.5 x (1 + erf(x / sqrt(2)))."""
    z = x * _SQRT_HALF
    sign = f32_bits(z) & _SIGN
    z = f32_from_bits(f32_bits(z) ^ sign)
    t = divide_f32x16(splat_f32x16(types.float32(1)), z * _P + 1.0)
    p = fma_f32x16(splat_f32x16(types.float32(_A5)), t, splat_f32x16(types.float32(_A4)))
    p = fma_f32x16(p, t, splat_f32x16(types.float32(_A3)))
    p = fma_f32x16(p, t, splat_f32x16(types.float32(_A2)))
    p = fma_f32x16(p, t, splat_f32x16(types.float32(_A1)))
    erf = splat_f32x16(types.float32(1)) - p * t * exp_f32x16(z * z * -1.0)
    return x * 0.5 * (f32_from_bits(f32_bits(erf) ^ sign) + 1.0)


@njit(**_FAST)
def _finish_tile(tile, bias, out, stride, activation, is_added):
    """A tile's sums become outputs: bias, activation, what was there before."""
    for row in range(TILE_ROWS):
        for v in range(TILE_VECTORS):
            value = load_f32x16(tile + 64 * (row * TILE_VECTORS + v)) + load_f32x16(bias + 64 * v)
            if activation == 1:
                value = _gelu_tanh(value)
            elif activation == 2:
                value = _gelu(value)
            at = out + row * stride + 64 * v
            store_f32x16(at, value + load_f32x16(at) if is_added else value)


def _multiply_tile(dtype, rows, first, matrix, panel, tile):
    """tile[r][v] = the products of TILE_ROWS rows from `first` on with TILE_VECTORS panels from `panel` on."""


@overload(_multiply_tile, prefer_literal=True)
def _choose_multiply_tile(dtype, rows, first, matrix, panel, tile):
    name = dtype.literal_value
    if name == "int8":
        multiply_bytes = byte_tile(TILE_VECTORS, TILE_ROWS)

        def multiply(dtype, rows, first, matrix, panel, tile):
            groups, panel_bytes = load_i64(rows + _NUM_GROUPS), load_i64(matrix + _PANEL_BYTES)
            multiply_bytes(
                load_i64(matrix + _PANELS) + panel * panel_bytes,
                panel_bytes,
                load_i64(matrix + _MATRIX_SCALES) + 64 * groups * panel,
                load_i64(matrix + _STARTS) + 64 * groups * panel,
                load_i64(rows + _CODES) + first * groups * GROUP,
                load_i64(rows + _SCALES) + 4 * first * groups,
                groups,
                tile,
            )

        return multiply
    multiply_floats, step = float_tile(name, TILE_VECTORS, TILE_ROWS, False), 16 * FLOAT_BYTES[name]

    def multiply(dtype, rows, first, matrix, panel, tile):
        panel_bytes, stride = load_i64(matrix + _PANEL_BYTES), load_i64(rows + _STRIDE)
        weights, x = load_i64(matrix + _PANELS) + panel * panel_bytes, load_i64(rows + _VALUES) + first * stride
        multiply_floats(weights, step, panel_bytes, x, stride, load_i64(rows + _K), tile, 64 * TILE_VECTORS)

    return multiply


@cache
def dense_kernel(dtype: str):
    """The compiled product of rows with a matrix of this dtype."""

    def dense(args, thread, team):
        span, rows, matrix, out = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
        stride, bias, activation = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
        is_added, count, tile = load_i64(args + 56) != 0, span_count(span), span_scratch(span, thread)
        if load_i64(args + 64) != 0:
            out += span_first(span) * stride
        num_panels, num_blocks = load_i64(matrix + _NUM_PANELS), -(-count // TASK_ROWS)
        task = next_task(team)
        while task < num_blocks * -(-num_panels // _TASK_PANELS):
            block, group = task % num_blocks, task // num_blocks
            for panel in range(group * _TASK_PANELS, min(num_panels, (group + 1) * _TASK_PANELS), TILE_VECTORS):
                for row in range(block * TASK_ROWS, min(count, (block + 1) * TASK_ROWS), TILE_ROWS):
                    _multiply_tile(dtype, rows, row, matrix, panel, tile)
                    at = out + row * stride + 64 * panel
                    _finish_tile(tile, bias + 64 * panel, at, stride, activation, is_added)
            task = next_task(team)

    return kernel(dense)


def dense_op(
    span: Span,
    rows: DenseRows,
    matrix: DenseMatrix,
    out: np.ndarray,
    bias: np.ndarray,
    activation: str = "",
    is_added: bool = False,
    is_global: bool = False,
) -> Op:
    """out[i] = activation(matrix @ rows[i] + bias), or += it; out[first + i] where `is_global`.

    out: float32 (capacity a multiple of TILE_ROWS, >= matrix.padded_rows); bias: float32 (matrix.padded_rows,).
    """
    assert matrix.k == rows.k and (matrix.dtype == "int8") == rows.is_int8, (matrix.k, rows.k, matrix.dtype)
    assert out.dtype == np.float32 and out.shape[1] >= matrix.padded_rows, (out.dtype, out.shape, matrix.padded_rows)
    assert bias.dtype == np.float32 and bias.shape == (matrix.padded_rows,), (bias.dtype, bias.shape)
    cells = (out, out.strides[0], bias, ACTIVATIONS[activation], is_added, is_global)
    return Op.of(dense_kernel(matrix.dtype), span, rows, matrix, *cells)
