"""Multi-head latent attention over the paged cache, in the absorbed form for decoding (`native.gpu.latent` writes the
cache).

A layer's storage is (num_pages, 64, row): the normed latent, then the rotated shared key, of each position
(DeepSeek-V2, arXiv
2405.04434, section 2.1; rows as in `native.latent_rows`). Keys are the whole row, values its first R entries, so that a
row is loaded once for both and for 16 heads. Long contexts are cut into splits that run side by side and are merged
afterwards (flash decoding). How many splits follows from shapes, never from lengths: no wait for the GPU, and CUDA
graphs can hold it.
"""

import torch
import triton
import triton.language as tl

from kimi_lite.native.gpu.latent import check_storage, write_latent
from kimi_lite.native.gpu.support import factor_type
from kimi_lite.native.latent_rows import PAGE_TOKENS

__all__ = ["mla_decode", "num_splits_for", "partial_size", "write_latent"]

BLOCK_HEADS = 16  # the least that tensor cores take
_PROGRAMS = 128  # one for each multiprocessor of an RTX 4090 (128) or H100 (132); shared memory holds one


@triton.jit
def q8_values(row, is_visible, FIRST: tl.constexpr, COUNT: tl.constexpr, LATENT: tl.constexpr, TILE: tl.constexpr):
    """float16 (positions, TILE): COUNT values from FIRST on of rows of int8 codes with a scale per 32, read once a
    group."""
    group, place = tl.arange(0, TILE // 32)[None, :, None], tl.arange(0, 32)[None, None, :]
    row, is_visible = row[:, None, None], is_visible[:, None, None]
    codes_at = (row + FIRST + group * 32 + place).to(tl.pointer_type(tl.int8))
    codes = tl.load(codes_at, is_visible & (group * 32 + place < COUNT), other=0)
    scales_at = (row + LATENT + (FIRST // 32 + group) * 2).to(tl.pointer_type(tl.float16))
    scales = tl.load(scales_at, is_visible & (group * 32 < COUNT), other=0.0)
    values = codes.to(tl.float32) * scales.to(tl.float32)
    return tl.reshape(values.to(tl.float16), (row.shape[0], TILE))


@triton.jit
def splits_of(length, num_splits):
    """How many of the splits have work: none less than 128 positions, or merging would cost more than it saves."""
    return tl.maximum(1, tl.minimum(num_splits, tl.cdiv(length, 128)))


@triton.jit(do_not_specialize=["num_splits", "table_stride"])
def decode_kernel(
    q_latent, q_rope, storage, page_table, lengths, partial, sums, scale, table_stride, ql_token, ql_head, qr_token,
    qr_head,
    num_heads, num_splits, RANK: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, POSITIONS: tl.constexpr,
    FACTOR: tl.constexpr, IS_Q8: tl.constexpr, RANK_TILE: tl.constexpr, ROPE_TILE: tl.constexpr,
):  # fmt: skip
    """Program (token, group of heads, split). Writes the split's normed context and the logarithm of its sum of
    weights."""
    token, split = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = (head < num_heads)[:, None]
    length = tl.load(lengths + token)
    num_used = splits_of(length, num_splits)
    if split >= num_used:
        return
    num_blocks = tl.cdiv(length, POSITIONS)
    first, last = num_blocks * split // num_used, num_blocks * (split + 1) // num_used
    rank, rope, place = tl.arange(0, RANK_TILE), tl.arange(0, ROPE_TILE), tl.arange(0, POSITIONS)
    in_rank, in_rope = rank < RANK, rope < ROPE
    dtype = tl.float16 if IS_Q8 else storage.dtype.element_ty
    ROW: tl.constexpr = RANK + ROPE + (RANK + ROPE + 31) // 32 * 2 if IS_Q8 else RANK + ROPE
    token = token.to(tl.int64)
    ql_at = q_latent + token * ql_token + head[:, None] * ql_head + rank[None, :]
    qr_at = q_rope + token * qr_token + head[:, None] * qr_head + rope[None, :]
    ql = tl.load(ql_at, is_head & in_rank[None, :], other=0.0).to(tl.float32)
    qr = tl.load(qr_at, is_head & in_rope[None, :], other=0.0).to(tl.float32)
    ql, qr = (ql * scale).to(dtype).to(FACTOR), (qr * scale).to(dtype).to(FACTOR)
    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    context = tl.zeros((HEADS, RANK_TILE), tl.float32)
    for block in range(first, last):
        position = block * POSITIONS + place
        page = tl.load(page_table + token * table_stride + block * POSITIONS // 64).to(tl.int64)
        row = storage + (page * 64 + position % 64) * ROW  # (POSITIONS,)
        is_visible = position < length
        if IS_Q8:
            latent = q8_values(row, is_visible, 0, RANK, RANK + ROPE, RANK_TILE).to(FACTOR)
            key = tl.trans(q8_values(row, is_visible, RANK, ROPE, RANK + ROPE, ROPE_TILE).to(FACTOR))
        else:
            in_latent, in_key = is_visible[:, None] & in_rank[None, :], is_visible[None, :] & in_rope[:, None]
            latent = tl.load(row[:, None] + rank[None, :], in_latent, other=0.0).to(FACTOR)  # (POSITIONS, RANK)
            key = tl.load(row[None, :] + RANK + rope[:, None], in_key, other=0.0).to(FACTOR)  # (ROPE, POSITIONS)
        scores = tl.dot(ql, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(qr, key, scores, input_precision="ieee")
        scores = tl.where(is_visible[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        factor = tl.exp(peak - new_peak)
        weights = tl.exp(scores - new_peak[:, None])
        context = context * factor[:, None] + tl.dot(weights.to(dtype).to(FACTOR), latent, input_precision="ieee")
        total = total * factor + tl.sum(weights, 1)
        peak = new_peak
    at = (token * num_heads + head) * num_splits + split  # (HEADS,)
    divisor = tl.where(length > 0, total, 1.0)
    tl.store(partial + at[:, None] * RANK + rank[None, :], context / divisor[:, None], is_head & in_rank[None, :])
    tl.store(sums + at, tl.where(length > 0, peak + tl.log(total), float("-inf")), head < num_heads)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(partial, sums, lengths, out, num_heads, num_splits, RANK: tl.constexpr, TILE: tl.constexpr):
    """Program: one head of one token: its splits, each weighted by its share of the whole sum."""
    which = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, TILE)
    peak, total = float("-inf"), 0.0
    context = tl.zeros((TILE,), tl.float32)
    for split in range(splits_of(tl.load(lengths + which // num_heads), num_splits)):
        at = which * num_splits + split
        size = tl.load(sums + at)
        new_peak = tl.maximum(peak, size, propagate_nan=tl.PropagateNan.ALL)
        is_first = new_peak == float("-inf")  # nothing yet: the difference below would be NaN
        factor = tl.where(is_first, 0.0, tl.exp(peak - new_peak))
        share = tl.where(is_first, 0.0, tl.exp(size - new_peak))
        context = context * factor + tl.load(partial + at * RANK + rank, rank < RANK, other=0.0) * share
        total, peak = total * factor + share, new_peak
    tl.store(out + which * RANK + rank, context / tl.where(total == 0.0, 1.0, total), rank < RANK)


def num_splits_for(num_tokens: int, num_heads: int, max_positions: int) -> int:
    """Most splits of a token's context: enough programs for the whole GPU. Short contexts use fewer (`splits_of`)."""
    groups = num_tokens * triton.cdiv(num_heads, BLOCK_HEADS)
    return max(1, min(triton.cdiv(_PROGRAMS, groups), 64, triton.cdiv(max_positions, 128)))


def mla_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    storage: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    partial: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """q_latent (T, H, R), q_rope (T, H, P) rotated, storage (num_pages, 64, row) -> float32 (T, H, R): context in
    latent space.

    page_table int32 (T, pages): a token's pages in order; lengths int32 (T,): how many positions it sees, its own
    included; 0 gives zeros (padding). `scale` multiplies the scores. Products have the storage's type as factors
    (float32: exact; 8 bits: float16) and float32 sums. `partial`: float32 working space of partial_size(...) values.
    """
    num_tokens, num_heads, rank = q_latent.shape
    rope, max_pages = q_rope.shape[2], page_table.shape[1]
    check_storage(storage, rank, rope)
    assert q_latent.stride(2) == q_rope.stride(2) == page_table.stride(1) == 1, (q_latent.stride(), q_rope.stride())
    if num_splits is None:
        num_splits = num_splits_for(num_tokens, num_heads, max_pages * PAGE_TOKENS)
    if out is None:
        out = torch.empty((num_tokens, num_heads, rank), dtype=torch.float32, device=q_latent.device)
    size = partial_size(num_tokens, num_heads, rank, num_splits)
    if partial is None:
        partial = torch.empty(size, dtype=torch.float32, device=q_latent.device)
    assert out.is_contiguous() and partial.numel() >= size, (out.stride(), partial.numel(), size)
    if num_tokens == 0:
        return out
    is_q8 = storage.dtype == torch.uint8
    rank_tile, rope_tile = (max(32, triton.next_power_of_2(each)) for each in (rank, rope))
    positions, num_stages, num_warps = _tile_for(storage.dtype, rank_tile)
    sums = partial.view(-1)[num_tokens * num_heads * num_splits * rank :]  # behind the contexts
    decode_kernel[(num_tokens, triton.cdiv(num_heads, BLOCK_HEADS), num_splits)](
        q_latent, q_rope, storage, page_table, lengths, partial, sums, scale, page_table.stride(0), q_latent.stride(0),
        q_latent.stride(1), q_rope.stride(0), q_rope.stride(1), num_heads, num_splits, RANK=rank, ROPE=rope,
        HEADS=BLOCK_HEADS, POSITIONS=positions, FACTOR=factor_type(torch.float16 if is_q8 else storage.dtype),
        IS_Q8=is_q8,
        RANK_TILE=rank_tile, ROPE_TILE=rope_tile, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    merge_kernel[(num_tokens * num_heads,)](
        partial, sums, lengths, out, num_heads, num_splits, RANK=rank, TILE=rank_tile, num_warps=4
    )
    return out


def _tile_for(dtype: torch.dtype, rank_tile: int) -> tuple[int, int, int]:
    """(positions, stages, warps): without spills in the 99 KB of shared memory that a program has on an RTX 4090.

    Beyond a rank of 512 (the demo model) 8 bits spill a little and float32 needs the 164 KB of an H100.
    """
    if rank_tile > 512:
        return (16, 2, 8) if dtype != torch.uint8 else (16, 1, 8)
    if dtype == torch.uint8:
        return 32, 1, 8
    return (32, 2, 4) if dtype in (torch.float16, torch.bfloat16) else (16, 2, 4)


def partial_size(num_tokens: int, num_heads: int, rank: int, num_splits: int) -> int:
    """float32 values of working space that `mla_decode` needs."""
    return num_tokens * num_heads * num_splits * (rank + 1)
