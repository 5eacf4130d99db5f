"""The activations of a run: every intermediate of a layer, allocated once and shared by all layers."""

from typing import NamedTuple

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.attention import AttentionBuffers


class RouterBuffers(NamedTuple):
    """What a router reads and writes, for `capacity` tokens."""

    normed: Activations  # (capacity, hidden)
    logits: np.ndarray  # (capacity, E), scores afterwards
    choice: np.ndarray  # (capacity, E), working space
    ids: np.ndarray  # int32 (capacity, K)
    weights: np.ndarray  # (capacity, K)

    @classmethod
    def make(cls, config: ModelConfig, normed: Activations) -> "RouterBuffers":
        logits = np.zeros((normed.capacity, max(1, config.num_experts)), np.float32)
        ids = np.zeros((normed.capacity, max(1, config.num_experts_used)), np.int32)
        return cls(normed, logits, np.zeros_like(logits), ids, np.zeros(ids.shape, np.float32))


class Buffers:
    """Arrays for `capacity` tokens; `kinds` says which int8 forms each of the layers' inputs needs."""

    def __init__(self, config: ModelConfig, capacity: int, num_absorbed: int, kinds: dict[str, set]) -> None:
        c = config
        self.capacity, self._kinds = capacity, kinds
        self.x = np.zeros((capacity, c.hidden_size), np.float32)  # the residual stream
        self.normed = Activations(capacity, c.hidden_size, kinds["normed"])
        if c.q_lora_rank:
            self.q_compressed = Activations(capacity, c.q_lora_rank, kinds["q_compressed"])
        self.q = np.zeros((capacity, c.num_heads * c.qk_head_dim), np.float32)
        self.kv = np.zeros((capacity, c.kv_latent_size), np.float32)
        sizes = (c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank)
        self.attention = AttentionBuffers(num_absorbed, c.num_heads, sizes, (kinds["k_b"], kinds["v_b"]))
        self.heads = Activations(capacity, c.num_heads * c.v_head_dim, kinds["heads"])
        self.router = RouterBuffers.make(c, self.normed)
        self.expert_ids, self.expert_weights = self.router.ids, self.router.weights
        self._expert_width = c.expert_feed_forward_size if c.num_experts else 0
        self._num_slots = capacity * (c.num_experts_used + max(1, c.num_shared_experts))
        self._hidden: dict[int, Activations] = {}
        self._kept: list[object] = []

    def hidden(self, width: int) -> Activations:
        """SwiGLU results of experts of this width, one row per (token, expert)."""
        if width not in self._hidden:
            slots = self._num_slots if width == self._expert_width else self.capacity
            self._hidden[width] = Activations(slots, width, self._kinds["hidden", width])
        return self._hidden[width]

    def keep(self, thing: object) -> None:
        """Keeps something alive that operations point to."""
        self._kept.append(thing)
