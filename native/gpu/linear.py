"""Activations times a GGUF matrix on the GPU: which kernel, by type and number of tokens.

                  Q8_0                                       other types
up to 4 tokens    native.gpu.matvec: decoded on the fly, float32 arithmetic
up to 16          native.gpu.product: tensor cores on the    native.gpu.matvec
up to 511         codes themselves                           as below
more              decoded to bfloat16, some rows at a time, then torch's product with float32 sums

Rounding follows the activations that the caller brings: bfloat16 ones are taken as they are; of float32 ones products
of up to 16 tokens keep 16 bits at least, those of more tokens 16 with Q8_0 and 8 with other types. The order of sums,
and with it the last bits, depends on the number of tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kimi_lite.native.gpu.dequant import dequantize
from kimi_lite.native.gpu.formats import FLOATS, weights_of
from kimi_lite.native.gpu.matvec import MAX_TOKENS, matvec
from kimi_lite.native.gpu.pieces import DECODED_WEIGHTS
from kimi_lite.native.gpu.product import q8_0_product
from kimi_lite.native.layouts import BY_NAME

FEW_TOKENS = 4  # beyond, rows would be read again for each token from the GPU's cache
MANY_TOKENS = 512  # from here on decoding a matrix first is cheaper (an RTX 4090's bandwidth against its tensor cores)


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    layout_name: str,
    k: int,
    out: torch.Tensor | None = None,
    is_exact: bool = False,
) -> torch.Tensor:
    """x (T, k) bfloat16 or float32, data uint8 (rows, row_bytes) -> float32 (T, rows).

    `out`: float32 (T, rows) to write to. is_exact: float32 arithmetic on the decoded weights however many tokens.
    """
    num_tokens, num_rows = len(x), len(data)
    assert x.shape == (num_tokens, k) and x.device == data.device, (x.shape, k, x.device, data.device)
    assert data.shape[1] == BY_NAME[layout_name].row_bytes(k), (layout_name, data.shape, k)
    if out is None:
        out = torch.empty((num_tokens, num_rows), dtype=torch.float32, device=x.device)
    is_q8_0 = layout_name == "Q8_0" and not is_exact
    if num_tokens == 0:
        return out
    if num_tokens <= (FEW_TOKENS if is_q8_0 else MAX_TOKENS):
        matvec(x[None], data[None], layout_name, out[None])
    elif is_exact or layout_name == "F32":
        _product_float32(x, data, layout_name, out)
    elif is_q8_0 and (num_tokens < MANY_TOKENS or x.dtype == torch.float32):
        q8_0_product(x, data, out)
    else:
        x = x.to(torch.bfloat16)
        step = max(1, DECODED_WEIGHTS // k)
        for first in range(0, num_rows, step):
            rows = slice(first, first + step)
            _product_bfloat16(x, _decoded(data[rows], layout_name, torch.bfloat16), out[:, rows])
    return out


def _decoded(data: torch.Tensor, layout_name: str, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (rows, row_bytes) -> (rows, k) of `dtype`; itself where it is that already."""
    is_plain = FLOATS.get(layout_name) == dtype
    return weights_of(data, layout_name) if is_plain else dequantize(data, layout_name, dtype)


def _product_bfloat16(x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """x (T, k), weights (rows, k), both bfloat16 -> out float32 (T, rows): float32 sums."""
    if x.is_cuda:
        torch.mm(x, weights.T, out_dtype=torch.float32, out=out)
    else:  # torch has mixed products for CUDA alone; products are exact here
        out.copy_(x.float() @ weights.float().T)


def _product_float32(x: torch.Tensor, data: torch.Tensor, layout_name: str, out: torch.Tensor) -> None:
    with _whole_float32():
        torch.mm(x.float(), _decoded(data, layout_name, torch.float32).T, out=out)


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Products of float32 use all 24 bits inside, whatever the process allows elsewhere (TF32 has 11)."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


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
