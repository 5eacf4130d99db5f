"""The latent cache on the GPU: rows written as a step computes them.

Rows are those of `native.latent_rows`: float32, float16 or bfloat16 values, or int8 codes with a float16 scale per 32
(storage of uint8). `native.reference.quantize_latents` says how codes are made; here the same.
"""

import torch
import triton
import triton.language as tl

from kimi_lite.native.latent_rows import PAGE_TOKENS, row_bytes

_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 plus this has no fraction; ties go to even


@triton.jit
def store_q8(row, values, FIRST: tl.constexpr, LATENT: tl.constexpr, group, place, mask):
    """values (groups, 32) become codes at row + FIRST + group * 32 + place, and a scale of each group."""
    is_bad = tl.max((mask & ((values != values) | (tl.abs(values) == float("inf")))).to(tl.int32), 1) > 0  # (groups,)
    peak = tl.max(tl.where(mask, tl.abs(values), 0.0), 1)
    scale = tl.where(is_bad, float("nan"), tl.div_rn(peak, 127.0)).to(tl.float16)
    wide = scale.to(tl.float32)
    is_used = (wide > 0.0)[:, None]  # a NaN is not
    scaled = tl.div_rn(tl.where(is_used, values, 0.0), tl.where(is_used, wide[:, None], 1.0))
    code = tl.minimum(tl.maximum(scaled, -127.0), 127.0) + _ROUNDER - _ROUNDER
    tl.store((row + FIRST + group * 32 + place).to(tl.pointer_type(tl.int8)), code.to(tl.int8), mask)
    scale_at = (row + LATENT + (FIRST // 32 + group) * 2).to(tl.pointer_type(tl.float16))  # (groups, 1)
    tl.store(scale_at, scale[:, None], tl.max(mask.to(tl.int32), 1)[:, None] > 0)


@triton.jit
def write_latent_kernel(
    kv, weight, cos, sin, storage, slots, eps, kv_stride, RANK: tl.constexpr, ROPE: tl.constexpr, GROUPS: tl.constexpr,
    KEY_GROUPS: tl.constexpr, ROW: tl.constexpr, IS_Q8: tl.constexpr,
):  # fmt: skip
    """Program: one token. A slot below zero is skipped. The latent is a tile of groups of 32."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        group, place = tl.arange(0, GROUPS)[:, None], tl.arange(0, 32)[None, :]
        column = group * 32 + place
        mask = column < RANK
        latent = tl.load(kv + token * kv_stride + column, mask, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(latent * latent, 1), 0) / RANK + eps)
        latent = latent * inverse * tl.load(weight + column, mask, other=0.0)
        group_of, pair = tl.arange(0, KEY_GROUPS)[:, None], tl.arange(0, 16)[None, :]
        which = group_of * 16 + pair
        is_pair = which < ROPE // 2
        source = kv + token * kv_stride + RANK + 2 * which
        even = tl.load(source, is_pair, other=0.0).to(tl.float32)
        odd = tl.load(source + 1, is_pair, other=0.0).to(tl.float32)
        c = tl.load(cos + token * (ROPE // 2) + which, is_pair, other=0.0)
        s = tl.load(sin + token * (ROPE // 2) + which, is_pair, other=0.0)
        first, second = even * c - odd * s, even * s + odd * c  # (KEY_GROUPS, 16)
        row = storage + slot * ROW
        if IS_Q8:
            store_q8(row, latent, 0, RANK + ROPE, group, place, mask)
            key = tl.reshape(tl.join(first, second), (KEY_GROUPS, 32))
            store_q8(row, key, RANK, RANK + ROPE, group_of, place, group_of * 32 + place < ROPE)
        else:
            tl.store(row + column, latent.to(storage.dtype.element_ty), mask)
            tl.store(row + RANK + 2 * which, first.to(storage.dtype.element_ty), is_pair)
            tl.store(row + RANK + 2 * which + 1, second.to(storage.dtype.element_ty), is_pair)


def check_storage(storage: torch.Tensor, rank: int, rope: int) -> None:
    """Whether these are pages of such rows."""
    is_q8 = storage.dtype == torch.uint8
    row = row_bytes("q8", rank + rope) if is_q8 else rank + rope
    assert storage.shape[1:] == (PAGE_TOKENS, row) and storage.is_contiguous(), (
        storage.shape,
        storage.dtype,
        rank,
        rope,
    )
    assert not is_q8 or rank % 32 == 0, rank  # the key's groups begin with the key


def write_latent(
    kv: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    storage: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """kv (T, R + P) as `attn_kv_a_mqa` gives it -> rows of storage (num_pages, 64, row): latent normed, key rotated.

    weight float32 (R,) of the norm; cos and sin float32 (T, P / 2) of each token's position; slots int (T,): page * 64
    + the place in the page, below zero for tokens that are padding.
    """
    num_tokens, width = kv.shape
    rank, rope = len(weight), 2 * cos.shape[1]
    check_storage(storage, rank, rope)
    assert width == rank + rope, (kv.shape, rank, rope)
    assert kv.stride(1) == 1 and cos.is_contiguous() and sin.is_contiguous(), (kv.stride(), cos.stride(), sin.stride())
    if num_tokens > 0:
        write_latent_kernel[(num_tokens,)](
            kv, weight, cos, sin, storage, slots, eps, kv.stride(0), RANK=rank, ROPE=rope,
            GROUPS=triton.next_power_of_2(triton.cdiv(rank, 32)), KEY_GROUPS=triton.next_power_of_2(triton.cdiv(rope,
            32)),
            ROW=storage.shape[2], IS_Q8=storage.dtype == torch.uint8, num_warps=4,
        )  # fmt: skip
