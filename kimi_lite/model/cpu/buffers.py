"""The activations of a run: every intermediate of a layer, allocated once and shared by all layers."""

from typing import NamedTuple

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.attention import AttentionBuffers
from kimi_lite.native.latent_rows import MlaShape


class RouterBuffers(NamedTuple):
    """What a router reads and writes, for `capacity` tokens."""

    normed: Activations  # (capacity, hidden)
    logits: np.ndarray  # (capacity, E), scores afterwards
    choice: np.ndarray  # (capacity, E), working space
    ids: np.ndarray  # int32 (capacity, K)
    weights: np.ndarray  # (capacity, K)

    @classmethod
    def make(cls, normed: Activations, num_experts: int, top_k: int) -> "RouterBuffers":
        """For a layer without experts both numbers are 0."""
        logits = np.zeros((normed.capacity, num_experts), np.float32)
        ids = np.zeros((normed.capacity, top_k), np.int32)
        return cls(normed, logits, np.zeros_like(logits), ids, np.zeros(ids.shape, np.float32))


class DeferralBuffers(NamedTuple):
    """What a layer with deferred experts keeps until the next one has added them. Two of them take turns."""

    router: RouterBuffers  # with an input of its own: the next layer's norms write elsewhere
    now: np.ndarray  # int32 (capacity, K): choices of this layer, -1 for those that come later
    later: np.ndarray  # and the others

    @classmethod
    def make(cls, normed: Activations, num_experts: int, top_k: int) -> "DeferralBuffers":
        router = RouterBuffers.make(normed, num_experts, top_k)
        return cls(router, router.ids.copy(), router.ids.copy())


class Buffers:
    """Arrays for `capacity` tokens; `kinds` says which int8 forms each of the layers' inputs needs."""

    def __init__(
        self,
        config: ModelConfig,
        shape: MlaShape,
        capacity: int,
        num_absorbed: int,
        kinds: dict,
        has_deferral: bool = False,
    ) -> None:
        c = config
        self.capacity, self._kinds = capacity, kinds
        self.x = np.zeros((capacity, c.hidden_size), np.float32)  # the residual stream
        self.normed = Activations(capacity, c.hidden_size, kinds["normed"])
        if c.q_lora_rank:
            self.q_compressed = Activations(capacity, c.q_lora_rank, kinds["q_compressed"])
        self.q = np.zeros((capacity, c.num_heads * c.qk_head_dim), np.float32)
        self.kv = np.zeros((capacity, c.kv_latent_size), np.float32)
        self.attention = AttentionBuffers(num_absorbed, shape, kinds["k_b"], kinds["v_b"])
        self.heads = Activations(capacity, c.num_heads * c.v_head_dim, kinds["heads"])
        self.router = RouterBuffers.make(self.normed, c.num_experts, c.num_experts_used)
        self.no_router = RouterBuffers.make(self.normed, 0, 0)
        self.deferral = [
            DeferralBuffers.make(
                Activations(capacity, c.hidden_size, kinds["normed"]), c.num_experts, c.num_experts_used
            )
            for _ in range(2 * has_deferral)
        ]
        self._expert_width = c.expert_feed_forward_size if c.num_experts else 0
        self._num_pairs = num_pairs(c, capacity)
        self._hidden: dict[int, Activations] = {}

    def hidden(self, width: int) -> Activations:
        """SwiGLU results of experts of this width, one row per (token, expert) pair."""
        if width not in self._hidden:
            rows = self._num_pairs if width == self._expert_width else self.capacity
            self._hidden[width] = Activations(rows, width, self._kinds["hidden", width])
        return self._hidden[width]


def num_pairs(config: ModelConfig, num_tokens: int) -> int:
    """(token, expert) pairs of so many tokens, shared experts included."""
    return num_tokens * (config.num_experts_used + max(1, config.num_shared_experts))
