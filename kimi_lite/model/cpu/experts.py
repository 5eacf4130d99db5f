"""A layer's experts as the CPU's kernels see them: a table of one address per matrix.

The addresses lie in the mapped file (`experts.index` says where). Where not all experts fit into RAM, `experts.ram`
writes the addresses of its slots into the same table, and the kernels read those.
"""

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.index import RoutedLayer
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.cpu.weights import Matrix, matrix, matrix_view
from kimi_lite.native.cpu.matrix import MATRIX_BYTES
from kimi_lite.native.cpu.matrix import K as K_CELL


class LayerExperts:
    """One layer's feed-forward matrices: routed experts first, then those that every token takes."""

    def __init__(self, matrices: list[tuple[Matrix, Matrix, Matrix]], num_always: int) -> None:
        self.matrices, self.num_always = matrices, num_always
        self.table = np.stack([np.stack([m.table for m in expert]) for expert in matrices])  # (experts, 3, 8) int64
        assert self.table.strides[1] == MATRIX_BYTES, self.table.strides

    @property
    def width(self) -> int:
        """Intermediate size of an expert."""
        return int(self.table[0, 2, K_CELL // 8])

    @property
    def input_kinds(self) -> set[int]:
        return {m.kind for gate, up, _ in self.matrices for m in (gate, up)} - {0}

    @property
    def hidden_kinds(self) -> set[int]:
        return {down.kind for _, _, down in self.matrices} - {0}


def layer_experts(store: GGUFStore, config: ModelConfig, layer: int) -> list[LayerExperts]:
    """The groups of experts of a layer, run one after the other: usually one; two where a shared expert cannot be
    cut."""
    prefix = f"blk.{layer}"
    if layer < config.num_dense_layers:
        return [LayerExperts([_feed_forward(store, f"{prefix}.ffn_{{}}.weight")], num_always=1)]
    width = config.expert_feed_forward_size
    routed = _routed(RoutedLayer.find(store, config, layer), config.num_experts)
    if not config.num_shared_experts:
        return [LayerExperts(routed, num_always=0)]
    shared = _feed_forward(store, f"{prefix}.ffn_{{}}_shexp.weight")
    pieces = _cut(shared, width)
    if pieces is None:
        return [LayerExperts(routed, num_always=0), LayerExperts([shared], num_always=1)]
    return [LayerExperts([*routed, *pieces], num_always=len(pieces))]


def _feed_forward(store: GGUFStore, pattern: str) -> tuple[Matrix, Matrix, Matrix]:
    gate, up, down = (matrix(store, pattern.format(name)) for name in ("gate", "up", "down"))
    return gate, up, down


def _routed(layer: RoutedLayer, num_experts: int) -> list[tuple[Matrix, Matrix, Matrix]]:
    """Gate, up and down of each routed expert, in the mapped file."""
    gate, up, down = (
        [matrix_view(each.data[e], each.layout_name, each.k) for e in range(num_experts)] for each in layer.matrices
    )
    return list(zip(gate, up, down, strict=True))


def _cut(shared: tuple[Matrix, Matrix, Matrix], width: int) -> list[tuple[Matrix, Matrix, Matrix]] | None:
    """A shared expert of n times the width as n experts of it; None where a block of `down` crosses the border."""
    gate, up, down = shared
    count, block_size = gate.data.shape[0] // width, down.layout.block_size
    if count > 1 and width % block_size:
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
