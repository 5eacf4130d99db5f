"""The caches that `tools.cache` compares. The runtime's is its own class, `experts.policy.HeatPolicy`.

A step is one layer of one token: its experts are looked up together, and none of them may push out another. Two ways to
fill: what is missed comes in at once (the RAM tier: it must, to be computed), or after each token some experts are
swapped in, which has a price (VRAM: misses are computed on the CPU, and copies cost bandwidth). Keys are
layer * experts + expert.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kimi_lite.experts.policy import AT_ONCE_WEIGHTS, HALF_LIVES, LEAST_GAIN, SWAP_WEIGHTS, HeatPolicy

NEVER = np.iinfo(np.int64).max


class Cache(Protocol):
    """`look_up` returns which of a step's experts were there, bool (K,); `num_copies`: experts that were brought in."""

    num_copies: int

    def look_up(self, token: int, layer: int, experts: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Swaps:
    """How experts come into VRAM: up to `budget` after each token, each expected to bring `least_gain` hits."""

    budget: float  # a fraction of a trace's layers stands for a fraction of the model's: 0.4 is two of five tokens
    least_gain: float = LEAST_GAIN


class LruCache:
    """The least recently used expert goes; what is missed comes in at once."""

    def __init__(self, num_experts: int, num_slots: int, num_sharing: int = 0) -> None:
        """num_sharing: layers that have equal shares of the slots; 0: one list for all."""
        self._num_experts = num_experts
        self._num_slots = num_slots // num_sharing if num_sharing else num_slots
        self._is_shared = num_sharing > 0
        self._lists: dict[int, OrderedDict[int, None]] = {}
        self.num_copies = 0

    def look_up(self, token: int, layer: int, experts: np.ndarray) -> np.ndarray:
        keys = self._lists.setdefault(layer if self._is_shared else 0, OrderedDict())
        wanted = (layer * self._num_experts + experts).tolist()
        found = np.array([key in keys for key in wanted])
        for key, is_there in zip(wanted, found.tolist(), strict=True):
            keys[key] = None
            keys.move_to_end(key)
            self.num_copies += not is_there
        while len(keys) > self._num_slots:
            keys.popitem(last=False)
        return found


class HeatCache:
    """`HeatPolicy` as the runtime uses it; with one long half-life it is LFU with decay."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        swaps: Swaps | None,
        half_lives: tuple[float, ...] = HALF_LIVES,
        num_sharing: int = 0,
    ) -> None:
        """swaps: None where what is missed comes in at once."""
        weights = SWAP_WEIGHTS if swaps else AT_ONCE_WEIGHTS
        weights = weights[-len(half_lives) :]
        self.policy = HeatPolicy(num_layers, num_experts, num_slots, half_lives, weights, num_sharing)
        self._swaps, self._token, self._allowed, self.num_copies = swaps, 0, 0.0, 0

    def look_up(self, token: int, layer: int, experts: np.ndarray) -> np.ndarray:
        if self._swaps and token != self._token:
            self._swap(self._swaps)
        self._token = token
        self.policy.touch(token, layer, experts)
        slots = self.policy.find(layer, experts)
        if not self._swaps:
            self.policy.pin(slots)
            for slot in self.policy.admit(layer, experts[slots < 0].tolist()):
                if slot >= 0:
                    self.policy.commit(slot)
                    self.num_copies += 1
            self.policy.unpin(slots)
        return slots >= 0

    def _swap(self, swaps: Swaps) -> None:
        """Between two tokens."""
        self._allowed = min(self._allowed + swaps.budget, max(1.0, swaps.budget))
        for promotion in self.policy.promotions(int(self._allowed), swaps.least_gain):
            self.policy.begin_promotion(promotion)
            self.policy.commit(promotion.slot)
            self._allowed -= 1
            self.num_copies += 1


class FavouriteCache:
    """The experts that the whole trace uses most, for good: what a list made beforehand can find at best."""

    def __init__(self, ids: np.ndarray, layers: Sequence[int], num_experts: int, num_slots: int) -> None:
        counts = np.stack([np.bincount(ids[:, layer].reshape(-1), minlength=num_experts) for layer in layers])
        keys = np.argsort(-counts.reshape(-1), kind="stable")[:num_slots]
        self._is_there = np.zeros(counts.size, bool)
        self._is_there[keys] = True
        self._num_experts, self._layers = num_experts, {layer: i for i, layer in enumerate(layers)}
        self.num_copies = 0

    def look_up(self, token: int, layer: int, experts: np.ndarray) -> np.ndarray:
        return self._is_there[self._layers[layer] * self._num_experts + experts]


class BeladyCache:
    """The optimum: the expert that is needed latest goes, which takes knowing the future (Belady 1966). Always fills at
    once."""

    def __init__(self, ids: np.ndarray, layers: Sequence[int], num_experts: int, num_slots: int) -> None:
        self._num_experts, self._num_slots = num_experts, num_slots
        self._next = _next_uses(ids, layers, num_experts)
        self._until: dict[int, int] = {}  # key -> step of its next use
        self._heap: list[tuple[int, int]] = []  # (-next use, key), with entries that are out of date
        self._layers = {layer: i for i, layer in enumerate(layers)}
        self.num_copies = 0

    def look_up(self, token: int, layer: int, experts: np.ndarray) -> np.ndarray:
        keys = (layer * self._num_experts + experts).tolist()
        found = np.array([key in self._until for key in keys])
        self.num_copies += int((~found).sum())
        for key, until in zip(keys, self._next[token, self._layers[layer]].tolist(), strict=True):
            self._until[key] = until
            heapq.heappush(self._heap, (-until, key))
        while len(self._until) > self._num_slots:
            until, key = heapq.heappop(self._heap)
            if self._until.get(key) == -until:
                del self._until[key]
        return found


def _next_uses(ids: np.ndarray, layers: Sequence[int], num_experts: int) -> np.ndarray:
    """int64 (tokens, layers, K): the step (token * layers + layer) at which each choice's expert is chosen again."""
    uses = np.full((len(ids), len(layers), ids.shape[2]), NEVER, np.int64)
    for i, layer in enumerate(layers):
        coming = np.full(num_experts, NEVER, np.int64)
        for token in range(len(ids) - 1, -1, -1):
            uses[token, i] = coming[ids[token, layer]]
            coming[ids[token, layer]] = token * len(layers) + i
    return uses
