"""The GPU's half of taking turns with the CPU inside a decode step (`native.turn_cells`): no launch and no copy by the
host in between, so that one CUDA graph holds the whole step.

Pinned memory is written and read by the kernels themselves: with unified addressing its address is valid on the GPU
(CUDA C++ Programming Guide, "Mapped Memory"), and Triton's launcher asks the driver for it. What the CPU shall see goes
there first and the cell behind it with release semantics at system scope; the GPU's wait has acquire semantics (PTX
ISA, "Memory Consistency Model").
"""

import torch
import triton
import triton.language as tl

from kimi_lite.native.gpu.support import is_interpreted
from kimi_lite.native.turn_cells import ANSWERED, GIVEN_UP

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


@triton.jit(do_not_specialize=["turn", "limit"])
def await_answer_kernel(answered, given_up_out, given_up, first, turn, limit, IS_INTERPRETED: tl.constexpr):
    """Program: one warp that looks until the CPU has answered; once it has given up, the step waits for nothing."""
    before = tl.load(first)
    number = before + turn
    has_given_up = tl.load(given_up) > before
    left = tl.where(has_given_up, 0, limit)
    seen = look(answered, IS_INTERPRETED)
    while (seen < number) & (left > 0):
        seen = look(answered, IS_INTERPRETED)
        left -= 1
    if (seen < number) & (not has_given_up):
        tl.store(given_up, number)
        post(given_up_out, number, IS_INTERPRETED)


def await_answer(
    cells: torch.Tensor, given_up: torch.Tensor, first: torch.Tensor, turn: int, limit: int = POLL_LIMIT
) -> None:
    """What is launched behind this sees the rows of turn `turn`, from 1: ANSWERED >= first + turn.

    cells: int64 in pinned memory. given_up, first: int64 (1,) on the GPU. After `limit` looks given_up and the cell
    GIVEN_UP become first + turn, and neither this nor the later turns of the step wait any longer: a CPU that has died
    does not stop the GPU for good.
    """
    await_answer_kernel[(1,)](
        cells[ANSWERED:], cells[GIVEN_UP:], given_up, first, turn, limit, IS_INTERPRETED=is_interpreted(), num_warps=1
    )
