"""Routed experts as runs of bytes: how a GPU slot holds one, and how its bytes get there from the mapped file.

A slot holds gate, up and down of one expert exactly as the file has them, one behind the other, each on a border of 256
bytes.
"""

from dataclasses import dataclass

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.store import GGUFStore

_ALIGNMENT_BYTES = 256  # of the matrices in a slot, and of slots


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of an expert inside its slot: (rows, k) weights of one type from `offset` on."""

    layout_name: str
    offset: int
    num_rows: int
    k: int
    row_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class SlotForm:
    """One layer's experts as a slot holds them."""

    gate: Part
    up: Part
    down: Part

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.gate, self.up, self.down

    @property
    def width(self) -> int:
        """Intermediate size of an expert."""
        return self.down.k

    @property
    def hidden_size(self) -> int:
        return self.gate.k

    @property
    def num_bytes(self) -> int:
        """Bytes a slot needs."""
        return _align(self.down.offset + self.down.num_bytes)


class ExpertSource:
    """The routed experts of a model in its mapped file, layer by layer."""

    def __init__(self, store: GGUFStore, config: ModelConfig) -> None:
        self.num_experts = config.num_experts
        self.first_layer, self.num_layers = config.num_dense_layers, config.num_layers
        self._views = {layer: _views(store, config, layer) for layer in range(self.first_layer, config.num_layers)}
        self._forms = {layer: _form(views) for layer, views in self._views.items()}

    @property
    def slot_bytes(self) -> int:
        """Bytes that hold an expert of any layer; types may differ between layers."""
        return max((form.num_bytes for form in self._forms.values()), default=0)

    def form(self, layer: int) -> SlotForm:
        return self._forms[layer]

    def copy_into(self, layer: int, expert: int, slot: np.ndarray) -> None:
        """Write an expert's bytes into `slot` (uint8, at least its form's `num_bytes`). Any thread may call this."""
        for part, (_, _, data) in zip(self._forms[layer].parts, self._views[layer], strict=True):
            np.copyto(slot[part.offset : part.offset + part.num_bytes], data[expert].reshape(-1))


def _views(store: GGUFStore, config: ModelConfig, layer: int) -> list[tuple[str, int, np.ndarray]]:
    """Type, inputs and uint8 (experts, rows, row_bytes) of gate, up and down; gate and up may lie in one tensor, gate
    first."""
    block, width = f"blk.{layer}", config.expert_feed_forward_size
    down = store.tensor(f"{block}.ffn_down_exps.weight")
    fused = store.tensors.get(f"{block}.ffn_gate_up_exps.weight")
    gate = fused or store.tensor(f"{block}.ffn_gate_exps.weight")
    up = fused or store.tensor(f"{block}.ffn_up_exps.weight")
    first = width if fused else 0
    return [
        (gate.layout.name, config.hidden_size, gate.data[:, :width]),
        (up.layout.name, config.hidden_size, up.data[:, first : first + width]),
        (down.layout.name, width, down.data),
    ]


def _form(views: list[tuple[str, int, np.ndarray]]) -> SlotForm:
    parts, offset = [], 0
    for name, k, data in views:
        parts.append(Part(name, offset, data.shape[1], k, data.shape[2]))
        offset = _align(offset + parts[-1].num_bytes)
    return SlotForm(*parts)


def _align(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
