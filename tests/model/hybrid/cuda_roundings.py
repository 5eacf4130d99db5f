"""The stand-in with the roundings of a GPU's kernels: what `native.gpu` multiplies in bfloat16 is rounded to it here.

up to 4 tokens    float32                            (native.gpu.matvec)
up to 16          Q8_0: activations as two bfloat16  (native.gpu.product); others: float32
more              Q8_0: activations as they come     (up to 511, or float32); F32: float32; others: both bfloat16
experts           of prompts: 33 choices and more in bfloat16 (native.gpu.grouped); else the CPU's bits
"""

from pathlib import Path
from typing import Any

import torch

from kimi_lite.experts.index import RoutedLayer
from kimi_lite.model.hybrid.kernels import DenseMatrix
from kimi_lite.native.cpu.matrix import dequantize
from tests.model.hybrid.runner import HybridRunner
from tests.model.hybrid.stand_in import StandInKernels

FEW_TOKENS, MATVEC_TOKENS, MANY_TOKENS, GROUPED_CHOICES = 4, 16, 512, 33


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


def as_two(x: torch.Tensor) -> torch.Tensor:
    """The sum of two bfloat16 that is nearest."""
    high = rounded(x)
    return high + rounded(x - high)


class RoundingKernels(StandInKernels):
    def linear(
        self, x: torch.Tensor, matrix: DenseMatrix, out: torch.Tensor | None = None, is_exact: bool = False
    ) -> torch.Tensor:
        is_q8_0 = matrix.layout_name == "Q8_0"
        if is_exact or len(x) <= (FEW_TOKENS if is_q8_0 else MATVEC_TOKENS) or matrix.layout_name == "F32":
            return super().linear(x, matrix, out)
        if is_q8_0 and (len(x) < MANY_TOKENS or x.dtype == torch.float32):
            return super().linear(as_two(x.float()), matrix, out)
        y = rounded(x) @ rounded(self.dequantize(matrix.data, matrix.layout_name)).T
        return y if out is None else out.copy_(y)

    def expert_choices(
        self,
        x: torch.Tensor,
        slots: torch.Tensor,
        form: RoutedLayer,
        slot_of_choice: torch.Tensor,
        token_of_choice: torch.Tensor,
        out: torch.Tensor | None = None,
        is_exact: bool | None = None,
    ) -> torch.Tensor:
        if len(slot_of_choice) < GROUPED_CHOICES if is_exact is None else is_exact:
            return super().expert_choices(x, slots, form, slot_of_choice, token_of_choice, out)
        rows = torch.zeros((len(slot_of_choice), x.shape[1])) if out is None else out
        for slot in sorted(set(slot_of_choice.tolist()) - {-1}):
            at = (slot_of_choice == slot).nonzero()[:, 0]
            gate, up, down = (rounded(_weights(slots[slot], part)) for part in form.matrices)
            inputs = rounded(x[token_of_choice[at].long()].float())
            rows[at] = rounded(self.swiglu(inputs @ gate.T, inputs @ up.T)) @ down.T
        return rows


def _weights(slot: torch.Tensor, part: Any) -> torch.Tensor:
    data = slot[part.offset : part.offset + part.num_bytes].view(part.num_rows, part.row_bytes)
    return torch.from_numpy(dequantize(data.numpy(), part.layout_name))


class RoundingRunner(HybridRunner):
    """`HybridRunner` with these kernels, or others that are given."""

    def __init__(self, path: Path, kernels: StandInKernels | None = None, **options: object) -> None:
        super().__init__(path, kernels=kernels or RoundingKernels(), **options)
