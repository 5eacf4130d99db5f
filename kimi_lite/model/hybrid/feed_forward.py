"""The dense half of feed-forward on the device: dense layers, router, shared expert. Routed experts are in
`hybrid.routed`."""

import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.hybrid.kernels import Kernels, Residents, RouterRule
from kimi_lite.model.hybrid.turns import Turn
from kimi_lite.model.hybrid.weights import DenseWeights
from kimi_lite.native.gpu.arguments import Routes


class FeedForward:
    """down(silu(gate x) * up x): a dense layer's, or the shared expert that every token takes."""

    def __init__(self, weights: DenseWeights, pattern: str, kernels: Kernels) -> None:
        """pattern: of the tensor names, with {} for gate, up and down."""
        self._kernels, self._activation_type = kernels, weights.activation_type
        self.gate_up = weights.matrix(pattern.format("gate"), pattern.format("up"))
        self.down = weights.matrix(pattern.format("down"))

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        kernels, dtype = self._kernels, self._activation_type(len(normed))
        gate, up = kernels.linear(normed.to(dtype), self.gate_up).chunk(2, dim=1)
        return kernels.linear(kernels.swiglu(gate, up, dtype=dtype), self.down)


class Router:
    """Scores, selection bias, top-k, in float32."""

    def __init__(
        self,
        store: GGUFStore,
        weights: DenseWeights,
        config: ModelConfig,
        layer: int,
        kernels: Kernels,
        residents: Residents,
    ) -> None:
        bias = f"blk.{layer}.exp_probs_b.bias"
        self._kernels, self._rule, self._residents = kernels, RouterRule.of(config), residents
        self.ffn_gate_inp = weights.exact_matrix(f"blk.{layer}.ffn_gate_inp.weight")
        self.exp_probs_b = weights.vector(bias) if bias in store.tensors else None

    def forward(self, normed: torch.Tensor, turn: Turn | None = None) -> Routes:
        """(T, D) -> experts, weights and slots of T tokens' choices. turn: who is told of them, where the CPU waits."""
        logits = self._kernels.linear(normed, self.ffn_gate_inp, is_exact=True)
        return self._kernels.route(logits, self.exp_probs_b, self._rule, self._residents, turn)
