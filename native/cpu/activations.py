"""Activations as the products want them: float32 rows, and their int8 form with one scale per 32 or per 256.

`Activations` owns the buffers for up to `capacity` tokens of K values and an int64 table of their addresses, which is
what kernels receive. Layout of the table, in bytes:

    NUM_VALUES  K                    X_F32  float32 (T, K)
    KIND32 / KIND256 +  X_CODES  int8 (T, K)            value = code * scale
                        X_SCALES float32 (T, K / 32)    KIND256 repeats a scale 8 times, so both read alike X_SUMS16
                        float32 (T, K / 16)    sums of 16 codes, for types with minima or offsets X_SUMS32 float32 (T, K
                        / 32) X_MINUS16 int16 (T, K / 16)     minus the sums of 16 codes, for sums of products that stay
                        integers

Codes are round(x * 127 / max|x|) of their group; a group of zeros has scale 0, as one whose largest value is too small
to divide 127. ggml's Q8_0 and Q8_K do the same. A group with an infinity or a NaN gets a NaN scale and sums, so that no
product hides it.
"""

import math

import numpy as np
from numba import njit, types

from kimi_lite.native.simd import (
    f32_bits,
    f32_to_i32x16,
    largest_i32x16,
    load_f32x16,
    load_i64,
    max_i32x16,
    narrow_i32x16,
    round_f32x16,
    scalar_from_bits,
    splat_f32x16,
    store_f32,
    store_i8x16,
    store_i16,
    sum_f32x16,
    zero_i8x16,
    zero_i32x16,
)

NUM_VALUES, X_F32, KIND32, KIND256 = 0, 8, 16, 56
X_CODES, X_SCALES, X_SUMS16, X_SUMS32, X_MINUS16 = 0, 8, 16, 24, 32
KINDS = {32: KIND32, 256: KIND256}
SMALLEST_PEAK = 1e-36  # 127 / peak must be finite
_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000  # of a float32's bits


def aligned_zeros(shape: tuple[int, ...], dtype: type, padding_bytes: int = 0) -> np.ndarray:
    """Zeros on a cache line, so that vectors of 64 bytes do not straddle two; `padding_bytes` may be read behind
    them."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(num_bytes + padding_bytes + 63, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + num_bytes].view(dtype).reshape(shape)


class Activations:
    """Buffers for `capacity` tokens of `k` values (a multiple of 16); `kinds`: which int8 forms exist (32, 256)."""

    def __init__(
        self, capacity: int, k: int, kinds: frozenset[int] | set[int], values: np.ndarray | None = None
    ) -> None:
        """values: float32 (capacity, k) that others fill; None: memory of its own."""
        assert k % 16 == 0 and all(k % kind == 0 for kind in kinds), (k, kinds)
        self.capacity, self.k, self.kinds = capacity, k, frozenset(kinds)
        self.values = np.zeros((capacity, k), np.float32) if values is None else values
        assert self.values.shape == (capacity, k) and self.values.dtype == np.float32, (self.values.shape, capacity, k)
        assert self.values.flags.c_contiguous, self.values.strides
        self.table = np.zeros(12, np.int64)
        self.table[NUM_VALUES // 8], self.table[X_F32 // 8] = k, self.values.ctypes.data
        self.quantized: dict[int, tuple[np.ndarray, ...]] = {}
        for kind in sorted(kinds):
            buffers = (
                aligned_zeros((capacity, k), np.int8, 224),  # rows are read 256 at a time
                aligned_zeros((capacity, k // 32), np.float32),
                aligned_zeros((capacity, k // 16), np.float32),
                aligned_zeros((capacity, k // 32), np.float32),
                aligned_zeros((capacity, k // 16), np.int16),
            )
            self.quantized[kind] = buffers
            for i, buffer in enumerate(buffers):
                self.table[KINDS[kind] // 8 + i] = buffer.ctypes.data

    @property
    def address(self) -> int:
        return self.table.ctypes.data


@njit
def _refuse_group(length, codes, scales, sums16, sums32, minus16):
    """Marks a group that holds an infinity or a NaN: whatever is multiplied with it becomes NaN, and the logits
    tell."""
    for i in range(0, length, 16):
        store_i8x16(codes + i, zero_i8x16())
        store_f32(sums16 + i // 4, types.float32(np.nan))
        store_i16(minus16 + i // 8, types.int16(0))
    for i in range(0, length, 32):
        store_f32(scales + i // 8, types.float32(np.nan))
        store_f32(sums32 + i // 8, types.float32(np.nan))


@njit(fastmath={"nsz", "contract"}, error_model="numpy")
def quantize_group(x, length, codes, scales, sums16, sums32, minus16):
    """Quantizes `length` (32 or 256) float32 at address `x`; fills the scale of every 32 and the sums."""
    largest = zero_i32x16()
    for i in range(0, length, 16):
        largest = max_i32x16(
            largest, f32_bits(load_f32x16(x + 4 * i)) & _MAGNITUDE
        )  # ordered as the floats are, NaN on top
    peak_bits = largest_i32x16(largest)
    if peak_bits >= _INFINITY:
        _refuse_group(length, codes, scales, sums16, sums32, minus16)
        return
    peak = scalar_from_bits(peak_bits)
    if peak < types.float32(SMALLEST_PEAK):
        peak = types.float32(0)
    scale = peak / types.float32(127)
    inverse = splat_f32x16(types.float32(127) / peak if peak > 0 else types.float32(0))
    for i in range(0, length, 32):
        rounded0 = round_f32x16(load_f32x16(x + 4 * i) * inverse)
        rounded1 = round_f32x16(load_f32x16(x + 4 * i + 64) * inverse)
        store_i8x16(codes + i, narrow_i32x16(f32_to_i32x16(rounded0)))
        store_i8x16(codes + i + 16, narrow_i32x16(f32_to_i32x16(rounded1)))
        sum0, sum1 = sum_f32x16(rounded0), sum_f32x16(rounded1)
        store_f32(scales + i // 8, scale)
        store_f32(sums16 + i // 4, sum0)
        store_f32(sums16 + i // 4 + 4, sum1)
        store_i16(minus16 + i // 8, types.int16(-sum0))
        store_i16(minus16 + i // 8 + 2, types.int16(-sum1))
        store_f32(sums32 + i // 8, sum0 + sum1)


@njit
def _quantize_span(activations, kind, length, token, first, last):
    """Values first..last (multiples of `length`) of one token in one kind, if the table has it."""
    codes = load_i64(activations + kind + X_CODES)
    if codes == 0:
        return
    k = load_i64(activations + NUM_VALUES)
    at = token * k + first
    x = load_i64(activations + X_F32)
    scales, sums16 = load_i64(activations + kind + X_SCALES), load_i64(activations + kind + X_SUMS16)
    sums32, minus16 = load_i64(activations + kind + X_SUMS32), load_i64(activations + kind + X_MINUS16)
    for i in range(at, at + last - first, length):
        quantize_group(
            x + 4 * i, length, codes + i, scales + i // 8, sums16 + i // 4, sums32 + i // 8, minus16 + i // 8
        )


@njit
def quantize_token(activations, token):
    """Brings all int8 forms of one token up to date with its float32 values."""
    k = load_i64(activations + NUM_VALUES)
    _quantize_span(activations, KIND32, 32, token, 0, k)
    _quantize_span(activations, KIND256, 256, token, 0, k)
