"""The end of the model: a norm, then a row of logits for each token."""

import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.tensors import head_name
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.hybrid.kernels import Kernels
from kimi_lite.model.hybrid.weights import DenseWeights


class Head:
    """Weights under their GGUF names."""

    def __init__(self, store: GGUFStore, weights: DenseWeights, config: ModelConfig, kernels: Kernels) -> None:
        self.kernels, self._eps = kernels, config.rms_norm_eps
        self.output_norm = weights.vector("output_norm.weight")
        self.output = weights.matrix(head_name(store.tensors))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> logits (T, vocabulary)."""
        return self.logits(self.kernels.rms_norm(x, self.output_norm, self._eps))

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """x behind `output_norm` (T, D) -> (T, vocabulary)."""
        return self.kernels.linear(normed, self.output)
