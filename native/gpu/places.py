"""The sum over a token's experts where their products lie in the order of the experts: one launch for a whole prompt.

Experts of a prompt are multiplied in groups, each of which writes its rows in one piece. A token's rows lie apart then,
at `places`; they are added in the order of its choices, so that the sum depends neither on the groups nor on the order
in which they came. Without atomics: the same bits every time, and those of `elementwise.weighted_sum`.
"""

import torch
import triton
import triton.language as tl

_TILE = 1024


@triton.jit
def sum_at_places_kernel(
    rows, places, weights, base, out, num_columns, row_stride, base_stride, out_stride, HAS_BASE: tl.constexpr,
    TOP_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (token, span of columns)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < num_columns
    total = tl.zeros((TILE,), tl.float32)
    for k in range(TOP_K):
        place = tl.load(places + token * TOP_K + k).to(tl.int64)
        value = tl.load(rows + place * row_stride + column, mask, other=0.0)
        total += value * tl.load(weights + token * TOP_K + k)
    if HAS_BASE:
        total += tl.load(base + token * base_stride + column, mask, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + column, total, mask)


def sum_at_places(
    rows: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor,
    base: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """rows float32 (n, D), places int32 and weights float32 (T, K) -> float32 (T, D): sum of weight * rows[place],
    + base (T, D)."""
    (num_tokens, top_k), width = places.shape, rows.shape[1]
    if out is None:
        out = torch.empty((num_tokens, width), dtype=torch.float32, device=rows.device)
    assert rows.dtype == weights.dtype == torch.float32 and places.dtype == torch.int32, (rows.dtype, places.dtype)
    assert weights.shape == places.shape and weights.is_contiguous() and places.is_contiguous(), weights.shape
    assert out.shape == (num_tokens, width) and (base is None or base.shape == out.shape), out.shape
    other = out if base is None else base
    if num_tokens > 0:
        assert rows.stride(1) == out.stride(1) == other.stride(1) == 1, (rows.stride(), out.stride(), other.stride())
        sum_at_places_kernel[(num_tokens, triton.cdiv(width, _TILE))](
            rows, places, weights, other, out, width, rows.stride(0), other.stride(0), out.stride(0),
            HAS_BASE=base is not None, TOP_K=top_k, TILE=_TILE, num_warps=4,
        )  # fmt: skip
    return out
