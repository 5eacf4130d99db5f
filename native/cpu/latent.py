"""The MLA latent cache as kernels see it: pages of 64 positions, each the normed latent and the rotated shared key.

A layer's storage is (num_pages, 64, kv_lora + rope) in float32, float16 or bfloat16. Kernels that touch it are compiled
for its dtype.
"""

from functools import cache

import numpy as np
from numba import types
from numba.extending import overload

from native.cpu.compiler import kernel
from native.cpu.linear import arguments, float_bits, rms_norm, thread_scratch
from native.cpu.run import COS, NUM_TOKENS, SIN, SLOTS
from native.cpu.threads import next_task
from native.cpu.vector_math import rotate_pairs
from native.simd import load_bf16x16, load_f16x16, load_f32, load_f32x16, load_i64, store_bf16x16, store_f16x16, store_f32x16

PAGE_POSITIONS = 64
VALUE_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_LOADS = {"f32": load_f32x16, "f16": load_f16x16, "bf16": load_bf16x16}
_STORES = {"f32": store_f32x16, "f16": store_f16x16, "bf16": store_bf16x16}


def load_latent(dtype, address):
    """16 cached values as f32x16; `dtype` is a literal name."""


def store_latent(dtype, address, value):
    """Stores f32x16 as 16 cached values."""


@overload(load_latent)
def _choose_load(dtype, address):
    if not isinstance(dtype, types.StringLiteral):
        return None
    load = _LOADS[dtype.literal_value]
    return lambda dtype, address: load(address)


@overload(store_latent)
def _choose_store(dtype, address, value):
    if not isinstance(dtype, types.StringLiteral):
        return None
    store = _STORES[dtype.literal_value]
    return lambda dtype, address, value: store(address, value)


def _write_kernel(dtype: str, value_bytes: int):
    def write(args, thread, team):
        run, kv, stride, weight = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
        storage, kv_lora, rope, eps = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48), load_f32(args + 56)
        latent, scratch = kv_lora + rope, thread_scratch(run, thread)
        token = next_task(team)
        while token < load_i64(run + NUM_TOKENS):
            source = kv + token * stride
            rms_norm(source, weight, scratch, kv_lora, eps)
            angles = 2 * rope * token  # rope / 2 float32 a token
            cos, sin = load_i64(run + COS) + angles, load_i64(run + SIN) + angles
            rotate_pairs(source + 4 * kv_lora, scratch + 4 * kv_lora, cos, sin, rope // 2)
            target = storage + load_i64(load_i64(run + SLOTS) + 8 * token) * latent * value_bytes
            for i in range(0, latent, 16):
                store_latent(dtype, target + i * value_bytes, load_f32x16(scratch + 4 * i))
            token = next_task(team)

    return write


@cache
def _compiled_write(dtype: str):
    write = _write_kernel(dtype, VALUE_BYTES[dtype])
    return kernel(write)


def write_latent_op(
    run: int, kv: np.ndarray, weight: np.ndarray, storage: int, sizes: tuple[int, int], eps: float, dtype: str
) -> tuple[int, np.ndarray]:
    """Writes each token's [RMSNorm(latent) | rotated key] into its cache slot.

    kv: float32 (capacity, kv_lora + rope); weight: float32 (kv_lora,); storage: address of the layer's first page;
    sizes: (kv_lora, rope), multiples of 16.
    """
    kv_lora, rope = sizes
    assert kv_lora % 16 == 0 and rope % 16 == 0 and weight.shape == (kv_lora,), (sizes, weight.shape)
    return _compiled_write(dtype).address, arguments(
        run, kv.ctypes.data, kv.strides[0], weight.ctypes.data, storage, kv_lora, rope, float_bits(eps)
    )
