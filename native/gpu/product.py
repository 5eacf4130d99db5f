"""Many tokens times a Q8_0 matrix on tensor cores: the weights stay as they are, no copy of the matrix is made.

An int8 code is exact in bfloat16, and the block's scale multiplies the float32 product of 32 codes: the weights lose
nothing. Activations of bfloat16 are taken as they are; float32 ones as the sum of two bfloat16 (16 bits of 24), for
twice the work.
"""

import torch
import triton
import triton.language as tl

from kimi_lite.native.gpu.support import factor_type
from kimi_lite.native.layouts import BY_NAME


@triton.jit(do_not_specialize=["num_tokens"])
def q8_0_product_kernel(
    x, data, out, num_tokens, num_rows, num_blocks, row_stride, x_stride, out_stride, IS_SPLIT: tl.constexpr,
    FACTOR: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows i * BLOCK_ROWS and on for tokens j * BLOCK_TOKENS and on. `row_stride` counts 16-bit
    words."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, 32)
    block_at = data + tl.minimum(row, num_rows - 1).to(tl.int64) * row_stride * 2  # (BLOCK_ROWS,)
    x_at = x + tl.minimum(token, num_tokens - 1)[:, None].to(tl.int64) * x_stride + column[None, :]
    total = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), tl.float32)
    for _ in range(num_blocks):
        scale = tl.load(block_at.to(tl.pointer_type(tl.float16))).to(tl.float32)
        codes = tl.load((block_at[None, :] + 2 + column[:, None]).to(tl.pointer_type(tl.int8))).to(FACTOR)  # (32, ROWS)
        values = tl.load(x_at)
        high = values.to(tl.bfloat16)
        part = tl.dot(high.to(FACTOR), codes)
        if IS_SPLIT:
            low = (values - high.to(tl.float32)).to(tl.bfloat16)
            part = tl.dot(low.to(FACTOR), codes, part)
        total += part * scale[None, :]
        block_at += 34
        x_at += 32
    at = out + token[:, None].to(tl.int64) * out_stride + row[None, :]
    tl.store(at, total, (token < num_tokens)[:, None] & (row < num_rows)[None, :])


def q8_0_product(x: torch.Tensor, data: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """x (T, k) bfloat16 or float32, data uint8 (rows, row_bytes) of Q8_0 -> out float32 (T, rows)."""
    num_tokens, k = x.shape
    num_rows = len(data)
    assert x.dtype in (torch.bfloat16, torch.float32) and x.stride(1) == 1, (x.dtype, x.stride())
    assert data.shape[1] == BY_NAME["Q8_0"].row_bytes(k) and data.stride(1) == 1, (data.shape, k)
    assert data.data_ptr() % 2 == 0 and data.stride(0) % 2 == 0, data.stride()
    assert out.shape == (num_tokens, num_rows) and out.dtype == torch.float32 and out.stride(1) == 1, (
        out.shape,
        out.dtype,
    )
    block_tokens = 32 if num_tokens <= 32 else 64 if num_tokens <= 64 else 128
    grid = (triton.cdiv(num_rows, 64), triton.cdiv(num_tokens, block_tokens))
    q8_0_product_kernel[grid](
        x, data, out, num_tokens, num_rows, k // 32, data.stride(0) // 2, x.stride(0), out.stride(0),
        IS_SPLIT=x.dtype == torch.float32, FACTOR=factor_type(torch.bfloat16), BLOCK_TOKENS=block_tokens, BLOCK_ROWS=64,
        num_warps=8 if block_tokens == 128 else 4, num_stages=3,
    )  # fmt: skip
    return out
