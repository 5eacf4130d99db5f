"""The caches that `tools.cache` compares. The runtime's is its own class, `experts.policy.HeatPolicy`.

A step is one layer of one token: its experts are looked up together, and none of them may push out another. Two ways to
fill: what is missed comes in at once (the RAM tier: it must, to be computed), or up to a number of experts are promoted
after each token (VRAM: misses are computed on the CPU, and copies cost bandwidth). Keys are layer * experts + expert.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kimi_lite.experts.policy import HALF_LIVES, HeatPolicy

NEVER = np.iinfo(np.int64).max


class Cache(Protocol):
    """`look_up` returns which of a step's experts were there, bool (K,)."""

    def look_up(self, token: int, layer: int, experts: np.ndarray) -> np.ndarray: ...


class LruCache:
    """The least recently used expert goes. With a budget: the last missed ones come in after the token."""

    def __init__(self, num_experts: int, num_slots: int, budget: int | None) -> None:
        self._num_experts, self._num_slots, self._budget = num_experts, num_slots, budget
        self._keys: OrderedDict[int, None] = OrderedDict()
        self._missed: OrderedDict[int, None] = OrderedDict()
        self._token = 0

    def look_up(self, token: int, layer: int, experts: np.ndarray) -> np.ndarray:
        keys = (layer * self._num_experts + experts).tolist()
        if self._budget is not None and token != self._token:
            self._token = token
            for _ in range(min(self._budget, len(self._missed))):
                self._insert(self._missed.popitem()[0])
            self._missed.clear()
        found = np.array([key in self._keys for key in keys])
        for key in (key for key, is_there in zip(keys, found, strict=True) if is_there):
            self._keys.move_to_end(key)
        for key in (key for key, is_there in zip(keys, found, strict=True) if not is_there):
            if self._budget is None:
                self._insert(key)
            else:
                self._missed[key] = None
        return found

    def _insert(self, key: int) -> None:
        self._keys[key] = None
        if len(self._keys) > self._num_slots:
            self._keys.popitem(last=False)


class HeatCache:
    """`HeatPolicy` as the runtime uses it; with one long half-life it is LFU with decay."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        budget: int | None,
        half_lives: tuple[float, ...] = HALF_LIVES,
    ) -> None:
        self._policy, self._budget, self._token = HeatPolicy(num_layers, num_experts, num_slots, half_lives), budget, 0

    def look_up(self, token: int, layer: int, experts: np.ndarray) -> np.ndarray:
        policy = self._policy
        if self._budget is not None and token != self._token:
            for promotion in policy.promotions(self._budget):
                policy.begin(*promotion)
                policy.commit(promotion.slot)
        self._token = token
        policy.touch(token, layer, experts)
        slots = policy.find(layer, experts)
        if self._budget is None:
            policy.pin(slots)
            for slot in policy.admit(layer, experts[slots < 0].tolist()):
                if slot >= 0:
                    policy.commit(slot)
            policy.unpin(slots)
        return slots >= 0


class BeladyCache:
    """The optimum: the expert that is needed latest goes, which takes knowing the future (Belady 1966). Always fills at
    once."""

    def __init__(self, ids: np.ndarray, layers: Sequence[int], num_experts: int, num_slots: int) -> None:
        self._num_experts, self._num_slots = num_experts, num_slots
        self._next = _next_uses(ids, layers, num_experts)
        self._until: dict[int, int] = {}  # key -> step of its next use
        self._heap: list[tuple[int, int]] = []  # (-next use, key), with entries that are out of date
        self._layers = {layer: i for i, layer in enumerate(layers)}

    def look_up(self, token: int, layer: int, experts: np.ndarray) -> np.ndarray:
        keys = (layer * self._num_experts + experts).tolist()
        found = np.array([key in self._until for key in keys])
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
