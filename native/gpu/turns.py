"""The GPU's half of taking turns with the CPU inside a decode step (`native.turn_cells`): no launch and no copy by the
host in between, so that one CUDA graph holds the whole step.

Pinned memory is written and read by the kernels themselves: with unified addressing its address is valid on the GPU
(CUDA C++ Programming Guide, "Mapped Memory"), and Triton's launcher asks the driver for it. What the CPU shall see goes
there first and the cell behind it with release semantics at system scope; the GPU's wait has acquire semantics (PTX ISA,
"Memory Consistency Model").
"""

import torch
import triton
import triton.language as tl

from kimi_lite.native.gpu.support import is_interpreted
from kimi_lite.native.turn_cells import ANSWERED, CHOICES_POSTED, GIVEN_UP, X_POSTED

POLL_LIMIT = 100_000_000  # a look over PCIe takes about a microsecond: 1 to 2 minutes


@triton.jit
def post(cell, number, IS_INTERPRETED: tl.constexpr):
    """cell = number, once all threads of the program have written what they wrote before; by one of them."""
    tl.debug_barrier()
    if IS_INTERPRETED:  # which knows no assembly; it runs on the CPU, where stores keep their order
        tl.store(cell, number)
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred is_first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 is_first, thread, 0;
            @is_first st.release.sys.global.u64 [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,l", [cell.to(tl.int64), number], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def look(cell, IS_INTERPRETED: tl.constexpr):
    """The cell's number; what was written before it is visible from now on."""
    if IS_INTERPRETED:
        return tl.load(cell, volatile=True)
    else:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.u64 $0, [$1];", "=l,l", [cell.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1
        )


@triton.jit(do_not_specialize=["turn"])
def post_x_kernel(x, out, cells, first, turn, x_stride, K: tl.constexpr, TILE: tl.constexpr,
                  IS_INTERPRETED: tl.constexpr):  # fmt: skip
    """Program: one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    mask = column < K
    tl.store(out + token * K + column, tl.load(x + token * x_stride + column, mask, other=0.0), mask)
    post(cells + token, tl.load(first) + turn, IS_INTERPRETED)


def post_x(x: torch.Tensor, out: torch.Tensor, cells: torch.Tensor, first: torch.Tensor, turn: int) -> None:
    """x float32 (T, D) -> out (at least T, D) in pinned memory, and X_POSTED of every token = first + turn.

    cells: int64 in pinned memory; first: int64 (1,) on the GPU, the number before the step's first turn; turn from 1.
    """
    num_tokens, k = x.shape
    assert x.dtype == out.dtype == torch.float32 and x.stride(1) == 1 and out.is_contiguous(), (x.dtype, x.stride())
    assert len(out) >= num_tokens and out.shape[1] == k, (out.shape, x.shape)
    post_x_kernel[(num_tokens,)](
        x, out, cells[X_POSTED:], first, turn, x.stride(0), K=k, TILE=triton.next_power_of_2(k),
        IS_INTERPRETED=is_interpreted(), num_warps=8 if k > 2048 else 4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["turn"])
def post_choices_kernel(
    ids, slot_of, slot_of_choice, chosen_out, missing_out, cells, first, turn, TOP_K: tl.constexpr,
    CHOICES: tl.constexpr, IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program: one token."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, CHOICES)
    mask, at = place < TOP_K, token * TOP_K + place
    chosen = tl.load(ids + at, mask, other=0)
    slot = tl.load(slot_of + chosen, mask, other=-1)
    tl.store(slot_of_choice + at, slot, mask)
    tl.store(chosen_out + at, chosen, mask)
    tl.store(missing_out + at, tl.where(slot < 0, chosen, -1), mask)
    post(cells + token, tl.load(first) + turn, IS_INTERPRETED)


def post_choices(
    ids: torch.Tensor,
    slot_of: torch.Tensor,
    chosen_out: torch.Tensor,
    missing_out: torch.Tensor,
    cells: torch.Tensor,
    first: torch.Tensor,
    turn: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """ids int32 (T, K), slot_of int32 (E,) -> int32 (T * K,), the slot of each choice, -1 for those without.

    chosen_out, missing_out: int32 (at least T, K) in pinned memory: the ids, and the ids of those without a slot, -1 in
    the places of the others; then CHOICES_POSTED of every token = first + turn. The rest as `post_x`.
    """
    num_tokens, top_k = ids.shape
    if out is None:
        out = torch.empty(num_tokens * top_k, dtype=torch.int32, device=ids.device)
    for tensor in (ids, slot_of, chosen_out, missing_out, out):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous(), (tensor.dtype, tensor.stride())
    assert chosen_out.shape[1] == missing_out.shape[1] == top_k, (chosen_out.shape, missing_out.shape, top_k)
    post_choices_kernel[(num_tokens,)](
        ids, slot_of, out, chosen_out, missing_out, cells[CHOICES_POSTED:], first, turn, TOP_K=top_k,
        CHOICES=triton.next_power_of_2(top_k), IS_INTERPRETED=is_interpreted(), num_warps=1,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["turn", "limit"])
def await_answer_kernel(answered, given_up_out, given_up, first, turn, limit, IS_INTERPRETED: tl.constexpr):
    """Program: one warp that looks until the CPU has answered. Once it has given up, the step waits for nothing more."""
    before = tl.load(first)
    number = before + turn
    left = tl.where(tl.load(given_up) > before, 0, limit)
    seen = look(answered, IS_INTERPRETED)
    while (seen < number) & (left > 0):
        seen = look(answered, IS_INTERPRETED)
        left -= 1
    if seen < number:
        tl.store(given_up, number)
        post(given_up_out, number, IS_INTERPRETED)


def await_answer(
    cells: torch.Tensor, given_up: torch.Tensor, first: torch.Tensor, turn: int, limit: int = POLL_LIMIT
) -> None:
    """What is launched behind this sees the rows of turn `turn`: ANSWERED >= first + turn. The rest as `post_x`.

    given_up: int64 (1,) on the GPU. After `limit` looks it and the cell GIVEN_UP become first + turn, and neither this
    nor the step's later turns wait any longer: a CPU that has died does not stop the GPU for good.
    """
    await_answer_kernel[(1,)](
        cells[ANSWERED:], cells[GIVEN_UP:], given_up, first, turn, limit, IS_INTERPRETED=is_interpreted(), num_warps=1
    )
