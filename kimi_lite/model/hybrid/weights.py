"""Dense weights on the device, in the type that `arch.dense` gives them.

Bytes go through pinned memory; what has another type is expanded and encoded again on the device itself, so that
loading takes as long as reading the file.
"""

from collections.abc import Iterator
from math import prod

import numpy as np
import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.dense import dense_layout
from kimi_lite.arch.mla import split_kv_b
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.gguf.store import GGUFStore, TensorView
from kimi_lite.model.cpu.weights import vector
from kimi_lite.model.hybrid.encode import encode
from kimi_lite.model.hybrid.kernels import MAX_DECODE_TOKENS, DenseMatrix, Kernels
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.plan.workspace import LOADING_BYTES

_ENCODED_WEIGHTS = 1 << 23  # at a time: the search for scales holds ten float32 copies


class DenseWeights:
    """Reads a store's tensors onto the device. `num_bytes`: what they take there."""

    def __init__(self, store: GGUFStore, streams: GpuStreams, kernels: Kernels, dense_type: str) -> None:
        self._store, self._streams, self._kernels, self.dense_type = store, streams, kernels, dense_type
        self._staging = streams.pinned((LOADING_BYTES,), torch.uint8)
        self.num_bytes = 0

    def matrix(self, *names: str) -> DenseMatrix:
        """One matrix, or several of the same inputs with their rows one behind the other. Raises KimiLiteError."""
        tensors = [self._store.tensor(name) for name in names]
        target = self._target_type(tensors, tensors[0].shape[-1])
        parts = (part for tensor in tensors for part in self._converted(tensor, target))
        return self._kept(DenseMatrix(self._gathered(parts, tensors, target), target, tensors[0].shape[-1]))

    def matrices(self, *names: str) -> list[DenseMatrix]:
        """Matrices of the same inputs: as one where they have one type here. Raises KimiLiteError."""
        tensors = [self._store.tensor(name) for name in names]
        types = {self._target_type([tensor], tensor.shape[-1]) for tensor in tensors}
        return [self.matrix(*names)] if len(types) == 1 else [self.matrix(name) for name in names]

    def activation_type(self, num_tokens: int) -> torch.dtype:
        """Of what goes into products: a prompt's are rounded to bfloat16, except where dense weights are as in the
        file, so that nothing but they decides."""
        is_prompt = num_tokens > MAX_DECODE_TOKENS
        return torch.bfloat16 if is_prompt and self.dense_type != "file" else torch.float32

    def exact_matrix(self, name: str) -> DenseMatrix:
        """A matrix that no rounding may touch (a router): as in the file, or bfloat16 where that says the same."""
        tensor = self._store.tensor(name)
        data = self._gathered(self._uploaded(tensor), [tensor], tensor.layout.name)
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
        target = self._target_type([], values.shape[1])
        return self._kept(DenseMatrix(encode(values, target, name), target, values.shape[1]))

    def _kept(self, matrix: DenseMatrix) -> DenseMatrix:
        self.num_bytes += matrix.data.nbytes
        return matrix

    def _target_type(self, tensors: list[TensorView], k: int) -> str:
        """The type that these matrices of k inputs get together."""
        return dense_layout(self.dense_type, [tensor.layout for tensor in tensors], k).name

    def _gathered(self, parts: Iterator[torch.Tensor], tensors: list[TensorView], target: str) -> torch.Tensor:
        """uint8 (rows, row_bytes): the parts one behind the other, in memory that is taken once."""
        num_rows = sum(prod(tensor.shape[:-1]) for tensor in tensors)
        row_bytes = BY_NAME[target].row_bytes(tensors[0].shape[-1])
        data = torch.empty((num_rows, row_bytes), dtype=torch.uint8, device=self._streams.device)
        first = 0
        for part in parts:
            data[first : first + len(part)] = part
            first += len(part)
        assert first == num_rows, (first, num_rows)
        return data

    def _converted(self, tensor: TensorView, target: str) -> Iterator[torch.Tensor]:
        """The tensor's rows in the target type, uint8 (rows, row_bytes), a stretch at a time."""
        name = tensor.layout.name
        if name == target:
            yield from self._uploaded(tensor)
            return
        for part in self._uploaded(tensor, _ENCODED_WEIGHTS // tensor.shape[-1]):
            yield encode(self._kernels.dequantize(part, name), target, tensor.name)

    def _uploaded(self, tensor: TensorView, most_rows: int = 1 << 31) -> Iterator[torch.Tensor]:
        """uint8 (rows, row_bytes) on the device, as many rows at a time as the staging holds."""
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        step = max(1, min(LOADING_BYTES // rows.shape[1], most_rows))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            np.copyto(self._staging.numpy()[: part.size].reshape(part.shape), part)
            staged = self._staging[: part.size].view(part.shape)
            yield staged.to(self._streams.device, copy=True)  # waits: the staging is written again
