"""Where the bytes of every routed expert lie in the model's files, and how much room a slot needs to hold one.

Gate, up and down of an expert are three runs of bytes in one or more shards (two tensors, where gate and up are fused).
A slot holds them one behind the other in whole blocks of the disk, so that they can be read past the page cache. Layers
may have other types and so need other slots: those of equal size share a pool.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.reader import FileRun
from kimi_lite.gguf.store import GGUFStore, TensorView


@dataclass(frozen=True, slots=True)
class LayerPlaces:
    """Gate, up and down of expert e: `num_bytes` each, from `starts + e * strides` on."""

    files: tuple[int, int, int]
    starts: tuple[int, int, int]
    strides: tuple[int, int, int]
    num_bytes: tuple[int, int, int]

    @property
    def expert_bytes(self) -> int:
        return sum(self.num_bytes)

    @property
    def slot_bytes(self) -> int:
        return sum(run.room_bytes for run in self.runs(0))

    def runs(self, expert: int) -> list[FileRun]:
        places = zip(self.files, self.starts, self.strides, self.num_bytes, strict=True)
        return [FileRun(file, start + expert * stride, num_bytes) for file, start, stride, num_bytes in places]

    def rooms(self, expert: int, slot: np.ndarray) -> list[tuple[FileRun, np.ndarray]]:
        """Each run with its part of `slot` (uint8, `slot_bytes`)."""
        found, at = [], 0
        for run in self.runs(expert):
            found.append((run, slot[at : at + run.room_bytes]))
            at += run.room_bytes
        return found


@dataclass(frozen=True, slots=True)
class ExpertPlaces:
    """Of all layers that have routed experts."""

    shards: tuple[Path, ...]
    layers: dict[int, LayerPlaces]
    num_experts: int

    @property
    def routed_bytes(self) -> int:
        return self.num_experts * sum(layer.expert_bytes for layer in self.layers.values())

    @property
    def pools(self) -> dict[int, list[int]]:
        """Slot bytes -> layers whose experts need such slots."""
        found: dict[int, list[int]] = defaultdict(list)
        for layer, places in self.layers.items():
            found[places.slot_bytes].append(layer)
        return dict(found)


def find_places(store: GGUFStore, config: ModelConfig) -> ExpertPlaces:
    """Raises KimiLiteError for a missing tensor."""
    shards: dict[Path, int] = {}
    layers = {
        layer: _layer_places(store, layer, config.expert_feed_forward_size, shards)
        for layer in range(config.num_dense_layers, config.num_layers)
    }
    return ExpertPlaces(tuple(shards), layers, config.num_experts)


def _layer_places(store: GGUFStore, layer: int, width: int, shards: dict[Path, int]) -> LayerPlaces:
    block, down = f"blk.{layer}", store.tensor(f"blk.{layer}.ffn_down_exps.weight")
    fused = store.tensors.get(f"{block}.ffn_gate_up_exps.weight")
    gate = fused or store.tensor(f"{block}.ffn_gate_exps.weight")
    up = fused or store.tensor(f"{block}.ffn_up_exps.weight")
    views = [(gate, 0, width), (up, width if fused else 0, width), (down, 0, down.shape[1])]
    return LayerPlaces(
        tuple(shards.setdefault(tensor.shard, len(shards)) for tensor, _, _ in views),
        tuple(tensor.start + first * _row_bytes(tensor) for tensor, first, _ in views),
        tuple(tensor.shape[1] * _row_bytes(tensor) for tensor, _, _ in views),
        tuple(num_rows * _row_bytes(tensor) for tensor, _, num_rows in views),
    )


def _row_bytes(tensor: TensorView) -> int:
    return tensor.layout.row_bytes(tensor.shape[-1])
