"""Some tokens times a Q8_0 matrix on tensor cores: the weights stay as they are, no copy of the matrix is made.

An int8 code is exact in bfloat16, and the block's scale multiplies the float32 product of 32 codes: the weights lose
nothing. Activations of bfloat16 are taken as they are; float32 ones as the sum of two bfloat16 (16 bits of 24), for
twice the work. Weights are the first factor, of whose rows each warp needs its own alone.
"""

import torch
import triton
import triton.language as tl

from kimi_lite.native.gpu.support import factor_type
from kimi_lite.native.layouts import BY_NAME

_PROGRAMS = 256  # two for each multiprocessor of an RTX 4090 (128) or H100 (132)


@triton.jit(do_not_specialize=["num_tokens"])
def q8_0_product_kernel(
    x, data, out, num_tokens, num_rows, num_blocks, row_stride, x_stride, out_stride, IS_SPLIT: tl.constexpr,
    FACTOR: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows i * ROWS and on for tokens j * TOKENS and on. `row_stride` counts 16-bit words.

    A round takes BLOCKS blocks of each row, each with a sum of its own until the end: every warp has blocks of its own,
    and loads of several blocks are under way.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, 32)[None, None, :]
    row_at = data + tl.minimum(row, num_rows - 1).to(tl.int64)[None, :] * row_stride * 2  # (1, ROWS)
    x_at = x + tl.minimum(token, num_tokens - 1)[None, :, None].to(tl.int64) * x_stride + column  # (1, TOKENS, 32)
    total = tl.zeros((BLOCKS, ROWS, TOKENS), tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)[:, None]  # (BLOCKS, 1)
        is_block = block < num_blocks
        at = row_at + block * 34  # (BLOCKS, ROWS)
        scale = tl.load(at.to(tl.pointer_type(tl.float16)), is_block, other=0.0).to(tl.float32)
        codes_at = (at[:, :, None] + 2 + column).to(tl.pointer_type(tl.int8))
        codes = tl.load(codes_at, is_block[:, :, None], other=0).to(FACTOR)  # (BLOCKS, ROWS, 32)
        values = tl.load(x_at + block[:, :, None] * 32, is_block[:, :, None], other=0.0)  # (BLOCKS, TOKENS, 32)
        high = values.to(tl.bfloat16)
        part = tl.dot(codes, tl.permute(high.to(FACTOR), (0, 2, 1)))  # (BLOCKS, ROWS, TOKENS)
        if IS_SPLIT:
            low = (values - high.to(tl.float32)).to(tl.bfloat16)
            part = tl.dot(codes, tl.permute(low.to(FACTOR), (0, 2, 1)), part)
        total += part * scale[:, :, None]
    at = out + token[None, :].to(tl.int64) * out_stride + row[:, None]
    tl.store(at, tl.sum(total, 0), (token < num_tokens)[None, :] & (row < num_rows)[:, None])


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
    tokens = min(64, max(16, triton.next_power_of_2(num_tokens)))
    num_columns = triton.cdiv(num_tokens, tokens)
    rows = 32 if triton.cdiv(num_rows, 32) * num_columns >= _PROGRAMS else 16
    q8_0_product_kernel[(triton.cdiv(num_rows, rows), num_columns)](
        x, data, out, num_tokens, num_rows, k // 32, data.stride(0) // 2, x.stride(0), out.stride(0),
        IS_SPLIT=x.dtype == torch.float32, FACTOR=factor_type(torch.bfloat16), TOKENS=tokens, ROWS=rows, BLOCKS=4,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
