"""Routed experts that lie in slots on the GPU: every choice's down(silu(gate x) * up x), unweighted, in a row of its
own.

Few choices: two launches that read each chosen expert's bytes once, decoding where they multiply; gate, up and SwiGLU
are one. Many: choices are sorted by expert and multiplied in groups on tensor cores (`native.gpu.grouped`). Which way
follows from shapes; there is no wait for the GPU and CUDA graphs can hold both. (DeepSeekMoE, arXiv 2401.06066; SwiGLU,
arXiv 2002.05202.)
"""

from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl

from kimi_lite.native.gpu.elementwise import swiglu
from kimi_lite.native.gpu.formats import formats, table_for, weights_of
from kimi_lite.native.gpu.grouped import Groups, grouped_product
from kimi_lite.native.gpu.matvec import row_products, tile_for

GROUPED_CHOICES = 33  # from so many on in groups: below, most experts are chosen once
_ROWS = 2  # of a program: they share the loads of activations


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


@triton.jit
def gate_up_kernel(
    x, gate_data, up_data, hidden, gate_table, up_table, slot_of_choice, token_of_choice, num_rows, x_stride,
    gate_offset, up_offset, gate_slot, up_slot, gate_stride, up_stride, gate_blocks, up_blocks,
    G_DECODE: tl.constexpr, G_COLUMN: tl.constexpr, G_LANES: tl.constexpr, G_PLANES: tl.constexpr,
    G_BLOCK_SIZE: tl.constexpr,
    G_BLOCK_BYTES: tl.constexpr, G_RUN: tl.constexpr, G_IS_PADDED: tl.constexpr, G_ALIGN: tl.constexpr,
    G_TILE: tl.constexpr,
    U_DECODE: tl.constexpr, U_COLUMN: tl.constexpr, U_LANES: tl.constexpr, U_PLANES: tl.constexpr,
    U_BLOCK_SIZE: tl.constexpr,
    U_BLOCK_BYTES: tl.constexpr, U_RUN: tl.constexpr, U_IS_PADDED: tl.constexpr, U_ALIGN: tl.constexpr,
    U_TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (i, choice): rows i * ROWS and on of hidden[choice]. Offsets and strides of data count units of ALIGN."""
    choice = tl.program_id(1)
    slot = tl.load(slot_of_choice + choice).to(tl.int64)
    if slot >= 0:
        token = tl.load(token_of_choice + choice).to(tl.int64)[None, None, None, None]
        first = tl.program_id(0) * ROWS
        row = tl.minimum(first + tl.arange(0, ROWS), num_rows - 1)[None, :, None, None].to(tl.int64)
        gate = row_products(
            x, gate_data + (slot * gate_slot + gate_offset + row * gate_stride) * G_ALIGN, gate_table, gate_blocks,
            token * x_stride, 1, ROWS, G_DECODE, G_COLUMN, G_LANES, G_PLANES, G_BLOCK_SIZE, G_BLOCK_BYTES, G_RUN,
            G_IS_PADDED, G_TILE,
        )  # fmt: skip
        up = row_products(
            x, up_data + (slot * up_slot + up_offset + row * up_stride) * U_ALIGN, up_table, up_blocks,
            token * x_stride, 1, ROWS, U_DECODE, U_COLUMN, U_LANES, U_PLANES, U_BLOCK_SIZE, U_BLOCK_BYTES, U_RUN,
            U_IS_PADDED, U_TILE,
        )  # fmt: skip
        at = first + tl.arange(0, ROWS)[None, :]
        tl.store(hidden + choice.to(tl.int64) * num_rows + at, gate / (1.0 + tl.exp(-gate)) * up, at < num_rows)


@triton.jit
def down_kernel(
    hidden, data, out, table, slot_of_choice, num_rows, width, out_stride, offset, slot_stride, row_stride, num_blocks,
    DECODE: tl.constexpr, COLUMN: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, RUN: tl.constexpr, IS_PADDED: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Program (i, choice): rows i * ROWS and on of out[choice]."""
    choice = tl.program_id(1)
    slot = tl.load(slot_of_choice + choice).to(tl.int64)
    if slot >= 0:
        first = tl.program_id(0) * ROWS
        row = tl.minimum(first + tl.arange(0, ROWS), num_rows - 1)[None, :, None, None].to(tl.int64)
        which = choice.to(tl.int64)[None, None, None, None]
        total = row_products(
            hidden, data + (slot * slot_stride + offset + row * row_stride) * ALIGN, table, num_blocks, which * width,
            1, ROWS,
            DECODE, COLUMN, LANES, PLANES, BLOCK_SIZE, BLOCK_BYTES, RUN, IS_PADDED, TILE,
        )  # fmt: skip
        at = first + tl.arange(0, ROWS)[None, :]
        tl.store(out + choice.to(tl.int64) * out_stride + at, total, at < num_rows)


def expert_choices(
    x: torch.Tensor,
    slots: torch.Tensor,
    form: ExpertForm,
    slot_of_choice: torch.Tensor,
    token_of_choice: torch.Tensor,
    out: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (T, D), slots uint8 (num_slots, slot_bytes), int32 (n,) twice -> float32 (n, D), unweighted.

    A choice of slot -1 is skipped and its row left as it is. Below GROUPED_CHOICES choices the arithmetic is float32 on
    the decoded weights; from there on activations, weights and hidden values are rounded to bfloat16 and summed in
    float32. `out`: where to write; `hidden`: float32 working space of n * width values for few choices.
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
    if num_choices >= GROUPED_CHOICES:
        return _grouped(x, slots, form, slot_of_choice, token_of_choice, out)
    if hidden is None:
        hidden = torch.empty((num_choices, form.gate.num_rows), dtype=torch.float32, device=x.device)
    hidden = hidden.view(-1)[: num_choices * form.gate.num_rows].view(num_choices, form.gate.num_rows)
    _launch_gate_up(x, slots, form, slot_of_choice, token_of_choice, hidden)
    _launch_down(hidden, slots, form.down, slot_of_choice, out)
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


def _launch_gate_up(x, slots, form, slot_of_choice, token_of_choice, hidden) -> None:
    gate, up = form.gate, form.up
    g, u = formats()[gate.layout_name], formats()[up.layout_name]
    tile = tile_for(g, gate.k, 4 // _ROWS)
    slot_bytes = slots.stride(0)
    gate_up_kernel[(triton.cdiv(gate.num_rows, _ROWS), len(slot_of_choice))](
        x, weights_of(slots, g.name), weights_of(slots, u.name), hidden, table_for(g, slots), table_for(u, slots),
        slot_of_choice, token_of_choice, gate.num_rows, x.stride(0), g.units(gate.offset), u.units(up.offset),
        g.units(slot_bytes), u.units(slot_bytes), g.units(gate.row_bytes), u.units(up.row_bytes),
        gate.k // g.block_size, up.k // u.block_size, **g.constants("G_"), G_ALIGN=g.align, G_TILE=tile.num_lanes,
        **u.constants("U_"), U_ALIGN=u.align, U_TILE=tile.num_lanes // g.run * u.run, ROWS=_ROWS,
        num_warps=tile.num_warps,
    )  # fmt: skip


def _launch_down(hidden, slots, down, slot_of_choice, out) -> None:
    each = formats()[down.layout_name]
    tile = tile_for(each, down.k, 4 // _ROWS)
    down_kernel[(triton.cdiv(down.num_rows, _ROWS), len(slot_of_choice))](
        hidden, weights_of(slots, each.name), out, table_for(each, slots), slot_of_choice, down.num_rows, down.k,
        out.stride(0),
        each.units(down.offset), each.units(slots.stride(0)), each.units(down.row_bytes), down.k // each.block_size,
        **each.constants(), ALIGN=each.align, TILE=tile.num_lanes, ROWS=_ROWS, num_warps=tile.num_warps,
    )  # fmt: skip


def _grouped(x, slots, form, slot_of_choice, token_of_choice, out) -> torch.Tensor:
    """Gate, up and down as three grouped products; rows of `gate` and `up` are in the order of the sorted choices."""
    groups = Groups(slot_of_choice, len(slots))
    x = x.to(torch.bfloat16)
    shape = (len(slot_of_choice), form.gate.num_rows)
    gate, up = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    grouped_product(x, slots, form.gate, groups, token_of_choice, gate)
    grouped_product(x, slots, form.up, groups, token_of_choice, up)
    hidden = swiglu(gate, up, dtype=torch.bfloat16)
    return grouped_product(hidden, slots, form.down, groups, None, out)
