"""One transformer layer on the device: attention, then a dense feed-forward or router, shared expert and routed
experts."""

from functools import partial

import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.hybrid.attention import Attention
from kimi_lite.model.hybrid.deferral import Deferral
from kimi_lite.model.hybrid.feed_forward import FeedForward, Router
from kimi_lite.model.hybrid.kernels import Kernels, Residents
from kimi_lite.model.hybrid.routed import RoutedExperts
from kimi_lite.model.hybrid.step import Step
from kimi_lite.model.hybrid.weights import DenseWeights
from kimi_lite.native.gpu.arguments import ChoiceRows


class Layer:
    """`storage`: this layer's pages of the cache."""

    def __init__(
        self,
        store: GGUFStore,
        weights: DenseWeights,
        config: ModelConfig,
        number: int,
        storage: torch.Tensor,
        kernels: Kernels,
        residents: Residents,
    ) -> None:
        ffn = f"blk.{number}.ffn"
        self.number, self._storage, self._kernels, self._eps = number, storage, kernels, config.rms_norm_eps
        self.attention = Attention(weights, config, number, kernels)
        self.ffn_norm = weights.vector(f"{ffn}_norm.weight")
        self.is_dense = number < config.num_dense_layers
        self.dense = FeedForward(weights, ffn + "_{}.weight", kernels) if self.is_dense else None
        self.router = None if self.is_dense else Router(store, weights, config, number, kernels, residents)
        has_shared = not self.is_dense and config.num_shared_experts > 0
        self.shared = FeedForward(weights, ffn + "_{}_shexp.weight", kernels) if has_shared else None

    def forward(self, x: torch.Tensor, step: Step, experts: RoutedExperts | None) -> None:
        """x (T, D) += attention, then += feed-forward, all of it."""
        normed = self.attend(x, step)
        if self.router is not None:
            ids, weights, _ = self.router.forward(normed)
            shared_expert = partial(self.shared_expert, normed)
            x += experts.forward(self.number, normed, ids, weights, shared_expert, may_stream=not step.is_decoding)

    def decode(
        self,
        x: torch.Tensor,
        normed: torch.Tensor,
        step: Step,
        experts: RoutedExperts | None,
        first: torch.Tensor,
        next_norm: torch.Tensor,
        deferral: Deferral | None = None,
    ) -> torch.Tensor:
        """`forward` as a part of a captured step, in few launches: the host does nothing, and the CPU's experts take a
        turn (`RoutedExperts.turn` for `first`).

        normed: x (T, D) behind `attn_norm`. Returns the new x behind `next_norm`, which comes after this layer.
        """
        kernels, eps = self._kernels, self._eps
        attended = self.attention.forward(normed, self._storage, step)
        if self.dense is not None:
            normed = kernels.rms_norm(x, self.ffn_norm, eps, delta=attended)
            return kernels.rms_norm(x, next_norm, eps, delta=self.dense.forward(normed))
        turn = experts.turn(self.number, first)
        normed = kernels.rms_norm(x, self.ffn_norm, eps, delta=attended, also=turn.x[: len(x)])
        routes = self.router.forward(normed, turn)
        hit_rows = experts.hit_rows(self.number, normed, routes.slots.view(-1))
        shared = self.shared_expert(normed)
        kernels.await_answer(turn)
        weights = routes.weights
        if deferral is not None:
            shared = deferral.add_left(shared)
            weights = deferral.leave(self.number, turn, routes, hit_rows)
        rows = ChoiceRows(routes.slots.view(-1), hit_rows, turn.memory.rows)
        return kernels.join(x, rows, weights, shared, next_norm, eps, arrivals=turn.memory.arrivals)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """x behind `attn_norm`, (T, D)."""
        return self._kernels.rms_norm(x, self.attention.attn_norm, self._eps)

    def attend(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x += attention; of a dense layer += feed-forward too. Returns what router and experts read, (T, D)."""
        attended = self.attention.forward(self.normed(x), self._storage, step)
        normed = self._kernels.rms_norm(x, self.ffn_norm, self._eps, delta=attended)
        if self.dense is not None:
            x += self.dense.forward(normed)
        return normed

    def shared_expert(self, normed: torch.Tensor) -> torch.Tensor | None:
        """What every token takes as well as its routed experts, (T, D); None where there is no shared expert."""
        return None if self.shared is None else self.shared.forward(normed)
