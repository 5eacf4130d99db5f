"""The end of a layer with routed experts in one launch: every choice from wherever it was computed, the shared expert,
the residual, and the norm that the next layer begins with."""

import torch
import triton
import triton.language as tl

from kimi_lite.native.gpu.arguments import ChoiceRows
from kimi_lite.native.gpu.elementwise import norm_warps

_SPAN = 1024  # columns of a program: a few programs draw a token's rows over PCIe at once


@triton.jit
def join_kernel(
    x, slot_of_choice, hits, misses, weights, shared, norm, out, arrivals, eps, x_stride, shared_stride, out_stride,
    HAS_SHARED: tl.constexpr, HAS_NORM: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (token, span of columns). The token's program that arrives last norms the whole row, so that the order of
    sums is always one."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    mask = column < WIDTH
    total = tl.zeros((SPAN,), tl.float32)
    for k in tl.static_range(TOP_K):
        choice = token * TOP_K + k
        is_hit = tl.load(slot_of_choice + choice + tl.arange(0, 1)) >= 0  # (1,)
        hit = tl.load(hits + choice * WIDTH + column, mask & is_hit, other=0.0)
        miss = tl.load(misses + choice * WIDTH + column, mask & ~is_hit, other=0.0, cache_modifier=".cv")
        total += tl.where(is_hit, hit, miss) * tl.load(weights + choice)
    if HAS_SHARED:
        total += tl.load(shared + token * shared_stride + column, mask, other=0.0)
    at = x + token * x_stride + column
    tl.store(at, tl.load(at, mask, other=0.0) + total, mask)
    if HAS_NORM:
        tl.debug_barrier()  # every thread's part is stored before the program says that it has arrived
        num_spans: tl.constexpr = (WIDTH + SPAN - 1) // SPAN
        if tl.atomic_add(arrivals + token, 1, sem="acq_rel", scope="gpu") == num_spans - 1:
            tl.store(arrivals + token, 0)
            whole = tl.arange(0, TILE)
            is_column = whole < WIDTH
            row = tl.load(x + token * x_stride + whole, is_column, other=0.0, cache_modifier=".cg")
            inverse = 1.0 / tl.sqrt_rn(tl.sum(row * row, 0) / WIDTH + eps)
            row = row * inverse * tl.load(norm + whole, is_column, other=0.0)
            tl.store(out + token * out_stride + whole, row.to(out.dtype.element_ty), is_column)


def join(
    x: torch.Tensor,
    rows: ChoiceRows,
    weights: torch.Tensor,
    shared: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    out: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """x float32 (T, D) += sum over k of weights[t, k] * choice, in the order of the choices, + shared (T, D). Returns
    the new x's norm, (T, D): x / sqrt(mean(x^2) + eps) * norm; None without `norm` (D,).

    weights float32 (T, K). `out`: where the norm goes, of any float type. `arrivals`: int32 (T,) of zeros, which are
    zeros again afterwards; calls that may overlap need their own.
    """
    (num_tokens, width), top_k = x.shape, weights.shape[1]
    assert x.dtype == torch.float32 and x.stride(1) == 1 and weights.shape == (num_tokens, top_k), (x.shape, weights)
    assert rows.slot_of_choice.dtype == torch.int32 and len(rows.slot_of_choice) >= num_tokens * top_k, rows
    for part in (rows.hits, rows.misses):
        assert part.shape[1] == width and len(part) >= num_tokens * top_k and part.is_contiguous(), part.shape
    assert weights.is_contiguous() and rows.slot_of_choice.is_contiguous(), (weights.stride(), rows.slot_of_choice)
    assert shared is None or (shared.shape == x.shape and shared.stride(1) == 1), shared.shape
    if norm is not None:
        out = torch.empty_like(x) if out is None else out
        arrivals = torch.zeros(num_tokens, dtype=torch.int32, device=x.device) if arrivals is None else arrivals
        assert norm.shape == (width,) and out.shape == x.shape and out.stride(1) == 1, (norm.shape, out.shape)
        assert arrivals.dtype == torch.int32 and len(arrivals) >= num_tokens, (arrivals.dtype, len(arrivals))
    other = x if shared is None else shared
    target = x if out is None else out
    if num_tokens > 0:
        join_kernel[(num_tokens, triton.cdiv(width, _SPAN))](
            x, rows.slot_of_choice, rows.hits, rows.misses, weights, other, weights if norm is None else norm, target,
            rows.slot_of_choice if arrivals is None else arrivals, eps, x.stride(0), other.stride(0), target.stride(0),
            HAS_SHARED=shared is not None, HAS_NORM=norm is not None, TOP_K=top_k, WIDTH=width, SPAN=_SPAN,
            TILE=triton.next_power_of_2(width), num_warps=norm_warps(width),
        )  # fmt: skip
    return out if norm is not None else None
