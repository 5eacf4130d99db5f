"""What several tensors are together, for kernels and for those who call them. Importable without Triton."""

from typing import NamedTuple

import torch


class ChoiceRows(NamedTuple):
    """Unweighted products of T * K choices: row i of `hits` where `slot_of_choice[i]` is not below zero, else of
    `misses`. `misses` may be pinned memory of the host: its rows are read only where they are wanted."""

    slot_of_choice: torch.Tensor  # int32 (T * K,)
    hits: torch.Tensor  # float32 (at least T * K, D)
    misses: torch.Tensor  # float32 (at least T * K, D)


class Posting(NamedTuple):
    """Where the CPU looks for what a router chose in one turn of a step (`native.turn_cells`); R >= T rows."""

    chosen: torch.Tensor  # pinned int32 (R, K)
    missing: torch.Tensor  # pinned int32 (R, K): those of them without a slot, -1 in the places of the others
    cells: torch.Tensor  # pinned int64
    first: torch.Tensor  # int64 (1,) on the GPU: the number of the last turn before the step
    turn: int  # from 1


class Routes(NamedTuple):
    """What a router says of T tokens: experts, best first, and their weights."""

    ids: torch.Tensor  # int32 (T, K)
    weights: torch.Tensor  # float32 (T, K)
    slots: torch.Tensor | None = None  # int32 (T, K), the slot of each choice, -1 for none; None: not asked for
