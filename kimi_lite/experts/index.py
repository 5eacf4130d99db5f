"""Where the bytes of every routed expert lie: the one description that everything which touches an expert reads.

Gate, up and down of an expert are three runs of bytes in one or more shards (in two tensors where gate and up are
fused, gate first). A slot holds them one behind the other:

    in VRAM   packed: each on a border of 256 bytes, exactly as the file has them; `offset` says where
    in RAM    in whole blocks of the disk, so that they can be read past the page cache; `reads` says where

The CPU's tables (`model.cpu.experts`), slots in VRAM and prompt streams (through `experts.store`), the disk reader
(`experts.ram`) and the GPU's kernels (`native.gpu.experts`, as an `ExpertForm` of `ExpertMatrix`) all read this index.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import GATE_UP, slot_aligned
from kimi_lite.experts.reader import FileRun
from kimi_lite.gguf.store import GGUFStore, TensorView


@dataclass(frozen=True, slots=True, eq=False)
class RoutedMatrix:
    """Gate, up or down of a layer's experts: of each, (num_rows, k) weights of one type.

    Expert e: `num_bytes` from `start + e * stride` on in `shard`; the same bytes are `data[e]`.
    """

    tensor: str  # GGUF name
    shard: Path
    start: int  # bytes
    stride: int  # bytes
    data: np.ndarray  # uint8 (experts, num_rows, row_bytes), read-only: the mapped file
    layout_name: str
    offset: int  # bytes into a slot in VRAM
    num_rows: int
    k: int
    row_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    @property
    def end(self) -> int:
        """Bytes into a slot in VRAM."""
        return self.offset + self.num_bytes

    def run(self, expert: int) -> FileRun:
        return FileRun(self.shard, self.start + expert * self.stride, self.num_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class RoutedLayer:
    """The matrices of one layer's routed experts."""

    gate: RoutedMatrix
    up: RoutedMatrix
    down: RoutedMatrix

    @classmethod
    def find(cls, store: GGUFStore, config: ModelConfig, layer: int) -> "RoutedLayer":
        """Raises KimiLiteError for a missing tensor."""
        prefix, width, hidden_size = f"blk.{layer}", config.expert_feed_forward_size, config.hidden_size
        down = store.tensor(f"{prefix}.ffn_down_exps.weight")
        fused = store.tensors.get(f"{prefix}.{GATE_UP}")
        gate = fused or store.tensor(f"{prefix}.ffn_gate_exps.weight")
        up = fused or store.tensor(f"{prefix}.ffn_up_exps.weight")
        first = _rows(gate, 0, width, hidden_size, 0)
        second = _rows(up, width if fused else 0, width, hidden_size, slot_aligned(first.end))
        return cls(first, second, _rows(down, 0, hidden_size, width, slot_aligned(second.end)))

    @property
    def matrices(self) -> tuple[RoutedMatrix, RoutedMatrix, RoutedMatrix]:
        return self.gate, self.up, self.down

    @property
    def width(self) -> int:
        """Intermediate size of an expert."""
        return self.down.k

    @property
    def hidden_size(self) -> int:
        return self.gate.k

    @property
    def expert_bytes(self) -> int:
        """Of one expert, in the file."""
        return sum(matrix.num_bytes for matrix in self.matrices)

    @property
    def vram_slot_bytes(self) -> int:
        return slot_aligned(self.down.end)

    @property
    def ram_slot_bytes(self) -> int:
        return sum(matrix.run(0).target_bytes for matrix in self.matrices)

    def reads(self, expert: int, slot: np.ndarray) -> list[tuple[FileRun, np.ndarray]]:
        """Each of the expert's runs with its part of a slot in RAM (uint8, at least `ram_slot_bytes`)."""
        found, at = [], 0
        for matrix in self.matrices:
            run = matrix.run(expert)
            found.append((run, slot[at : at + run.target_bytes]))
            at += run.target_bytes
        return found


@dataclass(frozen=True, slots=True, eq=False)
class ExpertIndex:
    """Of all layers that have routed experts, or of those that one of several GPUs has."""

    layers: dict[int, RoutedLayer]
    num_layers: int  # of the model, dense ones included
    num_experts: int  # of a layer
    is_whole: bool = True  # `layers` are all that the model has

    @classmethod
    def find(cls, store: GGUFStore, config: ModelConfig, among: range | None = None) -> "ExpertIndex":
        """among: only these of the model's layers. Raises KimiLiteError for a missing tensor."""
        numbers = range(config.num_dense_layers, config.num_layers) if config.num_experts else ()
        own = [number for number in numbers if among is None or number in among]
        layers = {number: RoutedLayer.find(store, config, number) for number in own}
        return cls(layers, config.num_layers, config.num_experts, is_whole=len(own) == len(numbers))

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files that hold experts, in the order of the layers."""
        return tuple(dict.fromkeys(m.shard for layer in self.layers.values() for m in layer.matrices))

    @property
    def routed_bytes(self) -> int:
        """All experts, in the file."""
        return self.num_experts * sum(layer.expert_bytes for layer in self.layers.values())

    @property
    def mean_expert_bytes(self) -> float:
        """Of an expert, in the file; layers may differ in types."""
        return sum(layer.expert_bytes for layer in self.layers.values()) / len(self.layers)

    @property
    def relative_sizes(self) -> dict[int, float]:
        """By layer: bytes of an expert in those of a mean one."""
        return {number: layer.expert_bytes / self.mean_expert_bytes for number, layer in self.layers.items()}

    @property
    def vram_slot_bytes(self) -> int:
        """Bytes that hold an expert of any layer; types may differ between layers."""
        return max((layer.vram_slot_bytes for layer in self.layers.values()), default=0)

    @property
    def piece_bytes(self) -> int:
        """Memory that takes gate, up or down of any expert with the disk's blocks around it."""
        return max((m.run(0).target_bytes for layer in self.layers.values() for m in layer.matrices), default=0)

    @property
    def ram_pools(self) -> dict[int, list[int]]:
        """Bytes of a slot in RAM -> layers whose experts need such slots: those of equal size share a pool."""
        found: dict[int, list[int]] = defaultdict(list)
        for number, layer in self.layers.items():
            found[layer.ram_slot_bytes].append(number)
        return dict(found)

    @property
    def ram_bytes(self) -> int:
        """Slots in RAM for every expert."""
        return self.num_experts * sum(layer.ram_slot_bytes for layer in self.layers.values())


def _rows(tensor: TensorView, first: int, num_rows: int, k: int, offset: int) -> RoutedMatrix:
    """Rows `first` .. `first + num_rows` of each expert of a tensor (experts, rows, k)."""
    rows_in_tensor, row_bytes = tensor.data.shape[1:]
    assert first + num_rows <= rows_in_tensor, (tensor.name, tensor.shape, first, num_rows)
    return RoutedMatrix(
        tensor=tensor.name,
        shard=tensor.shard,
        start=tensor.start + first * row_bytes,
        stride=rows_in_tensor * row_bytes,
        data=tensor.data[:, first : first + num_rows],
        layout_name=tensor.layout.name,
        offset=offset,
        num_rows=num_rows,
        k=k,
        row_bytes=row_bytes,
    )
