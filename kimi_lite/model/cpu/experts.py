"""A layer's experts as the CPU's kernels see them: a table of one address per matrix.

The addresses lie in the mapped file (`experts.index` says where). Where not all experts fit into RAM, `experts.ram`
writes the addresses of its slots into the same table, and the kernels read those.
"""

from collections.abc import Sequence

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.index import RoutedLayer
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.cpu.weights import Matrix, matrix, matrix_view
from kimi_lite.native.cpu.matrix import DATA, MATRIX_BYTES
from kimi_lite.native.cpu.matrix import K as K_CELL


class LayerExperts:
    """One layer's feed-forward matrices: routed experts first, then those that every token takes."""

    def __init__(
        self,
        routed: RoutedLayer | None = None,
        num_routed: int = 0,
        always: Sequence[tuple[Matrix, Matrix, Matrix]] = (),
    ) -> None:
        """routed: gate, up and down of `num_routed` experts; always: those of the others."""
        self.num_routed, self.num_always = num_routed, len(always)
        self.table = np.empty((num_routed + len(always), 3, MATRIX_BYTES // 8), np.int64)
        self._first = []  # gate, up and down of one expert of each kind; they keep the mapping alive
        if routed:
            self._first.append([matrix_view(each.data[0], each.layout_name, each.k) for each in routed.matrices])
            self.table[:num_routed] = [each.table for each in self._first[0]]
            strides = np.array([each.stride for each in routed.matrices])
            self.table[:num_routed, :, DATA // 8] += np.arange(num_routed)[:, None] * strides
        for number, expert in enumerate(always, start=num_routed):
            self._first.append(expert)
            self.table[number] = [each.table for each in expert]

    @property
    def width(self) -> int:
        """Intermediate size of an expert."""
        return int(self.table[0, 2, K_CELL // 8])

    @property
    def input_kinds(self) -> set[int]:
        return {m.kind for gate, up, _ in self._first for m in (gate, up)} - {0}

    @property
    def hidden_kinds(self) -> set[int]:
        return {down.kind for _, _, down in self._first} - {0}


def layer_experts(store: GGUFStore, config: ModelConfig, layer: int) -> list[LayerExperts]:
    """The groups of experts of a layer, run one after the other: usually one; two where a shared expert cannot be
    cut."""
    prefix = f"blk.{layer}"
    if layer < config.num_dense_layers:
        return [LayerExperts(always=[_feed_forward(store, f"{prefix}.ffn_{{}}.weight")])]
    routed = RoutedLayer.find(store, config, layer)
    if not config.num_shared_experts:
        return [LayerExperts(routed, config.num_experts)]
    shared = _feed_forward(store, f"{prefix}.ffn_{{}}_shexp.weight")
    pieces = _cut(shared, config.expert_feed_forward_size)
    if pieces is None:
        return [LayerExperts(routed, config.num_experts), LayerExperts(always=[shared])]
    return [LayerExperts(routed, config.num_experts, pieces)]


def _feed_forward(store: GGUFStore, pattern: str) -> tuple[Matrix, Matrix, Matrix]:
    gate, up, down = (matrix(store, pattern.format(name)) for name in ("gate", "up", "down"))
    return gate, up, down


def _cut(shared: tuple[Matrix, Matrix, Matrix], width: int) -> list[tuple[Matrix, Matrix, Matrix]] | None:
    """A shared expert of n times the width as n experts of it; None where a block of `down` crosses the border or its
    rows have a scale in front."""
    gate, up, down = shared
    count, block_size = gate.data.shape[0] // width, down.layout.block_size
    if count > 1 and (width % block_size or down.layout.row_scale):
        return None
    piece_bytes = down.layout.row_bytes(width) if count > 1 else 0
    return [
        (
            matrix_view(gate.data[i * width : (i + 1) * width], gate.layout.name, gate.k),
            matrix_view(up.data[i * width : (i + 1) * width], up.layout.name, up.k),
            matrix_view(down.data[:, i * piece_bytes :], down.layout.name, width),
        )
        for i in range(count)
    ]
