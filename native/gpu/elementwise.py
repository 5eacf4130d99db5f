"""The small steps between products: norms, rotation, SwiGLU, sums of expert outputs. One launch each, `out`
anywhere."""

import torch
import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x, delta, weight, out, also, eps, x_stride, delta_stride, out_stride, also_stride, HAS_DELTA: tl.constexpr,
    HAS_ALSO: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program: one row, in registers from the load to the store."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    mask = column < K
    value = tl.load(x + row * x_stride + column, mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + row * delta_stride + column, mask, other=0.0).to(tl.float32)
        tl.store(x + row * x_stride + column, value.to(x.dtype.element_ty), mask)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / K + eps)
    value = value * inverse * tl.load(weight + column, mask, other=0.0)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask)
    if HAS_ALSO:
        tl.store(also + row * also_stride + column, value.to(also.dtype.element_ty), mask)


def norm_warps(k: int) -> int:
    """Of a program that norms a row of k: one order of sums wherever a norm is computed."""
    return 8 if k > 2048 else 4


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    delta: torch.Tensor | None = None,
    also: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (T, k), weight float32 (k,) -> (T, k) of `dtype`: x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467).

    With `delta` (T, k), x becomes x + delta first, in place: a residual and the norm behind it in one reading. `also`
    (T, k): a second place for the result, in its own type; pinned memory of the host too.
    """
    num_rows, k = x.shape
    if out is None:
        out = torch.empty((num_rows, k), dtype=dtype, device=x.device)
    assert x.stride(1) == out.stride(1) == 1 and (delta is None or delta.stride(1) == 1), (x.stride(), out.stride())
    assert weight.shape == (k,) and out.shape == x.shape and (delta is None or delta.shape == x.shape), (
        weight.shape,
        k,
    )
    assert also is None or (also.shape == x.shape and also.stride(1) == 1), also.shape
    other, second = x if delta is None else delta, out if also is None else also
    if num_rows > 0:
        rms_norm_kernel[(num_rows,)](
            x, other, weight, out, second, eps, x.stride(0), other.stride(0), out.stride(0), second.stride(0),
            HAS_DELTA=delta is not None, HAS_ALSO=also is not None, K=k, TILE=triton.next_power_of_2(k),
            num_warps=norm_warps(k),
        )  # fmt: skip
    return out


@triton.jit
def rope_kernel(
    x, cos, sin, token_stride, head_stride, num_heads, ROPE: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr
):
    """Program (token, group of heads): pairs (2i, 2i + 1) of each head turned in place."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, TILE)[None, :]
    is_pair = pair < ROPE // 2
    angle = token * (ROPE // 2) + pair
    c, s = tl.load(cos + angle, is_pair, other=0.0), tl.load(sin + angle, is_pair, other=0.0)
    mask = (head < num_heads) & is_pair
    at = x + token * token_stride + head * head_stride + 2 * pair
    even = tl.load(at, mask, other=0.0).to(tl.float32)
    odd = tl.load(at + 1, mask, other=0.0).to(tl.float32)
    tl.store(at, (even * c - odd * s).to(x.dtype.element_ty), mask)
    tl.store(at + 1, (even * s + odd * c).to(x.dtype.element_ty), mask)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (T, H, P), any strides but the last, turned in place; cos and sin float32 (T, P / 2). GGUF's "normal" pairs."""
    num_tokens, num_heads, width = x.shape
    assert cos.shape == sin.shape == (num_tokens, width // 2) and x.stride(2) == 1, (x.shape, cos.shape)
    assert cos.is_contiguous() and sin.is_contiguous() and width % 2 == 0, (cos.stride(), width)
    if num_tokens > 0:
        rope_kernel[(num_tokens, triton.cdiv(num_heads, 16))](
            x, cos, sin, x.stride(0), x.stride(1), num_heads,
            ROPE=width, HEADS=16, TILE=triton.next_power_of_2(width // 2), num_warps=4,
        )  # fmt: skip
    return x


@triton.jit
def swiglu_kernel(gate, up, out, num_columns, gate_stride, up_stride, out_stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < num_columns
    g = tl.load(gate + row * gate_stride + column, mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask)


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """silu(gate) * up, all (T, F) (arXiv 2002.05202)."""
    num_rows, width = gate.shape
    if out is None:
        out = torch.empty((num_rows, width), dtype=dtype, device=gate.device)
    assert up.shape == out.shape == gate.shape, (gate.shape, up.shape, out.shape)
    assert gate.stride(1) == up.stride(1) == out.stride(1) == 1, (gate.stride(), up.stride(), out.stride())
    if num_rows > 0:
        swiglu_kernel[(num_rows, triton.cdiv(width, 1024))](
            gate, up, out, width, gate.stride(0), up.stride(0), out.stride(0), TILE=1024, num_warps=4
        )
    return out


@triton.jit
def weighted_sum_kernel(
    choices, weights, base, out, num_columns, base_stride, out_stride, HAS_BASE: tl.constexpr, TOP_K: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (token, span of columns): choice after choice, so that the sum never depends on where each was
    computed."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < num_columns
    total = tl.zeros((TILE,), tl.float32)
    for k in range(TOP_K):
        value = tl.load(choices + (token * TOP_K + k) * num_columns + column, mask, other=0.0)
        total += value * tl.load(weights + token * TOP_K + k)
    if HAS_BASE:
        total += tl.load(base + token * base_stride + column, mask, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + column, total, mask)


def weighted_sum(
    choices: torch.Tensor, weights: torch.Tensor, base: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """choices float32 (T, K, D), weights float32 (T, K) -> float32 (T, D): sum of weight * choice, + base (T, D)."""
    num_tokens, top_k, width = choices.shape
    if out is None:
        out = torch.empty((num_tokens, width), dtype=torch.float32, device=choices.device)
    assert choices.is_contiguous() and weights.is_contiguous() and weights.shape == (num_tokens, top_k), weights.shape
    assert out.shape == (num_tokens, width) and out.stride(1) == 1 and (base is None or base.shape == out.shape), (
        out.shape
    )
    other = out if base is None else base
    assert other.stride(1) == 1, other.stride()
    if num_tokens > 0:
        weighted_sum_kernel[(num_tokens, triton.cdiv(width, 1024))](
            choices, weights, other, out, width, other.stride(0), out.stride(0),
            HAS_BASE=base is not None, TOP_K=top_k, TILE=1024, num_warps=4,
        )  # fmt: skip
    return out
