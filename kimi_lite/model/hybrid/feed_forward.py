"""The dense half of feed-forward on the device: dense layers, router, shared expert. Routed experts are in
`hybrid.routed`."""

from typing import NamedTuple

import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.hybrid.kernels import MAX_DECODE_TOKENS, Kernels, RouterRule
from kimi_lite.model.hybrid.weights import DenseWeights


class FeedForward:
    """down(silu(gate x) * up x): a dense layer's, or the shared expert that every token takes."""

    def __init__(self, weights: DenseWeights, pattern: str, kernels: Kernels) -> None:
        """pattern: of the tensor names, with {} for gate, up and down."""
        self._kernels = kernels
        self.gate_up = weights.matrix(pattern.format("gate"), pattern.format("up"))
        self.down = weights.matrix(pattern.format("down"))

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        gate, up = self._kernels.linear(normed, self.gate_up).chunk(2, dim=1)
        return self._kernels.linear(self._kernels.swiglu(gate, up), self.down)


class ResidentGain(NamedTuple):
    """What the experts of a layer that have a slot in VRAM gain in the router's choice (arXiv 2412.00099)."""

    slot_of: torch.Tensor  # int32 (E,) on the device, live; -1: no slot
    cache_bias: float


class Router:
    """Scores, selection bias, top-k, in float32."""

    def __init__(
        self,
        store: GGUFStore,
        weights: DenseWeights,
        config: ModelConfig,
        layer: int,
        kernels: Kernels,
        gain: ResidentGain | None = None,
    ) -> None:
        bias = f"blk.{layer}.exp_probs_b.bias"
        self._kernels, self._rule, self._gain = kernels, RouterRule.of(config), gain
        self.ffn_gate_inp = weights.exact_matrix(f"blk.{layer}.ffn_gate_inp.weight")
        self.exp_probs_b = weights.vector(bias) if bias in store.tensors else None

    def forward(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, D) -> expert ids int32 (T, K), weights (T, K)."""
        logits = self._logits(normed)
        bias = self.exp_probs_b
        if self._gain is not None:
            gain = (self._gain.slot_of >= 0) * self._gain.cache_bias
            bias = gain if bias is None else bias + gain
        return self._kernels.route(logits, bias, self._rule)

    def _logits(self, normed: torch.Tensor) -> torch.Tensor:
        """(T, E) in float32 however many tokens there are: `linear` would round what many tokens bring to bfloat16."""
        matrix = self.ffn_gate_inp
        if len(normed) <= MAX_DECODE_TOKENS:
            return self._kernels.linear(normed, matrix)
        return torch.mm(normed, self._kernels.dequantize(matrix.data, matrix.layout_name).T)
