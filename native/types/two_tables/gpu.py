"""Codes are looked up in `table` (int8: the first table); the scale's group says how much higher the second is.

A group is 16 weights, 0 .. 15 of a block; where 32 share a scale, two groups do. Each type has a function for its scale
and one for its step, (base, group, mask) -> int32; the exact products use them too.
"""

import triton
import triton.language as tl

from kimi_lite.native.types.gpu_parts import (
    Decoder,
    byte_at,
    half_at,
    offsets,
    quarters_column,
    signed_byte_at,
    word_at,
)
from kimi_lite.native.types.k_quants.gpu import pairs_column
from kimi_lite.native.types.sixteen_values.gpu import iq4_xs_column
from kimi_lite.native.types.two_tables.layout import (
    FIVE,
    FOUR,
    IQ2_K,
    IQ2_KL,
    IQ2_KS,
    IQ3_K,
    IQ3_KS,
    IQ4_K,
    IQ4_KS,
    IQ4_KSS,
    IQ5_K,
    IQ5_KS,
    IQ6_K,
    STEPS,
    THREE,
    TWO,
)

_D, _EXTRA = offsets(IQ2_K, "d", "extra")  # the same in all five
_IQ2_K_SCALES, _IQ2_K_QS = offsets(IQ2_K, "scales", "qs")
_IQ3_K_SCALES_H, _IQ3_K_SCALES_L, _IQ3_K_QS, _IQ3_K_QH = offsets(IQ3_K, "scales_h", "scales_l", "qs", "qh")
_IQ4_K_SCALES_H, _IQ4_K_SCALES_L, _IQ4_K_QS = offsets(IQ4_K, "scales_h", "scales_l", "qs")  # the same in IQ5_K
_IQ5_K_QS, _IQ5_K_QH = offsets(IQ5_K, "qs", "qh")
_IQ6_K_SCALES, _IQ6_K_QS, _IQ6_K_QH = offsets(IQ6_K, "scales", "qs", "qh")
_KS_EXTRA, _KS_SCALES, _KS_QS = offsets(IQ2_KS, "extra", "scales", "qs")  # the same in IQ3_KS
[_IQ3_KS_QH] = offsets(IQ3_KS, "qh")
_KL_SCALES_H, _KL_SCALES_L, _KL_QS, _KL_QH = offsets(IQ2_KL, "scales_h", "scales_l", "qs", "qh")
_IQ4_KS_SCALES, _IQ4_KS_QS = offsets(IQ4_KS, "scales", "qs")
[_IQ4_KSS_QS] = offsets(IQ4_KSS, "qs")
_IQ5_KS_QS, _IQ5_KS_QH = offsets(IQ5_KS, "qs", "qh")
_STEP2, _STEP3, _STEP4, _STEP5 = (tl.constexpr(STEPS[values]) for values in (TWO, THREE, FOUR, FIVE))

# Scales and steps


@triton.jit
def nibble_in_order(address, number, mask):
    """Of bytes that hold two numbers each."""
    return (byte_at(address + number // 2, mask) >> (number % 2 * 4)) & 15


@triton.jit
def nibble_by_halves(address, number, mask):
    """Of four bytes: the low nibbles, then the high ones."""
    return (byte_at(address + number % 4, mask) >> (number // 4 * 4)) & 15


@triton.jit
def is_second(base, group, mask):
    """1 where a group of 16 has the second table."""
    return (word_at(base + _EXTRA, mask) >> group) & 1


@triton.jit
def iq2_k_scale(base, group, mask):
    return nibble_in_order(base + _IQ2_K_SCALES, group, mask) - 8


@triton.jit
def iq2_k_step(base, group, mask):
    return is_second(base, group, mask) * _STEP2


@triton.jit
def iq3_k_scale(base, group, mask):
    scale = 2 * nibble_in_order(base + _IQ3_K_SCALES_L, group, mask) + 1
    return scale * (1 - 2 * ((word_at(base + _IQ3_K_SCALES_H, mask) >> group) & 1))


@triton.jit
def iq3_k_step(base, group, mask):
    return is_second(base, group, mask) * _STEP3


@triton.jit
def iq4_k_scale(base, group, mask):
    """Of IQ5_K too."""
    high = (byte_at(base + _IQ4_K_SCALES_H + group // 4, mask) >> (group % 4 * 2)) & 3
    return (nibble_in_order(base + _IQ4_K_SCALES_L, group, mask) | (high << 4)) - 32


@triton.jit
def iq4_k_step(base, group, mask):
    return is_second(base, group, mask) * _STEP4


@triton.jit
def iq5_k_step(base, group, mask):
    return is_second(base, group, mask) * _STEP5


@triton.jit
def iq6_k_scale(base, group, mask):
    return signed_byte_at(base + _IQ6_K_SCALES + group, mask)


@triton.jit
def iq6_k_step(base, group, mask):
    return is_second(base, group, mask)


@triton.jit
def iq2_ks_scale(base, group, mask):
    high = (word_at(base + _KS_EXTRA, mask) >> (8 + group // 2)) & 1
    return (nibble_in_order(base + _KS_SCALES, group // 2, mask) | (high << 4)) - 16


@triton.jit
def iq2_ks_step(base, group, mask):
    return ((word_at(base + _KS_EXTRA, mask) >> (group // 2)) & 1) * _STEP2


@triton.jit
def iq3_ks_scale(base, group, mask):
    high = (word_at(base + _KS_EXTRA, mask) >> (group // 2)) & 1
    return (nibble_by_halves(base + _KS_SCALES, group // 2, mask) | (high << 4)) - 16


@triton.jit
def iq3_ks_step(base, group, mask):
    return ((word_at(base + _KS_EXTRA, mask) >> (8 + group // 2)) & 1) * _STEP3


@triton.jit
def iq2_kl_scale(base, group, mask):
    high = (word_at(base + _KL_SCALES_H, mask) >> (group // 2 * 2)) & 3
    return (nibble_by_halves(base + _KL_SCALES_L, group // 2, mask) | (high << 4)) - 32


@triton.jit
def no_step(base, group, mask):
    return group * 0


@triton.jit
def whole_byte_scale(base, group, mask):
    """Of IQ4_KS and IQ5_KS."""
    return (byte_at(base + _IQ4_KS_SCALES + group // 2, mask) & 254) - 127


@triton.jit
def iq4_ks_step(base, group, mask):
    return (byte_at(base + _IQ4_KS_SCALES + group // 2, mask) & 1) * _STEP4


@triton.jit
def iq5_ks_step(base, group, mask):
    return (byte_at(base + _IQ4_KS_SCALES + group // 2, mask) & 1) * _STEP5


@triton.jit
def hidden_bits(base, group, mask, FIRST: tl.constexpr):
    """Bits FIRST .. 7 of the byte in the lowest bits of a group's eight words."""
    found = group * 0
    for bit in tl.static_range(FIRST, 8):
        found |= (byte_at(base + group // 2 * 16 + 2 * bit, mask) & 1) << bit
    return found


@triton.jit
def iq4_kss_scale(base, group, mask):
    return hidden_bits(base, group, mask, 1) - 127


@triton.jit
def iq4_kss_step(base, group, mask):
    return (byte_at(base + group // 2 * 16, mask) & 1) * _STEP4


# Weights


@triton.jit
def looked_up_weight(
    base, group, code, mask, table, SCALE: tl.constexpr, STEP: tl.constexpr, HAS_UNIT: tl.constexpr = True
):
    """scale * value; the block's float16 scale too where it has one (HAS_UNIT)."""
    value = (tl.load(table + code, mask, other=0).to(tl.int32) + STEP(base, group, mask)).to(tl.float32)
    scale = SCALE(base, group, mask).to(tl.float32)
    if HAS_UNIT:
        scale *= half_at(base + _D, mask)
    return value * scale


@triton.jit
def quarters_group(first, PLANE: tl.constexpr):
    """The group of 16 where codes are pairs of bits."""
    return first // 32 * 8 + PLANE * 2 + first % 32 // 16


@triton.jit
def pairs_group(first, PLANE: tl.constexpr):
    """The group of 16 where nibbles are those of 32 bytes."""
    return first // 32 * 4 + PLANE * 2 + first % 32 // 16


@triton.jit
def iq2_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = (byte_at(base + _IQ2_K_QS + unit, mask) >> (2 * PLANE)) & 3
    return looked_up_weight(base, quarters_group(first, PLANE), code, mask, table, iq2_k_scale, iq2_k_step)


@triton.jit
def iq2_ks_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = (byte_at(base + _KS_QS + unit, mask) >> (2 * PLANE)) & 3
    return looked_up_weight(base, quarters_group(first, PLANE), code, mask, table, iq2_ks_scale, iq2_ks_step, False)


@triton.jit
def three_bits(qs, qh, first, unit, mask, PLANE: tl.constexpr):
    low = (byte_at(qs + unit, mask) >> (2 * PLANE)) & 3
    return low | (((byte_at(qh + unit % 32, mask) >> (first // 32 * 4 + PLANE)) & 1) << 2)


@triton.jit
def iq3_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = three_bits(base + _IQ3_K_QS, base + _IQ3_K_QH, first, unit, mask, PLANE)
    return looked_up_weight(base, quarters_group(first, PLANE), code, mask, table, iq3_k_scale, iq3_k_step)


@triton.jit
def iq3_ks_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = three_bits(base + _KS_QS, base + _IQ3_KS_QH, first, unit, mask, PLANE)
    return looked_up_weight(base, quarters_group(first, PLANE), code, mask, table, iq3_ks_scale, iq3_ks_step, False)


@triton.jit
def iq2_kl_column(unit, PLANE: tl.constexpr):
    """A byte has two codes, in groups that follow each other, and a code two neighbours."""
    return unit // 16 * 64 + PLANE // 2 * 32 + unit % 16 * 2 + PLANE % 2


@triton.jit
def iq2_kl_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    """`table`: 32 even elements, then 32 odd ones."""
    number = first // 16 * 2 + PLANE // 2
    high = (byte_at(base + _KL_QH + unit % 16, mask) >> number) & 1
    code = ((byte_at(base + _KL_QS + unit, mask) >> (PLANE // 2 * 4)) & 15) | (high << 4) | (PLANE % 2 * 32)
    return looked_up_weight(base, 2 * number, code, mask, table, iq2_kl_scale, no_step, False)


@triton.jit
def iq4_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = (byte_at(base + _IQ4_K_QS + unit, mask) >> (4 * PLANE)) & 15
    return looked_up_weight(base, first // 16 * 2 + PLANE, code, mask, table, iq4_k_scale, iq4_k_step)


@triton.jit
def iq4_ks_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = (byte_at(base + _IQ4_KS_QS + unit, mask) >> (4 * PLANE)) & 15
    return looked_up_weight(base, first // 16 * 2, code, mask, table, whole_byte_scale, iq4_ks_step, False)


@triton.jit
def iq4_kss_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    word = word_at(base + _IQ4_KSS_QS + unit // 2 * 2, mask) & 0xFFFE
    code = ((word ^ (word >> 1)) >> (unit % 2 * 8 + 4 * PLANE)) & 15
    return looked_up_weight(base, first // 16 * 2, code, mask, table, iq4_kss_scale, iq4_kss_step, False)


@triton.jit
def five_bits(qs, qh, first, unit, mask, PLANE: tl.constexpr):
    low = (byte_at(qs + unit, mask) >> (4 * PLANE)) & 15
    return low | (((byte_at(qh + unit % 32, mask) >> (first // 32 * 2 + PLANE)) & 1) << 4)


@triton.jit
def iq5_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = five_bits(base + _IQ5_K_QS, base + _IQ5_K_QH, first, unit, mask, PLANE)
    return looked_up_weight(base, pairs_group(first, PLANE), code, mask, table, iq4_k_scale, iq5_k_step)


@triton.jit
def iq5_ks_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    code = five_bits(base + _IQ5_KS_QS, base + _IQ5_KS_QH, first, unit, mask, PLANE)
    return looked_up_weight(base, pairs_group(first, PLANE), code, mask, table, whole_byte_scale, iq5_ks_step, False)


@triton.jit
def iq6_k_decode(base, first, unit, mask, table, PLANE: tl.constexpr):
    low = (byte_at(base + _IQ6_K_QS + unit, mask) >> (4 * PLANE)) & 15
    high = byte_at(base + _IQ6_K_QH + first // 64 * 32 + unit % 32, mask) >> (first // 32 % 2 * 4 + 2 * PLANE)
    code = low | ((high & 3) << 4)
    return looked_up_weight(base, pairs_group(first, PLANE), code, mask, table, iq6_k_scale, iq6_k_step)


DECODERS = {
    "IQ2_K": Decoder(iq2_k_decode, quarters_column, 64, 4, 4, "IQ2_K"),
    "IQ3_K": Decoder(iq3_k_decode, quarters_column, 64, 4, 2, "IQ3_K"),
    "IQ4_K": Decoder(iq4_k_decode, iq4_xs_column, 128, 2, 4, "IQ4"),
    "IQ5_K": Decoder(iq5_k_decode, pairs_column, 128, 2, 4, "IQ5_K"),
    "IQ6_K": Decoder(iq6_k_decode, pairs_column, 128, 2, 4, "IQ6_K"),
    "IQ2_KS": Decoder(iq2_ks_decode, quarters_column, 64, 4, 2, "IQ2_K"),
    "IQ2_KL": Decoder(iq2_kl_decode, iq2_kl_column, 64, 4, 2, "IQ2_KL"),
    "IQ3_KS": Decoder(iq3_ks_decode, quarters_column, 64, 4, 2, "IQ3_K"),
    "IQ4_KS": Decoder(iq4_ks_decode, iq4_xs_column, 128, 2, 4, "IQ4"),
    "IQ4_KSS": Decoder(iq4_kss_decode, iq4_xs_column, 128, 2, 4, "IQ4"),
    "IQ5_KS": Decoder(iq5_ks_decode, pairs_column, 128, 2, 4, "IQ5_K"),
}
