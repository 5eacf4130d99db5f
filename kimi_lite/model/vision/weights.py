"""The tower's weights as the file has them, for the CPU and for a GPU."""

from typing import NamedTuple

import numpy as np

from kimi_lite.arch.moonvit import PATCH, POSITIONS, VisionFile
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.layouts import BY_NAME

FLOAT_TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(np.uint16)}


class Stored(NamedTuple):
    """A matrix (rows, k): values of a float type (BF16 as its bits), or the bytes of a quantized one."""

    type_name: str
    data: np.ndarray

    @property
    def is_float(self) -> bool:
        return self.type_name in FLOAT_TYPES

    def values(self) -> np.ndarray:
        """float32 (rows, k)."""
        if self.type_name == "BF16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        return self.data.astype(np.float32) if self.is_float else dequantize(self.data, self.type_name)


class VisionWeights:
    """Reads tensors of an open vision file that `arch.moonvit.read_vision_file` has checked."""

    def __init__(self, store: GGUFStore, file: VisionFile) -> None:
        self._store, self._file = store, file

    @property
    def has_quantized(self) -> bool:
        """Whether any matrix is of a type with scales: then all but the patch filter are multiplied in int8."""
        return any(tensor.layout.name not in FLOAT_TYPES for tensor in self._store.tensors.values())

    def vector(self, name: str) -> np.ndarray:
        """float32 (K,)."""
        tensor = self._store.tensor(name)
        return Stored(tensor.layout.name, _as_type(tensor.data.reshape(1, -1), tensor.layout.name)).values()[0].copy()

    def matrix(self, name: str) -> Stored:
        tensor = self._store.tensor(name)
        rows = tensor.data.reshape(tensor.shape[0], -1) if name == PATCH else tensor.data
        return Stored(tensor.layout.name, _as_type(rows, tensor.layout.name))

    def positions(self) -> np.ndarray:
        """The learned table, float32 (H, W, D)."""
        tensor, tower = self._store.tensor(POSITIONS), self._file.tower
        flat = Stored(tensor.layout.name, _as_type(tensor.data.reshape(-1, tensor.data.shape[-1]), tensor.layout.name))
        return flat.values().reshape(tower.height, tower.width, tower.hidden)

    def qkv(self, layer: int) -> tuple[Stored, np.ndarray]:
        """Queries, keys and values of a layer as one matrix (3 D, D), and their biases (3 D,)."""
        block = f"v.blk.{layer}."
        if self._file.tower.projector == "kimik25":
            return self.matrix(f"{block}attn_qkv.weight"), self.vector(f"{block}attn_qkv.bias")
        parts = [self.matrix(f"{block}attn_{letter}.weight") for letter in "qkv"]
        bias = np.concatenate([self.vector(f"{block}attn_{letter}.bias") for letter in "qkv"])
        if len({part.type_name for part in parts}) == 1:
            return Stored(parts[0].type_name, np.concatenate([part.data for part in parts])), bias
        return Stored("F32", np.concatenate([part.values() for part in parts])), bias


def _as_type(data: np.ndarray, type_name: str) -> np.ndarray:
    """uint8 (rows, row_bytes) as values where the type has no blocks."""
    assert data.dtype == np.uint8 and BY_NAME[type_name], (data.dtype, type_name)
    return data.view(FLOAT_TYPES[type_name]) if type_name in FLOAT_TYPES else data
