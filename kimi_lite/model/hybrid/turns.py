"""What the GPU and the CPU's experts hand to each other in a decode step, layer by layer: a turn each.

All of it is pinned memory that kernels of the GPU read and write themselves. Which experts have a slot in VRAM is
looked up once, by the GPU, which tells the CPU what is missing: the two sides cannot disagree, whatever the tables do
between steps. Protocol: `native.turn_cells`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.native.gpu.arguments import Posting
from kimi_lite.native.turn_cells import MAX_TOKENS, NUM_CELLS


@dataclass(frozen=True, slots=True, eq=False)
class TurnMemory:
    """R = MAX_TOKENS rows, K choices, D hidden size; one turn a layer with routed experts."""

    cells: torch.Tensor  # pinned int64 (NUM_CELLS,)
    x: torch.Tensor  # pinned (2, R, D): what experts read, of the turn that is on and of the one before
    chosen: torch.Tensor  # pinned int32 (turns, R, K)
    missing: torch.Tensor  # pinned int32 (turns, R, K): the chosen ones without a slot, -1 in the places of the others
    rows: torch.Tensor  # pinned (at least R * K, D): products of the missing ones, of the turn that is on
    late_rows: torch.Tensor  # pinned (2, R * K, D): of those that are deferred, likewise; (2, 0, D) where none is
    given_up: torch.Tensor  # int64 (1,) on the GPU: the last turn whose rows it waited for in vain
    arrivals: torch.Tensor  # int32 (R,) on the GPU, zeros: for joins

    @classmethod
    def make(
        cls, streams: GpuStreams, num_turns: int, top_k: int, rows: torch.Tensor, has_deferral: bool = False
    ) -> "TurnMemory":
        """rows: pinned, to which the CPU's experts write."""
        assert len(rows) >= MAX_TOKENS * top_k, (rows.shape, top_k)
        shape = (num_turns, MAX_TOKENS, top_k)
        return cls(
            cells=streams.pinned((NUM_CELLS,), torch.int64),
            x=streams.pinned((2, MAX_TOKENS, rows.shape[1]), torch.float32),
            chosen=streams.pinned(shape, torch.int32),
            missing=streams.pinned(shape, torch.int32),
            rows=rows,
            late_rows=streams.pinned((2, MAX_TOKENS * top_k * has_deferral, rows.shape[1]), torch.float32),
            given_up=streams.zeros((1,), torch.int64),
            arrivals=streams.zeros((MAX_TOKENS,), torch.int32),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One layer's in one step."""

    memory: TurnMemory
    number: int  # from 1
    first: torch.Tensor  # int64 (1,) on the GPU: the number of the last turn before the step

    @property
    def x(self) -> torch.Tensor:
        """Pinned (R, D): what this turn's experts read."""
        return self.memory.x[self.number % 2]

    @property
    def late_rows(self) -> torch.Tensor:
        """Pinned (R * K, D): products of this turn's deferred experts, there when a later turn is answered."""
        return self.memory.late_rows[self.number % 2]

    @property
    def posting(self) -> Posting:
        """For the router's kernel."""
        memory, row = self.memory, self.number - 1
        return Posting(memory.chosen[row], memory.missing[row], memory.cells, self.first, self.number)


@dataclass(frozen=True, slots=True, eq=False)
class TakenTurn:
    """What one turn was, of T tokens."""

    layer: int
    chosen: np.ndarray  # int32 (T, K)
    missing: np.ndarray  # int32 (T, K), -1 in the places of those with a slot
    waited_s: float  # for the GPU
    elapsed_s: float  # of the CPU's experts, from the choices to the rows
