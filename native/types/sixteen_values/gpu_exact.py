"""Exact products of IQ4_NL, IQ4_XS, MXFP4 and NVFP4 (`native.types.gpu_words`)."""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import byte_at, half_at, offsets, word_at
from kimi_lite.native.types.gpu_words import byte_of, d_first, dot4, span_values, sum_of_32, word2, word4
from kimi_lite.native.types.sixteen_values.gpu import mxfp4_scale, nvfp4_scale
from kimi_lite.native.types.sixteen_values.layout import IQ4_NL, IQ4_XS, MXFP4, NVFP4

[_IQ4_NL_QS], [_MXFP4_QS], [_NVFP4_QS] = offsets(IQ4_NL, "qs"), offsets(MXFP4, "qs"), offsets(NVFP4, "qs")
_IQ4_XS_D, _IQ4_XS_SCALES_H, _IQ4_XS_SCALES_L, _IQ4_XS_QS = offsets(IQ4_XS, "d", "scales_h", "scales_l", "qs")
_IQ4_NL_BYTES, _MXFP4_BYTES, _NVFP4_BYTES = (tl.constexpr(each.block_bytes) for each in (IQ4_NL, MXFP4, NVFP4))


@triton.jit
def looked_up(nibbles, table, BIAS: tl.constexpr):
    """Four bytes: the values of four nibbles, BIAS higher."""
    codes = tl.zeros_like(nibbles)
    for place in tl.static_range(4):
        codes |= ((tl.load(table + byte_of(nibbles, place)).to(tl.int32) + BIAS) & 255) << (8 * place)
    return codes


@triton.jit
def float4(nibbles):
    """Four bytes: twice the E2M1 values of four nibbles, 16 higher."""
    codes = tl.zeros_like(nibbles)
    for place in tl.static_range(4):
        code = byte_of(nibbles, place)
        size = code & 7
        size = tl.where(size < 2, size, (2 + (size & 1)) << tl.maximum((size >> 1) - 1, 0))
        codes |= (16 + tl.where(code < 8, size, -size)) << (8 * place)
    return codes


@triton.jit
def iq4_nl_codes(block, part, lane, mask, table, BIAS: tl.constexpr):
    nibbles = (word2(block + _IQ4_NL_QS + lane % 4 * 4, mask) >> (lane // 4 * 4)) & 0x0F0F0F0F
    return looked_up(nibbles, table, BIAS)


@triton.jit
def iq4_nl_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return span_values(
        base, x, steps, sums, limit, lane, table, BIAS, HALF, iq4_nl_codes, d_first, BIAS, 32, _IQ4_NL_BYTES, BIAS == 0
    )


@triton.jit
def iq4_xs_scale(base, group):
    """float32 of one of 8 groups."""
    low = (byte_at(base + _IQ4_XS_SCALES_L + group // 2, True) >> (group % 2 * 4)) & 15
    high = (word_at(base + _IQ4_XS_SCALES_H, True) >> (2 * group)) & 3
    return ((low | (high << 4)) - 32).to(tl.float32) * half_at(base + _IQ4_XS_D, True)


@triton.jit
def iq4_xs_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    value = tl.zeros((base.shape[0], lane.shape[1]), tl.float32)
    if HALF == 0:
        value = iq4_xs_scale(base, lane) * sum_of_32(sums, lane).to(tl.float32) * (-BIAS)
    for chunk in tl.static_range(4):
        group = 2 * chunk + HALF
        nibbles = word4(base + _IQ4_XS_QS + 16 * group + lane % 4 * 4) >> (lane // 4 * 4)
        codes = looked_up(nibbles & 0x0F0F0F0F, table, BIAS)
        total = dot4(codes, tl.load(x + 16 * chunk + lane), BIAS == 0).to(tl.float32)
        value = tl.fma(total, iq4_xs_scale(base, group) + tl.zeros_like(value), value)
    return value


@triton.jit
def mxfp4_codes(block, part, lane, mask, table, BIAS: tl.constexpr):
    """Blocks of 17 bytes: every second one begins at an odd address."""
    nibbles = tl.zeros((block.shape[0], lane.shape[1]), tl.int32)
    for place in tl.static_range(4):
        nibbles |= byte_at(block + _MXFP4_QS + lane % 4 * 4 + place, mask) << (8 * place)
    return float4((nibbles >> (lane // 4 * 4)) & 0x0F0F0F0F)


@triton.jit
def mxfp4_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    return span_values(
        base, x, steps, sums, limit, lane, table, BIAS, HALF, mxfp4_codes, mxfp4_scale, 16, 32, _MXFP4_BYTES
    )  # fmt: skip


@triton.jit
def nvfp4_values(base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr):
    """A scale for 16 weights: lane l of 16 is corrected for the l-th of them."""
    own = 8 * HALF + lane
    mask = own // 2 < limit
    scale = nvfp4_scale(base + own // 4 * _NVFP4_BYTES, own % 4, mask) * tl.load(steps + own // 2, mask, other=0.0)
    value = scale * tl.load(sums + own, mask, other=0).to(tl.float32) * -16.0
    for chunk in tl.static_range(4):
        block, mask, part = base + chunk * _NVFP4_BYTES, limit > 2 * chunk + HALF, 2 * HALF + lane // 4
        nibbles = word2(block + _NVFP4_QS + 8 * part + lane % 2 * 4, mask) >> (lane % 4 // 2 * 4)
        total = dot4(float4(nibbles & 0x0F0F0F0F), tl.load(x + 16 * chunk + lane, mask, other=0))
        scale = nvfp4_scale(block, part, mask) * tl.load(steps + 2 * chunk + HALF, mask, other=0.0)
        value = tl.fma(total.to(tl.float32), scale, value)
    return value


VALUES = {"IQ4_NL": iq4_nl_values, "IQ4_XS": iq4_xs_values, "MXFP4": mxfp4_values, "NVFP4": nvfp4_values}
