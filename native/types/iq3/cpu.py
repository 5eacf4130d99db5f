"""IQ3_XXS and IQ3_S: points of 4 weights with signs."""

from numba import types, uint64

from kimi_lite.native.codebook_registers import (
    HAS_BYTE_PERMUTES,
    expand_iq3_s,
    expand_iq3_xxs,
    find_iq3_s_high,
    find_iq3_s_low,
    find_iq3_xxs_high,
    find_iq3_xxs_low,
    iq3_xxs_sign_fields,
)
from kimi_lite.native.codebooks import iq3_s_points, iq3_xxs_points
from kimi_lite.native.cpu.blocks import implements
from kimi_lite.native.grid_lanes import (
    bytes_of_i32x8,
    eight_times,
    load_i32x8,
    negate_by_mask,
    negate_where,
    twice_i8x8,
    twice_lowest_bytes,
)
from kimi_lite.native.simd import load_f16, load_i8x32, load_i8x64, load_u32, load_u64, pack_u64
from kimi_lite.native.types.grids import magnitudes, packed_signs, points, scales, sign_bits, signed, unit
from kimi_lite.native.types.iq3.layout import IQ3_S, IQ3_XXS

_D, _QS = IQ3_XXS.offsets("d", "qs")  # the same in both
[_IQ3_XXS_SAS] = IQ3_XXS.offsets("sas")
_IQ3_S_QH, _IQ3_S_SIGNS, _IQ3_S_SCALES = IQ3_S.offsets("qh", "signs", "scales")

# IQ3_XXS


@implements(scales, "IQ3_XXS")
def _iq3_xxs_scales(name, block):
    return twice_lowest_bytes(bytes_of_i32x8((load_i32x8(block + _IQ3_XXS_SAS) >> 27) & 30 | 1))


@implements(unit, "IQ3_XXS")
def _iq3_xxs_unit(name, block):
    return load_f16(block + _D) * types.float32(0.25)


@implements(signed, "IQ3_XXS")
def _iq3_xxs_signed(name, bits, chunk, x):
    return negate_where(x, eight_times(bits, chunk))


if HAS_BYTE_PERMUTES:

    @implements(points, "IQ3_XXS")
    def _iq3_xxs_points(name, block):
        indices = load_i8x64(block + _QS)
        return find_iq3_xxs_low(indices, uint64(0)), find_iq3_xxs_high(indices, uint64(0))

    @implements(magnitudes, "IQ3_XXS")
    def _iq3_xxs_magnitudes(name, points, chunk):
        return expand_iq3_xxs(points[0], points[1], chunk)

    @implements(sign_bits, "IQ3_XXS")
    def _iq3_xxs_sign_bits(name, block):
        return iq3_xxs_sign_fields(load_i8x32(block + _IQ3_XXS_SAS))
else:

    @implements(points, "IQ3_XXS")
    def _iq3_xxs_points(name, block):
        return block + _QS

    @implements(magnitudes, "IQ3_XXS")
    def _iq3_xxs_magnitudes(name, points, chunk):
        return iq3_xxs_points(points + 16 * chunk)

    @implements(sign_bits, "IQ3_XXS")
    def _iq3_xxs_sign_bits(name, block):
        return packed_signs(load_i32x8(block + _IQ3_XXS_SAS))


# IQ3_S


if HAS_BYTE_PERMUTES:

    @implements(points, "IQ3_S")
    def _iq3_s_points(name, block):
        indices, ninth = load_i8x64(block + _QS), load_u64(block + _IQ3_S_QH)
        return find_iq3_s_low(indices, ninth), find_iq3_s_high(indices, ninth)

    @implements(magnitudes, "IQ3_S")
    def _iq3_s_magnitudes(name, points, chunk):
        return expand_iq3_s(points[0], points[1], chunk)
else:

    @implements(points, "IQ3_S")
    def _iq3_s_points(name, block):
        return block + _QS

    @implements(magnitudes, "IQ3_S")
    def _iq3_s_magnitudes(name, points, chunk):
        return iq3_s_points(points + 16 * chunk, points + _IQ3_S_QH - _QS + 2 * chunk)


@implements(sign_bits, "IQ3_S")
def _iq3_s_sign_bits(name, block):
    return block + _IQ3_S_SIGNS


@implements(signed, "IQ3_S")
def _iq3_s_signed(name, bits, chunk, x):
    return negate_by_mask(x, load_u64(bits + 8 * chunk))


@implements(scales, "IQ3_S")
def _iq3_s_scales(name, block):
    packed = uint64(load_u32(block + _IQ3_S_SCALES))
    spread = (packed | packed << 16) & 0x0000FFFF0000FFFF
    spread = (spread | spread << 8) & 0x00FF00FF00FF00FF
    nibbles = ((spread | spread << 4) & 0x0F0F0F0F0F0F0F0F) << 1 | 0x0101010101010101
    return twice_i8x8(pack_u64(nibbles, nibbles))


@implements(unit, "IQ3_S")
def _iq3_s_unit(name, block):
    return load_f16(block + _D)
