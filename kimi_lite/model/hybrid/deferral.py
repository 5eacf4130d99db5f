"""Expert deferral in a decode step: the experts that a router ranks last are added one layer later, so that the CPU can
compute them while the GPU is at the next layer's attention and need not be waited for (see `native.cpu.defer`).

Which they are depends on their rank alone and not on where they lie, so that with a cache equals without one. The last
layer defers none.
"""

from dataclasses import dataclass

import torch

from kimi_lite.model.hybrid.kernels import Kernels
from kimi_lite.model.hybrid.turns import Turn
from kimi_lite.native.gpu.arguments import ChoiceRows, Routes


@dataclass(frozen=True, slots=True, eq=False)
class _Left:
    """What a layer has left: of all its choices, those that were added at once with a weight of 0."""

    rows: ChoiceRows
    weights: torch.Tensor  # (T, K)


class Deferral:
    """Of one step. The layers call `leave` and `add_left` in turn; `num_deferred` 0: nothing is left."""

    def __init__(self, kernels: Kernels, num_deferred: int, last_layer: int) -> None:
        self._kernels, self._num_deferred, self._last_layer = kernels, num_deferred, last_layer
        self._left: _Left | None = None

    def add_left(self, shared: torch.Tensor | None) -> torch.Tensor | None:
        """shared (T, D) + what the layer before has left, once the CPU has answered a later turn."""
        left, self._left = self._left, None
        if left is None:
            return shared
        total = torch.zeros_like(left.rows.hits[: len(left.weights)]) if shared is None else shared.clone()
        self._kernels.join(total, left.rows, left.weights)
        return total

    def leave(self, layer: int, turn: Turn, routes: Routes, hit_rows: torch.Tensor) -> torch.Tensor:
        """The weights (T, K) with which this layer's choices are added now: 0 for those that it leaves."""
        if not self._num_deferred or layer == self._last_layer:
            return routes.weights
        now, later = routes.weights.clone(), routes.weights.clone()
        now[:, -self._num_deferred :] = 0
        later[:, : -self._num_deferred] = 0
        self._left = _Left(ChoiceRows(routes.slots.view(-1), hit_rows, turn.late_rows), later)
        return now
