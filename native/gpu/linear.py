"""Activations times a GGUF matrix on the GPU: which kernel, by type and number of tokens.

up to 16 tokens   native.gpu.matvec: every type, decoded on the fly, float32 arithmetic
more, Q8_0        native.gpu.product: tensor cores on the codes themselves
more, others      dequantized to bfloat16 once, then torch's product with float32 sums; F32 stays float32
"""

import torch

from kimi_lite.native.gpu.dequant import dequantize
from kimi_lite.native.gpu.formats import weights_of
from kimi_lite.native.gpu.matvec import MAX_TOKENS, matvec
from kimi_lite.native.gpu.product import q8_0_product
from kimi_lite.native.layouts import BY_NAME


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    layout_name: str,
    k: int,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (T, k) bfloat16 or float32, data uint8 (rows, row_bytes) -> float32 (T, rows).

    `out`: float32 (T, rows) to write to. `workspace`: bfloat16, rows * k values, for the weights of a large product.
    With both nothing is allocated.
    """
    num_tokens, num_rows = len(x), len(data)
    assert x.shape == (num_tokens, k) and x.device == data.device, (x.shape, k, x.device, data.device)
    assert data.shape[1] == BY_NAME[layout_name].row_bytes(k), (layout_name, data.shape, k)
    if out is None:
        out = torch.empty((num_tokens, num_rows), dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return out
    if num_tokens <= MAX_TOKENS:
        matvec(x[None], data[None], layout_name, out[None])
        return out
    if layout_name == "Q8_0":
        return q8_0_product(x, data, out)
    if layout_name == "F32":
        return torch.mm(x.float(), weights_of(data, "F32").T, out=out)
    plain = None if workspace is None else workspace.view(-1)[: num_rows * k].view(num_rows, k)
    return product_bf16(x, dequantize(data, layout_name, torch.bfloat16, plain), out)


def product_bf16(x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """x (T, k), weights bfloat16 (rows, k) -> out float32 (T, rows): bfloat16 factors, float32 sums."""
    x = x.to(torch.bfloat16)
    if x.is_cuda:
        return torch.mm(x, weights.T, out_dtype=torch.float32, out=out)
    return torch.mm(
        x.float(), weights.float().T, out=out
    )  # torch has mixed products for CUDA alone; products are exact here


def heads_linear(
    x: torch.Tensor, data: torch.Tensor, layout_name: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x (T, H, k), data uint8 (H, rows, row_bytes) -> float32 (T, H, rows): each head with its own matrix (MLA's k_b
    and v_b).

    Any strides between tokens and heads. More than 16 tokens go 16 at a time: meant for decoding.
    """
    if out is None:
        out = torch.empty((len(x), len(data), data.shape[1]), dtype=torch.float32, device=x.device)
    for first in range(0, len(x), MAX_TOKENS):
        part = slice(first, first + MAX_TOKENS)
        matvec(x[part].transpose(0, 1), data, layout_name, out[part].transpose(0, 1))
    return out
