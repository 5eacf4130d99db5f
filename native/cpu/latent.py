"""The MLA latent cache as kernels see it: pages of 64 positions, each the normed latent and the rotated shared key.

A layer's storage is (num_pages, 64, row) in float32, float16, bfloat16 or 8 bits with scales (`native.latent_rows`).
Kernels that touch it are compiled for its dtype.
"""

from functools import cache

import numpy as np
from numba import njit, types
from numba.extending import overload

from kimi_lite.native.cpu.compiler import kernel
from kimi_lite.native.cpu.linear import rms_norm, thread_scratch
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.cpu.run import CACHE_ROWS, COS, NUM_TOKENS, SIN, RunTable
from kimi_lite.native.cpu.threads import next_task
from kimi_lite.native.cpu.vector_math import rotate_pairs
from kimi_lite.native.latent_rows import GROUP_VALUES, PAGE_TOKENS, ROW_FORMS, MlaShape, row_length
from kimi_lite.native.simd import (
    clamp_f32x16,
    divide_f32x16,
    f32_bits,
    f32_to_i32x16,
    int_to_f32x16,
    largest_i32x16,
    load_bf16x16,
    load_f16,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i8x16,
    load_i64,
    max_i32x16,
    narrow_i32x16,
    round_f32x16,
    scalar_from_bits,
    splat_f32x16,
    store_bf16x16,
    store_f16,
    store_f16x16,
    store_f32x16,
    store_i8x16,
    widen_signed_i8x16,
    zero_f32x16,
    zero_i32x16,
)

_OPTIONS = {"fastmath": {"nsz", "contract"}, "error_model": "numpy"}
_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000  # of a float32's bits
_LOADS = {"f32": load_f32x16, "f16": load_f16x16, "bf16": load_bf16x16}
_STORES = {"f32": store_f32x16, "f16": store_f16x16, "bf16": store_bf16x16}


def load_latent(dtype, row, i, latent):
    """Values i .. i + 16 of a cached row as f32x16; `dtype` is a literal name, i a multiple of 16."""


def store_row(dtype, row, values, latent):
    """Stores `latent` float32 at `values` as a cached row."""


@overload(load_latent)
def _choose_load(dtype, row, i, latent):
    if not isinstance(dtype, types.StringLiteral):
        return None
    if dtype.literal_value == "q8":
        return _load_q8
    load, value_bytes = _LOADS[dtype.literal_value], ROW_FORMS[dtype.literal_value].value_bytes
    return lambda dtype, row, i, latent: load(row + i * value_bytes)


def _load_q8(dtype, row, i, latent):
    scale = splat_f32x16(load_f16(row + latent + 2 * (i // GROUP_VALUES)))
    return int_to_f32x16(widen_signed_i8x16(load_i8x16(row + i))) * scale


@overload(store_row)
def _choose_store(dtype, row, values, latent):
    if not isinstance(dtype, types.StringLiteral):
        return None
    if dtype.literal_value == "q8":
        return _store_row_q8
    store, value_bytes = _STORES[dtype.literal_value], ROW_FORMS[dtype.literal_value].value_bytes

    def store_plain(dtype, row, values, latent):
        for i in range(0, latent, 16):
            store(row + i * value_bytes, load_f32x16(values + 4 * i))

    return store_plain


def _store_row_q8(dtype, row, values, latent):
    for i in range(0, latent, GROUP_VALUES):
        _store_group(values + 4 * i, min(GROUP_VALUES, latent - i), row + i, row + latent + 2 * (i // GROUP_VALUES))


@njit(**_OPTIONS)
def _store_group(values, length, codes, scale_address):
    """`length` (16 or 32) float32 as codes = round(x / scale) and a float16 scale = max|x| / 127; NaN where not
    finite."""
    largest = zero_i32x16()
    for i in range(0, length, 16):
        largest = max_i32x16(
            largest, f32_bits(load_f32x16(values + 4 * i)) & _MAGNITUDE
        )  # ordered as the floats are, NaN on top
    peak_bits = largest_i32x16(largest)
    is_finite = peak_bits < _INFINITY
    store_f16(scale_address, scalar_from_bits(peak_bits) / types.float32(127) if is_finite else types.float32(np.nan))
    scale = load_f16(scale_address)
    limit = splat_f32x16(types.float32(127))
    for i in range(0, length, 16):
        quotient = zero_f32x16()
        if is_finite and scale > 0:
            quotient = divide_f32x16(load_f32x16(values + 4 * i), splat_f32x16(scale))
        rounded = round_f32x16(clamp_f32x16(quotient, limit * types.float32(-1), limit))
        store_i8x16(codes + i, narrow_i32x16(f32_to_i32x16(rounded)))


def _write_kernel(dtype: str, value_bytes: int, scale_bytes: int):
    def write(args, thread, team):
        run, kv, stride, weight = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
        storage, kv_lora, rope, eps = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48), load_f32(args + 56)
        latent, scratch = kv_lora + rope, thread_scratch(run, thread)
        row_bytes = latent * value_bytes + -(-latent // GROUP_VALUES) * scale_bytes
        token = next_task(team)
        while token < load_i64(run + NUM_TOKENS):
            source = kv + token * stride
            rms_norm(source, weight, scratch, kv_lora, eps)
            angles = 2 * rope * token  # rope / 2 float32 a token
            cos, sin = load_i64(run + COS) + angles, load_i64(run + SIN) + angles
            rotate_pairs(source + 4 * kv_lora, scratch + 4 * kv_lora, cos, sin, rope // 2)
            store_row(dtype, storage + load_i64(load_i64(run + CACHE_ROWS) + 8 * token) * row_bytes, scratch, latent)
            token = next_task(team)

    return write


@cache
def compiled_write(dtype: str):
    form = ROW_FORMS[dtype]
    return kernel(_write_kernel(dtype, form.value_bytes, form.scale_bytes))


def write_latent_op(
    run: RunTable, kv: np.ndarray, weight: np.ndarray, storage: np.ndarray, shape: MlaShape, eps: float, dtype: str
) -> Op:
    """Writes each token's [RMSNorm(latent) | rotated key] into its row of the cache.

    kv: float32 (capacity, kv_lora + rope); weight: float32 (kv_lora,); storage: the layer's pages (P, 64, row) of a
    dtype of `latent_rows`; kv_lora and rope are multiples of 16.
    """
    kv_lora, rope = shape.kv_lora, shape.rope
    assert kv_lora % 16 == 0 and rope % 16 == 0 and weight.shape == (kv_lora,), (shape, weight.shape)
    check_storage(storage, shape, dtype)
    return Op.of(compiled_write(dtype), run, kv, kv.strides[0], weight, storage, kv_lora, rope, float(eps))


def check_storage(storage: np.ndarray, shape: MlaShape, dtype: str) -> None:
    """Asserts that these are pages of one layer, one after another in memory."""
    expected = (PAGE_TOKENS, row_length(dtype, shape.latent))
    assert storage.shape[1:] == expected and storage.flags.c_contiguous, (storage.shape, expected, storage.strides)
    assert storage.dtype == ROW_FORMS[dtype].storage, (storage.dtype, dtype)
