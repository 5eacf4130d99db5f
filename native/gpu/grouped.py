"""Grouped products: many choices, sorted by expert, times that expert's quantized matrix on tensor cores.

A tile of weights is decoded to bfloat16 in registers and multiplied at once, plane by plane: no expert is ever written
out, which would cost 88 MB of traffic each way for one of Kimi K2.5's. Groups are found on the GPU with shapes that
depend on nothing but the number of choices and slots, so that the host never waits.

Weights are the first factor, of whose rows each warp needs its own alone; as the second factor each warp would decode
all of them. That way also compiles for an H100 with Triton 3.4 to 3.6, whose compiler fails on decoded weights as the
second factor of 64 choices (2026-11: TQ1_0 on an RTX 4090 3,920 -> 1,880 instructions, 64 -> 0 bytes spilled).
"""

import torch
import triton
import triton.language as tl

from kimi_lite.native.gpu.formats import formats, table_for, weights_of
from kimi_lite.native.gpu.support import factor_type
from kimi_lite.native.types.gpu_parts import row_scale

_BLOCK_ROWS, _LANE_TILE = 64, 32
# Types that spill registers with four warps on an RTX 4090: eight decode half as much each. `tools.kernels.compile
# --choose` counts both.
EIGHT_WARPS = frozenset((
    *("Q1_0", "Q2_0", "LITE2_128", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("IQ2_K", "IQ2_KS", "IQ2_KL", "IQ3_K", "IQ3_KS", "IQ6_K", "IQ1_KT", "IQ2_KT", "IQ3_KT", "IQ4_KT"),
))  # fmt: skip


class Groups:
    """Choices in the order of their slots, cut into blocks of `block_choices` that have one slot each.

    `order` int32 (n,): choice at each sorted place. Block b: `slot_of_block[b]` (-1: nothing), places from
    `first_of_block[b]` to `end_of_block[b]`. There are as many blocks as could be needed: n / block_choices + the
    number of slots that n can touch.
    """

    def __init__(self, slot_of_choice: torch.Tensor, num_slots: int, block_choices: int | None = None) -> None:
        num_choices, device = len(slot_of_choice), slot_of_choice.device
        self.block_choices = block_choices or (16 if num_choices <= 256 else 32 if num_choices <= 1024 else 64)
        self.num_blocks = triton.cdiv(num_choices, self.block_choices) + min(num_slots, num_choices)
        sorted_slots, order = torch.sort(slot_of_choice, stable=True)
        self.order = order.to(torch.int32)
        borders = torch.searchsorted(
            sorted_slots, torch.arange(num_slots + 1, dtype=torch.int32, device=device)
        )  # (slots + 1,)
        starts, counts = borders[:-1], borders[1:] - borders[:-1]
        ends = torch.cumsum((counts + self.block_choices - 1) // self.block_choices, 0)  # blocks up to each slot's last
        block = torch.arange(self.num_blocks, device=device)
        slot = torch.searchsorted(ends, block, right=True)
        is_used = slot < num_slots
        slot = slot.clamp(max=num_slots - 1)
        blocks_before = ends[slot] - (counts[slot] + self.block_choices - 1) // self.block_choices
        first = starts[slot] + (block - blocks_before) * self.block_choices
        self.slot_of_block = torch.where(is_used, slot, -1).to(torch.int32)
        self.first_of_block = first.to(torch.int32)
        self.end_of_block = torch.minimum(first + self.block_choices, borders[slot + 1]).to(torch.int32)


@triton.jit
def grouped_kernel(
    x, data, out, table, order, token_of_choice, slot_of_block, first_of_block, end_of_block, num_rows, num_blocks,
    x_stride, out_stride, offset, slot_stride, row_stride,
    DECODE: tl.constexpr, COLUMN: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, HEADER: tl.constexpr, RUN: tl.constexpr, IS_PADDED: tl.constexpr,
    ALIGN: tl.constexpr, FACTOR: tl.constexpr,
    IS_GATHERED: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (i, block): rows i * ROWS and on of a block's choices. IS_GATHERED: x by tokens, else by choices."""
    block_id = tl.program_id(1)
    slot = tl.load(slot_of_block + block_id).to(tl.int64)
    if slot >= 0:
        place = tl.load(first_of_block + block_id) + tl.arange(0, CHOICES)
        is_choice = place < tl.load(end_of_block + block_id)
        choice = tl.load(order + place, is_choice, other=0)
        source = tl.load(token_of_choice + choice, is_choice, other=0) if IS_GATHERED else choice
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row_at = tl.minimum(row, num_rows - 1)[:, None].to(tl.int64) * row_stride
        row_base = data + (slot * slot_stride + offset + row_at) * ALIGN  # (ROWS, 1)
        source_at = x + source[:, None].to(tl.int64) * x_stride  # (CHOICES, 1)
        total = tl.zeros((ROWS, CHOICES), tl.float32)
        for start in range(0, num_blocks * LANES, TILE):
            lane = start + tl.arange(0, TILE)[None, :]  # for activations: (1, TILE)
            run = start + tl.arange(0, TILE // RUN)[None, :, None] * RUN  # for weights: the first lane of each run
            block, first = run // LANES, run % LANES
            unit = first + tl.arange(0, RUN)[None, None, :]
            base = row_base[:, :, None] + HEADER + block * BLOCK_BYTES  # (ROWS, runs, 1)
            for plane in tl.static_range(PLANES):
                column = COLUMN(lane % LANES, plane)
                is_weight = lane // LANES < num_blocks
                is_weight = is_weight & (column < BLOCK_SIZE) if IS_PADDED else is_weight
                at = tl.max_contiguous(tl.multiple_of(lane // LANES * BLOCK_SIZE + column, [1, RUN]), [1, RUN])
                values = tl.load(source_at + at, is_choice[:, None] & is_weight, other=0.0)
                weight = DECODE(base, first, unit, block < num_blocks, table, plane).to(tl.bfloat16)
                weight = tl.reshape(weight, (ROWS, TILE))
                total = tl.dot(weight.to(FACTOR), tl.trans(values.to(FACTOR)), total)
        if HEADER > 0:
            total *= row_scale(row_base, HEADER)
        at = choice[None, :].to(tl.int64) * out_stride + row[:, None]
        tl.store(out + at, total, is_choice[None, :] & (row < num_rows)[:, None])


def grouped_product(
    x: torch.Tensor,
    slots: torch.Tensor,
    matrix,
    groups: Groups,
    token_of_choice: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """x bfloat16 (T, k), rows by token_of_choice int32 (n,), or (n, k) by choice when None -> out float32 (n, rows).

    `matrix`: which one of the slots', as `native.gpu.experts.ExpertMatrix`. Rows of choices without a slot are left as
    they are.
    """
    each = formats()[matrix.layout_name]
    assert x.dtype == torch.bfloat16 and x.shape[1] == matrix.k and x.stride(1) == 1, (x.dtype, x.shape, matrix)
    assert out.dtype == torch.float32 and out.shape[1] == matrix.num_rows and out.stride(1) == 1, (out.dtype, out.shape)
    grouped_kernel[(triton.cdiv(matrix.num_rows, _BLOCK_ROWS), groups.num_blocks)](
        x, weights_of(slots, each.name), out, table_for(each, slots), groups.order,
        groups.order if token_of_choice is None else token_of_choice, groups.slot_of_block, groups.first_of_block,
        groups.end_of_block, matrix.num_rows, matrix.k // each.block_size, x.stride(0), out.stride(0),
        each.units(matrix.offset), each.units(slots.stride(0)), each.units(matrix.row_bytes),
        **each.constants(), ALIGN=each.align, FACTOR=factor_type(torch.bfloat16),
        IS_GATHERED=token_of_choice is not None,
        CHOICES=groups.block_choices, ROWS=_BLOCK_ROWS, TILE=_LANE_TILE,
        num_warps=8 if each.name in EIGHT_WARPS else 4, num_stages=2,
    )  # fmt: skip
    return out
