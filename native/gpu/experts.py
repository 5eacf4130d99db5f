"""Routed experts that lie in slots on the GPU: every choice's down(silu(gate x) * up x), unweighted, in a row of its
own.

Two ways. Exact (`native.gpu.exact`): each chosen expert's bytes are read once, int8 activations, and the bits that the
CPU would have given: what decoding does. Many choices otherwise: sorted by expert and multiplied in groups on tensor
cores (`native.gpu.grouped`), in bfloat16. Which way follows from shapes; there is no wait for the GPU and CUDA graphs
can hold both. (DeepSeekMoE, arXiv 2401.06066; SwiGLU, arXiv 2002.05202.)
"""

from typing import NamedTuple, Protocol

import torch

from kimi_lite.native.gpu.elementwise import swiglu
from kimi_lite.native.gpu.exact import exact_down, exact_gate_up
from kimi_lite.native.gpu.grouped import Groups, grouped_product

GROUPED_CHOICES = 33  # from so many on in groups: below, most experts are chosen once


class ExpertMatrix(NamedTuple):
    """One matrix of an expert: (num_rows, k) weights of a type, `offset` bytes into its slot."""

    layout_name: str
    offset: int
    num_rows: int
    k: int
    row_bytes: int


class ExpertForm(Protocol):
    """How a slot holds an expert. Matrices are `ExpertMatrix` or have its fields."""

    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix


def expert_choices(
    x: torch.Tensor,
    slots: torch.Tensor,
    form: ExpertForm,
    slot_of_choice: torch.Tensor,
    token_of_choice: torch.Tensor,
    out: torch.Tensor | None = None,
    is_exact: bool | None = None,
) -> torch.Tensor:
    """x float32 (T, D), slots uint8 (num_slots, slot_bytes), int32 (n,) twice -> float32 (n, D), unweighted. Where x is
    rounded to bfloat16 it may come so.

    A choice of slot -1 is skipped and its row left as it is. `out`: where to write. is_exact: the CPU's bits, whatever
    n is; False: activations, weights and hidden values rounded to bfloat16 and summed in float32; None: exact below
    GROUPED_CHOICES choices.
    """
    num_choices = len(slot_of_choice)
    _check(x, slots, form, slot_of_choice, token_of_choice)
    if out is None:
        out = torch.empty((num_choices, form.down.num_rows), dtype=torch.float32, device=x.device)
    assert out.shape == (num_choices, form.down.num_rows) and out.dtype == torch.float32 and out.stride(1) == 1, (
        out.shape
    )
    if num_choices == 0:
        return out
    if not (num_choices < GROUPED_CHOICES if is_exact is None else is_exact):
        return _grouped(x, slots, form, slot_of_choice, token_of_choice, out)
    if num_choices < len(x):  # a few experts of a long prompt: not all its rows become int8 for each few
        x = x.index_select(0, token_of_choice)
        token_of_choice = torch.arange(num_choices, dtype=torch.int32, device=x.device)
    hidden = torch.empty((num_choices, form.gate.num_rows), dtype=torch.float32, device=x.device)
    exact_gate_up(x, slots, form.gate, form.up, slot_of_choice, token_of_choice, hidden)
    exact_down(hidden, slots, form.down, slot_of_choice, out)
    return out


def _check(x, slots, form, slot_of_choice, token_of_choice) -> None:
    gate, up, down = form.gate, form.up, form.down
    assert x.shape[1] == gate.k == up.k == down.num_rows and gate.num_rows == up.num_rows == down.k, (
        x.shape,
        gate,
        up,
        down,
    )
    assert x.stride(1) == 1 and slots.dtype == torch.uint8 and slots.stride(1) == 1, (
        x.stride(),
        slots.dtype,
        slots.stride(),
    )
    assert slot_of_choice.dtype == token_of_choice.dtype == torch.int32, (slot_of_choice.dtype, token_of_choice.dtype)
    assert slot_of_choice.shape == token_of_choice.shape, (slot_of_choice.shape, token_of_choice.shape)
    assert slot_of_choice.is_contiguous() and token_of_choice.is_contiguous(), "choices must be contiguous"


def _grouped(x, slots, form, slot_of_choice, token_of_choice, out) -> torch.Tensor:
    """Gate, up and down as three grouped products; rows of `gate` and `up` are in the order of the sorted choices."""
    groups = Groups(slot_of_choice, len(slots))
    if len(token_of_choice) < len(x):  # a few experts of a long prompt: not all its rows are rounded for each few
        x, token_of_choice = x.index_select(0, token_of_choice), None
    x = x.to(torch.bfloat16)
    shape = (len(slot_of_choice), form.gate.num_rows)
    gate, up = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    grouped_product(x, slots, form.gate, groups, token_of_choice, gate)
    grouped_product(x, slots, form.up, groups, token_of_choice, up)
    hidden = swiglu(gate, up, dtype=torch.bfloat16)
    return grouped_product(hidden, slots, form.down, groups, None, out)
