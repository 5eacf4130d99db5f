"""GGUF bytes to plain weights, every type: for large products, and to look at a tensor."""

import torch
import triton
import triton.language as tl

from kimi_lite.native.gpu.formats import FLOATS, formats, table_for, weights_of
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.types.gpu_parts import row_scale

_NUM_WARPS = 4


@triton.jit
def dequantize_kernel(
    data, out, table, num_blocks, row_stride, out_stride,
    DECODE: tl.constexpr, COLUMN: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, HEADER: tl.constexpr, RUN: tl.constexpr, IS_PADDED: tl.constexpr,
    ALIGN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (row, i): lanes i * TILE and on of a row. `row_stride` counts units of ALIGN bytes."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * TILE + tl.arange(0, TILE // RUN)[:, None] * RUN  # the first of each run: (runs, 1)
    block, first = lane // LANES, lane % LANES
    unit = first + tl.arange(0, RUN)[None, :]
    mask = block < num_blocks
    start = data + row * row_stride * ALIGN
    base = start + HEADER + block * BLOCK_BYTES
    for plane in tl.static_range(PLANES):
        weight = DECODE(base, first, unit, mask, table, plane)
        if HEADER > 0:
            weight *= row_scale(start, HEADER)
        column = COLUMN(unit, plane)
        is_weight = mask & (column < BLOCK_SIZE) if IS_PADDED else mask
        at = tl.max_contiguous(tl.multiple_of(block * BLOCK_SIZE + column, [1, RUN]), [1, RUN])
        tl.store(out + row * out_stride + at, weight.to(out.dtype.element_ty), is_weight)


def dequantize(
    data: torch.Tensor, layout_name: str, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """uint8 (rows, row_bytes) -> (rows, k) of `dtype`. Rows may be further apart than row_bytes; `out` has any row
    stride."""
    num_rows, row_bytes = data.shape
    layout, each = BY_NAME[layout_name], formats()[layout_name]
    k = layout.row_weights(row_bytes)
    if out is None:
        out = torch.empty((num_rows, k), dtype=dtype, device=data.device)
    assert out.shape == (num_rows, k) and out.dtype == dtype and out.stride(1) == 1, (
        out.shape,
        out.dtype,
        out.stride(),
    )
    weights = weights_of(data, layout_name)
    if layout_name in FLOATS:
        out.copy_(weights)
        return out
    tile = 32 * _NUM_WARPS * each.run
    num_lanes = k // layout.block_size * each.num_lanes
    assert data.data_ptr() % each.run == 0, (layout_name, data.data_ptr())
    if num_rows > 0:
        dequantize_kernel[(num_rows, triton.cdiv(num_lanes, tile))](
            weights, out, table_for(each, data), k // layout.block_size, each.units(data.stride(0)), out.stride(0),
            **each.constants(), ALIGN=each.align, TILE=tile, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return out
