"""One layer's experts on their way into the kernels: what is there is pinned, what is not is read, group by group.

Made by `ExpertCache.request`. A layer may need more experts than there are slots (a prompt needs nearly all of them):
the request then works as a window that moves over the experts, so that some are read while others are computed.
"""

import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kimi_lite.experts.ram import ExpertCache

_WINDOW = 32  # experts of a prompt that are read ahead: more would evict what decoding wants to keep
_GROUP = 8  # that are computed in one go: few enough to overlap, enough to keep the cores busy


class ExpertRequest:
    """Use as a context manager: at the end nothing is pinned, and after an exception what was not read yet is not
    read."""

    def __init__(self, cache: "ExpertCache", layer: int, experts: np.ndarray, is_ordered: bool) -> None:
        """experts: int (n,), ascending. is_ordered: `take` keeps to that order; otherwise what is there comes first."""
        self._cache, self._layer, self._is_ordered = cache, layer, is_ordered
        self._policy = cache.pool_of(layer).policy
        is_there = self._policy.find(layer, experts) >= 0
        order = experts if is_ordered else np.concatenate([experts[is_there], experts[~is_there]])
        self.is_all_there, self.has_some_there = bool(is_there.all()), bool(is_there.any())
        self._most = max(2, min(_WINDOW, self._policy.num_slots // 2)) if is_ordered else len(order)
        self._group = min(_GROUP, self._most // 2)
        self._waiting = deque(order.tolist())
        self._window: list[tuple[int, int]] = []  # (expert, slot): pinned, and there or on their way
        self._taken: list[tuple[int, int]] = []
        self._advance()

    def __enter__(self) -> "ExpertRequest":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        held, self._window, self._taken = self._window + self._taken, [], []
        self._policy.unpin([slot for _, slot in held])
        for _, slot in held:
            self._cache.give_up(self._layer, slot)
        self._waiting.clear()
        if kind is not None:
            self._cache.cancel()

    def take(self) -> list[int]:
        """Experts that are in their slots until the next call; none when all have been taken. Raises KimiLiteError."""
        self._policy.unpin([slot for _, slot in self._taken])
        self._taken = []
        self._cache.collect()
        self._check()
        self._advance()
        while not (ready := self._ready()) and (self._window or self._waiting):
            start_s = time.perf_counter()
            self._cache.collect(is_waiting=True)
            self._cache.counts.wait_s += time.perf_counter() - start_s
            self._check()
            self._advance()
        taken = set(ready)
        self._taken = [entry for entry in self._window if entry in taken]
        self._window = [entry for entry in self._window if entry not in taken]
        return [expert for expert, _ in self._taken]

    @property
    def num_left(self) -> int:
        """Experts that `take` has not given yet."""
        return len(self._window) + len(self._waiting)

    def _advance(self) -> None:
        """Pins or begins to read as many of the waiting experts as slots allow."""
        while self._waiting and len(self._window) < self._most:
            expert = self._waiting[0]
            slot = int(self._policy.find(self._layer, expert))
            slot = slot if slot >= 0 else self._cache.require(self._layer, expert)
            if slot < 0:
                return
            self._policy.pin([slot])
            self._window.append((self._waiting.popleft(), slot))

    def _ready(self) -> list[tuple[int, int]]:
        """Entries of the window that are there; in order, and not too few while more are coming, where order counts."""
        if not self._window:
            return []
        experts = [expert for expert, _ in self._window]
        is_there = self._policy.find(self._layer, experts) >= 0
        if not self._is_ordered:
            return [entry for entry, there in zip(self._window, is_there, strict=True) if there]
        count = len(self._window) if is_there.all() else int(np.argmin(is_there))
        return self._window[:count] if count >= min(self._group, len(self._window)) else []

    def _check(self) -> None:
        broken = self._cache.pool_of(self._layer).broken
        for expert, slot in self._window:
            if slot in broken:
                raise self._cache.failure(self._layer, expert, broken[slot])
