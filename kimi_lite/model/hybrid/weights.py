"""Dense weights on the device: as Q8_0 whatever the file holds, as bfloat16, or exactly as in the file.

Bytes go through pinned memory; what has another type is expanded and encoded again on the device itself, so that
loading takes as long as reading the file.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.mla import split_kv_b
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.gguf.store import GGUFStore, TensorView
from kimi_lite.model.cpu.weights import vector
from kimi_lite.model.hybrid.kernels import DenseMatrix, Kernels
from kimi_lite.native.layouts import BY_NAME

DenseType = Literal["q8_0", "bf16", "file"]
_STAGING_BYTES = 64 * 1024**2
_Q8_0, _LARGEST_Q8_0 = BY_NAME["Q8_0"], 127 * 65504


class DenseWeights:
    """Reads a store's tensors onto the device. `num_bytes`: what they take there."""

    def __init__(self, store: GGUFStore, streams: GpuStreams, kernels: Kernels, dense_type: DenseType = "q8_0") -> None:
        self._store, self._streams, self._kernels, self.dense_type = store, streams, kernels, dense_type
        self._staging = streams.pinned((_STAGING_BYTES,), torch.uint8)
        self.num_bytes = 0

    def matrix(self, *names: str) -> DenseMatrix:
        """One matrix, or several of the same inputs with their rows one behind the other. Raises KimiLiteError."""
        tensors = [self._store.tensor(name) for name in names]
        target = self._target_type(tensors, tensors[0].shape[-1])
        data = torch.cat([part for tensor in tensors for part in self._converted(tensor, target)])
        return self._kept(DenseMatrix(data, target, tensors[0].shape[-1]))

    def exact_matrix(self, name: str) -> DenseMatrix:
        """A matrix that no rounding may touch (a router): as in the file, or bfloat16 where that says the same."""
        tensor = self._store.tensor(name)
        data = torch.cat(list(self._uploaded(tensor)))
        if tensor.layout.name == "F32":
            values = data.view(torch.float32)
            narrow = values.to(torch.bfloat16)
            if torch.equal(narrow.to(torch.float32), values):
                return self._kept(DenseMatrix(narrow.view(torch.uint8), "BF16", tensor.shape[-1]))
        return self._kept(DenseMatrix(data, tensor.layout.name, tensor.shape[-1]))

    def vector(self, name: str) -> torch.Tensor:
        """A norm's weight or a bias as float32."""
        return torch.from_numpy(vector(self._store, name)).to(self._streams.device)

    def heads(self, config: ModelConfig, layer: int) -> tuple[DenseMatrix, DenseMatrix]:
        """W_UK (H, kv_lora, nope) and W_UV (H, v, kv_lora), multiplied head by head; older files join them in
        `attn_kv_b`."""
        prefix, c = f"blk.{layer}", config
        if f"{prefix}.attn_k_b.weight" in self._store.tensors:
            k_b, v_b = self.matrix(f"{prefix}.attn_k_b.weight"), self.matrix(f"{prefix}.attn_v_b.weight")
            return k_b.by_head(c.num_heads), v_b.by_head(c.num_heads)
        name = f"{prefix}.attn_kv_b.weight"
        tensor = self._store.tensor(name)
        joint = torch.cat([self._kernels.dequantize(part, tensor.layout.name) for part in self._uploaded(tensor)])
        key_rows, value_rows = split_kv_b(joint, c.num_heads, c.qk_nope_head_dim)  # (H, nope | v, kv_lora)
        keys = key_rows.transpose(1, 2).reshape(-1, c.qk_nope_head_dim)
        values = value_rows.reshape(-1, c.kv_lora_rank)
        return self._encoded(keys, name).by_head(c.num_heads), self._encoded(values, name).by_head(c.num_heads)

    def _encoded(self, values: torch.Tensor, name: str) -> DenseMatrix:
        """float32 (rows, k) that are in no file, in the type of dense weights."""
        target = "F32" if self.dense_type == "file" else self._target_type([], values.shape[1])
        return self._kept(DenseMatrix(_encode(values, target, name), target, values.shape[1]))

    def _kept(self, matrix: DenseMatrix) -> DenseMatrix:
        self.num_bytes += matrix.data.nbytes
        return matrix

    def _target_type(self, tensors: list[TensorView], k: int) -> str:
        """The type that these matrices of k inputs get together."""
        names = {tensor.layout.name for tensor in tensors}
        if self.dense_type == "file":
            return names.pop() if len(names) == 1 else "F32"
        return "Q8_0" if self.dense_type == "q8_0" and k % _Q8_0.block_size == 0 else "BF16"

    def _converted(self, tensor: TensorView, target: str) -> Iterator[torch.Tensor]:
        """The tensor's rows in the target type, uint8 (rows, row_bytes), a stretch at a time."""
        name = tensor.layout.name
        for part in self._uploaded(tensor):
            yield part if name == target else _encode(self._kernels.dequantize(part, name), target, tensor.name)

    def _uploaded(self, tensor: TensorView) -> Iterator[torch.Tensor]:
        """uint8 (rows, row_bytes) on the device, as many rows at a time as the staging holds."""
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        step = max(1, _STAGING_BYTES // rows.shape[1])
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            np.copyto(self._staging.numpy()[: part.size].reshape(part.shape), part)
            staged = self._staging[: part.size].view(part.shape)
            yield staged.to(self._streams.device, copy=True)  # waits: the staging is written again


def _encode(values: torch.Tensor, target: str, name: str) -> torch.Tensor:
    """float32 (rows, k) -> uint8 (rows, row_bytes) of Q8_0, BF16 or F32."""
    if target == "Q8_0":
        return quantize_q8_0(values, name)
    return values.to(torch.bfloat16 if target == "BF16" else torch.float32).contiguous().view(torch.uint8)


def quantize_q8_0(values: torch.Tensor, name: str) -> torch.Tensor:
    """(rows, k) float32 -> uint8 (rows, k / 32 * 34), the bytes of llama.cpp's reference quantizer. Raises
    KimiLiteError."""
    blocks = values.reshape(-1, _Q8_0.block_size)  # (B, 32)
    scale = blocks.abs().amax(dim=1) / 127
    stored = scale.to(torch.float16)
    if not bool(torch.isfinite(stored).all()):
        problem = f"Tensor {name} has a weight that Q8_0 cannot hold: its largest is {_LARGEST_Q8_0:,}"
        raise KimiLiteError(f"{problem}.", "The file is damaged, or needs --dense bf16.")
    inverse = 1 / scale
    inverse[~torch.isfinite(inverse)] = 0  # a block of zeros
    scaled = blocks * inverse[:, None]
    whole = scaled.trunc()
    codes = whole + (2 * (scaled - whole)).trunc()  # rounded half away from zero
    packed = torch.empty((len(blocks), _Q8_0.block_bytes), dtype=torch.uint8, device=values.device)
    packed[:, :2] = stored[:, None].view(torch.uint8)
    packed[:, 2:] = codes.to(torch.int8).view(torch.uint8)
    return packed.view(len(values), -1)
