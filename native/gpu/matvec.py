"""Few tokens times a quantized matrix: each weight is decoded where it is multiplied, and bytes are read once.

A program takes ROWS rows. Its threads lie along the row, so that a warp reads neighbouring bytes, and each has the same
lanes of all rows and all tokens: an activation loaded once serves ROWS rows, a decoded weight serves all tokens. The
tiles are (tokens, rows, runs of lanes, RUN) with all threads along the runs, so that no exchange is needed until the
one sum at the end.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kimi_lite.native.gpu.formats import Format, formats, table_for, weights_of
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.types.gpu_parts import row_scale

MAX_TOKENS = 16  # beyond that a tiled product is faster (native.gpu.linear)


@triton.jit
def row_products(
    x, base_of_row, table, num_blocks, token_offset, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    DECODE: tl.constexpr, COLUMN: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, HEADER: tl.constexpr, RUN: tl.constexpr, IS_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """x rows at `token_offset` (TOKENS, 1, 1, 1) times the rows at `base_of_row` (1, ROWS, 1, 1) -> float32 (TOKENS,
    ROWS)."""
    total = tl.zeros((TOKENS, ROWS, TILE // RUN, RUN), tl.float32)
    for start in range(0, num_blocks * LANES, TILE):
        lane = start + tl.arange(0, TILE // RUN)[None, None, :, None] * RUN  # the first of each run
        block, first = lane // LANES, lane % LANES
        unit = first + tl.arange(0, RUN)[None, None, None, :]
        mask = block < num_blocks  # (1, 1, runs, 1)
        base = base_of_row + HEADER + block * BLOCK_BYTES  # (1, ROWS, runs, 1)
        for plane in tl.static_range(PLANES):
            weight = DECODE(base, first, unit, mask, table, plane)
            column = COLUMN(unit, plane)
            is_weight = mask & (column < BLOCK_SIZE) if IS_PADDED else mask
            at = tl.max_contiguous(tl.multiple_of(block * BLOCK_SIZE + column, [1, 1, 1, RUN]), [1, 1, 1, RUN])
            total += weight * tl.load(x + token_offset + at, is_weight, other=0.0).to(tl.float32)
    total = tl.sum(tl.sum(total, 3), 2)
    if HEADER > 0:
        total *= tl.reshape(row_scale(base_of_row, HEADER), (1, ROWS))
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def matvec_kernel(
    x, data, out, table, num_tokens, num_rows, num_blocks, row_stride, x_stride, out_stride, x_head, data_head,
    out_head,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
    DECODE: tl.constexpr, COLUMN: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, HEADER: tl.constexpr, RUN: tl.constexpr, IS_PADDED: tl.constexpr,
    ALIGN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (i, head): rows i * ROWS and on. Strides of `data` count units of ALIGN bytes, the others elements.

    Tokens and rows beyond the last are computed as the last again, and not stored: no masks in the loop.
    """
    head, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS
    row = tl.minimum(first + tl.arange(0, ROWS), num_rows - 1)[None, :, None, None].to(tl.int64)
    token = tl.minimum(tl.arange(0, TOKENS), num_tokens - 1)[:, None, None, None].to(tl.int64)
    total = row_products(
        x, data + (head * data_head + row * row_stride) * ALIGN, table, num_blocks, head * x_head + token * x_stride,
        TOKENS,
        ROWS, DECODE, COLUMN, LANES, PLANES, BLOCK_SIZE, BLOCK_BYTES, HEADER, RUN, IS_PADDED, TILE,
    )  # fmt: skip
    token, row = tl.arange(0, TOKENS)[:, None], first + tl.arange(0, ROWS)[None, :]
    tl.store(out + head * out_head + token * out_stride + row, total, (token < num_tokens) & (row < num_rows))


class Tile(NamedTuple):
    """Of one round of a program's loop: `num_lanes` of a row, by `num_warps`."""

    num_lanes: int
    num_warps: int


def tile_for(each: Format, k: int, max_unroll: int) -> Tile:
    """As many loads in flight as may be, then as many warps, where a row's last round wastes no more than a tenth.

    A multiprocessor of an RTX 4090 must have about 6 KB under way to draw its share of the bandwidth; a run of two
    bytes from each of its 1,536 threads is half of that, so that a thread takes up to `max_unroll` runs a round.
    """
    row_lanes = k // each.block_size * each.num_lanes
    tiles = [(unroll, Tile(32 * warps * each.run * unroll, warps)) for unroll in (4, 2, 1) for warps in (4, 2, 1)]
    tiles = [tile for unroll, tile in tiles if unroll <= max_unroll]
    padded = [triton.cdiv(row_lanes, tile.num_lanes) * tile.num_lanes for tile in tiles]
    limit = max(min(padded), 1.1 * row_lanes)
    return next(tile for tile, size in zip(tiles, padded, strict=True) if size <= limit)


def rows_for(num_rows: int, num_tokens: int, k: int) -> int:
    """Rows of a program, of all heads' `num_rows`: several share loads of activations, but the whole GPU must have
    programs.

    Rows as short as those of MLA's k_b and v_b would leave a program too little to do.
    """
    is_short = k <= 512
    if num_tokens > 4:
        return 2 if is_short and num_rows >= 8192 else 1
    if num_rows < 4096:
        return 1
    return (8 if is_short else 4) if num_tokens == 1 else 2


def matvec(
    x: torch.Tensor, data: torch.Tensor, layout_name: str, out: torch.Tensor, rows_per_program: int | None = None
) -> torch.Tensor:
    """x (H, T, k), data uint8 (H, rows, row_bytes) -> out float32 (H, T, rows): T at most 16. One head is a plain
    product."""
    num_heads, num_tokens, k = x.shape
    each, layout = formats()[layout_name], BY_NAME[layout_name]
    assert data.shape[2] == layout.row_bytes(k) and data.shape[0] == num_heads, (layout_name, x.shape, data.shape)
    assert x.stride(2) == 1 and 0 < num_tokens <= MAX_TOKENS, (x.shape, x.stride())
    assert out.shape == (num_heads, num_tokens, data.shape[1]) and out.dtype == torch.float32 and out.stride(2) == 1, (
        out.shape
    )
    assert data.data_ptr() % each.run == 0, (layout_name, data.data_ptr())
    num_rows, num_blocks = data.shape[1], k // layout.block_size
    tokens = triton.next_power_of_2(num_tokens)
    rows = rows_per_program or rows_for(num_rows * num_heads, tokens, k)
    tile = tile_for(each, k, max(1, 4 // (rows * tokens)))
    matvec_kernel[(triton.cdiv(num_rows, rows), num_heads)](
        x, weights_of(data, layout_name), out, table_for(each, data), num_tokens, num_rows, num_blocks,
        each.units(data.stride(1)), x.stride(1), out.stride(1), x.stride(0), each.units(data.stride(0)), out.stride(0),
        TOKENS=tokens, ROWS=rows, **each.constants(), ALIGN=each.align, TILE=tile.num_lanes,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return out
