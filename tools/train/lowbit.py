"""Training for low-bit experts: every forward pass sees them as a file of that type would hold them.

The straight-through estimator (Bengio et al. 2013): the forward pass uses decode(encode(W)), by the codecs that
quantize writes files with, and the gradient goes to W as if nothing had been rounded. After training,
`kimi-lite quantize` without an importance matrix writes the very bytes that were trained with. As loss serves the
divergence from the unquantized model, which says more about a token than the text's next one does.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from kimi_lite.arch.architecture import find_row
from kimi_lite.errors import KimiLiteError
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.codecs import encode, find_layout
from kimi_lite.tools.train.model import Model, Output, is_factor

_CACHED_TOKENS = 8  # whose logits, a vocabulary of 160 K, stay in a core's cache

_REACHES = (0.2, 0.4)  # of the gap between two values, from one towards the other
_SAME = 1e-5  # of a block's energy: a scale in half precision


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)  # a value of its own, without a copy

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


@dataclass(frozen=True, slots=True, eq=False)
class LowBit:
    """A model whose routed experts are of a type. `fixed`: what products take and nothing trains, experts rounded, as
    `dtype`, which spares each forward pass the conversion."""

    model: Model
    layout: Layout
    dtype: torch.dtype
    fixed: dict[str, Tensor]

    @classmethod
    def of(cls, model: Model, type_name: str, dtype: torch.dtype = torch.float32) -> "LowBit":
        """`dtype`: in which products take weights. Raises KimiLiteError where the type cannot be written here, or the
        experts' rows are no whole blocks."""
        layout = find_layout(type_name)
        for name, weight in model.named_parameters():
            if is_expert(name) and weight.shape[-1] % layout.block_size:
                problem = f"{name} has rows of {weight.shape[-1]}, and {layout.name} has blocks of {layout.block_size}"
                raise KimiLiteError(f"{problem}.", "Choose a type with smaller blocks, such as Q2_0 or Q4_0.")
        fixed = {
            name: (round_to(layout, weight) if is_expert(name) else weight).to(dtype)
            for name, weight in model.named_parameters()
            if is_factor(name) and not weight.requires_grad
        }
        return cls(model, layout, dtype, fixed)

    @torch.no_grad()
    def start_within(self, encoded: Model) -> None:
        """Moves the model's experts, by as little as it takes, to where they round to those of `encoded`, which a file
        of the type gave."""
        others = dict(encoded.named_parameters())
        for name, weight in self.model.named_parameters():
            if is_expert(name):
                weight.copy_(within_cells(self.layout, weight, others[name]))

    @torch.no_grad()
    def rounded(self) -> dict[str, Tensor]:
        """What a file would hold of the experts as they are now; nothing where they are not trained."""
        return {
            name: round_to(self.layout, weight).to(self.dtype)
            for name, weight in self.model.named_parameters()
            if is_expert(name) and weight.requires_grad
        }

    def forward(self, ids: Tensor, rounded: dict[str, Tensor]) -> Output:
        """The model with `rounded` in place of its experts, which get the gradient where they are trained."""
        parameters = dict(self.model.named_parameters())
        used = {name: _StraightThrough.apply(parameters[name], value) for name, value in rounded.items()}
        return functional_call(self.model, self.fixed | used, (ids,))


def is_expert(name: str) -> bool:
    row = find_row(f"{name}.weight")
    return row is not None and row.part == "routed"


@torch.no_grad()
def take_experts(model: Model, source: Model) -> None:
    others = dict(source.named_parameters())
    for name, weight in model.named_parameters():
        if is_expert(name):
            weight.copy_(others[name])


def round_to(layout: Layout, weight: Tensor) -> Tensor:
    """(..., n) float32 as a file of the type gives it back."""
    rows = np.ascontiguousarray(weight.detach().numpy()).reshape(-1, weight.shape[-1])
    return torch.from_numpy(dequantize(encode(layout, rows), layout.name)).view_as(weight)


def within_cells(layout: Layout, weight: Tensor, rounded: Tensor) -> Tensor:
    """Numbers near to `weight` that round to `rounded`, (..., n) float32 both: where a training begins with what an
    encoder with error feedback chose, and a weight that it rounded the other way is soon back.

    A block's values are known from `rounded`: a number keeps its value within less than half of their smallest gap, and
    the block its scale where what is added is orthogonal to the values. A block that an encoder would round otherwise
    all the same, since it fits the scale anew, moves half as far, or stays.
    """
    near, fixed = (each.reshape(-1, layout.block_size) for each in (weight, rounded))
    gaps = fixed.sort(-1).values.diff(dim=-1)  # (blocks, block_size - 1)
    gap = torch.where(gaps > 0, gaps, torch.inf).amin(-1, keepdim=True)
    gap = torch.where(gap.isfinite(), gap, 0.0)
    energy = fixed.square().sum(-1, keepdim=True)  # (blocks, 1)
    start = fixed
    for reach in _REACHES:
        moved = (near - fixed).clamp(-reach * gap, reach * gap)
        along = (moved * fixed).sum(-1, keepdim=True) / energy.clamp(min=torch.finfo(torch.float32).tiny)
        tried = fixed + moved - along * fixed
        error = (round_to(layout, tried) - fixed).square().sum(-1, keepdim=True)
        start = torch.where(error <= _SAME * energy, tried, start)
    return start.view_as(weight)


def divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """Mean over tokens of the Kullback-Leibler divergence of softmax(logits) from softmax(wanted), (..., V) both, in
    nats, float32."""
    return _Divergence.apply(wanted.flatten(0, -2), logits.flatten(0, -2))


class _Divergence(torch.autograd.Function):
    """With its gradient, softmax(logits) - softmax(wanted), while a few tokens' numbers are in the cache."""

    @staticmethod
    def forward(ctx, wanted: Tensor, logits: Tensor) -> Tensor:
        gradient, total = torch.empty_like(logits), torch.zeros((), dtype=torch.float64)
        for theirs, ours, slope in zip(
            *(each.split(_CACHED_TOKENS) for each in (wanted, logits, gradient)), strict=True
        ):
            target, found = (each.float().log_softmax(-1) for each in (theirs, ours))
            share = target.exp()
            total += (share * (target - found)).sum()
            slope.copy_((found.exp_() - share) / len(logits))
        ctx.save_for_backward(gradient)
        return (total / len(logits)).float()

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple[None, Tensor]:
        return None, ctx.saved_tensors[0] * above
