"""GGUF tensors as the kernels' matrices: views into the mapped file, described by their kernel tables."""

import numpy as np

from kimi_lite.arch.mla import split_kv_b
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.cpu.blocks import is_implemented
from kimi_lite.native.cpu.matrix import Matrix, dequantize
from kimi_lite.native.layouts import BY_NAME


def matrix_view(data: np.ndarray, layout_name: str, k: int) -> Matrix:
    """`data`: uint8 (..., row_bytes); leading axes become rows."""
    rows = data.reshape(-1, data.shape[-1]) if data.ndim != 2 else data
    return Matrix.of(rows, layout_name, k)


def matrix(store: GGUFStore, name: str) -> Matrix:
    """A tensor of the file, read in place. Raises KimiLiteError for a missing tensor."""
    tensor = store.tensor(name)
    return matrix_view(tensor.data, tensor.layout.name, tensor.shape[-1])


def vector(store: GGUFStore, name: str) -> np.ndarray:
    """A one-dimensional tensor (norm weight, bias) as float32, aligned."""
    tensor = store.tensor(name)
    return dequantize(tensor.data.reshape(1, -1), tensor.layout.name)[0].copy()


def check_types(store: GGUFStore) -> None:
    """Raise KimiLiteError if a tensor's type has no kernel yet."""
    for tensor in store.tensors.values():
        if not is_implemented(tensor.layout.name):
            raise KimiLiteError(
                f"{store.path.name}: tensor {tensor.name} is {tensor.layout.name}, which this version cannot multiply.",
                f"Types it can: {', '.join(filter(is_implemented, BY_NAME))}.",
            )
        size = 16 if tensor.layout.block_size == 1 and len(tensor.shape) > 1 else 1
        if tensor.shape[-1] % size:
            raise KimiLiteError(
                f"{store.path.name}: rows of {tensor.name} have {tensor.shape[-1]} weights; a multiple of "
                f"{size} is needed."
            )


def key_value_matrices(store: GGUFStore, layer: int, num_heads: int, nope: int) -> tuple[Matrix, Matrix]:
    """W_UK as (heads * kv_lora, nope) and W_UV as (heads * v, kv_lora); older files join them in `attn_kv_b`."""
    block = f"blk.{layer}"
    if f"{block}.attn_k_b.weight" in store.tensors:
        return matrix(store, f"{block}.attn_k_b.weight"), matrix(store, f"{block}.attn_v_b.weight")
    joint = store.tensor(f"{block}.attn_kv_b.weight")
    name, kv_lora = joint.layout.name, joint.shape[-1]
    key_rows, value_rows = split_kv_b(joint.data, num_heads, nope)
    values = np.ascontiguousarray(value_rows).reshape(-1, joint.data.shape[-1])
    keys = dequantize(key_rows.reshape(-1, joint.data.shape[-1]), name).reshape(num_heads, nope, kv_lora)
    wide = np.ascontiguousarray(keys.transpose(0, 2, 1)).reshape(-1, nope)  # (H * kv_lora, nope)
    key_type = "F32" if name == "F32" else "F16"  # half precision is finer than any type but float32 that is found here
    packed = wide.astype(np.float32 if key_type == "F32" else np.float16).view(np.uint8)
    return matrix_view(packed, key_type, nope), matrix_view(values, name, kv_lora)
