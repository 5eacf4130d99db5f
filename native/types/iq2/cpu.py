"""IQ2_XXS, IQ2_XS and IQ2_S: points of 8 weights of magnitude 8, 25 or 43, with signs; the unit is an 8th of d."""

from numba import njit, types

from kimi_lite.native.codebook_registers import (
    HAS_BYTE_PERMUTES,
    expand_iq2,
    find_iq2_xxs,
    iq2_xs_sign_fields,
    iq2_xxs_sign_fields,
)
from kimi_lite.native.codebooks import iq2_s_points, iq2_xs_points, iq2_xxs_points
from kimi_lite.native.cpu.blocks import implements
from kimi_lite.native.grid_lanes import (
    bytes_of_i16x8,
    bytes_of_i32x8,
    eight_times,
    eight_times_sparse,
    load_i16x32,
    load_widened_i8x8,
    narrow_i16x32,
    negate_by_mask,
    negate_where,
    odd_i32x16,
    twice_indices,
    twice_lowest_bytes,
)
from kimi_lite.native.simd import load_f16, load_i8x64, load_i32x16, load_u64, words_of
from kimi_lite.native.types.grids import (
    magnitudes,
    packed_signs,
    points,
    scales,
    sign_bits,
    signed,
    unit,
    with_parity,
)
from kimi_lite.native.types.iq2.layout import IQ2_S, IQ2_XS, IQ2_XXS

_D, _QS = IQ2_XXS.offsets("d", "qs")  # the same in all three
[_IQ2_XS_SCALES] = IQ2_XS.offsets("scales")
_IQ2_S_SIGNS, _IQ2_S_QH, _IQ2_S_SCALES = IQ2_S.offsets("signs", "qh", "scales")


@implements(unit, "IQ2_XXS", "IQ2_XS", "IQ2_S")
def _unit(name, block):
    return load_f16(block + _D) * types.float32(0.125)


@njit(forceinline=True)
def _nibble_scales(address):
    """2 s + 1 of 16 nibbles, low ones first."""
    words = load_widened_i8x8(address)
    return bytes_of_i16x8(((words | words << 4) & 0x0F0F) << 1 | 0x0101)


# IQ2_XXS


@implements(scales, "IQ2_XXS")
def _iq2_xxs_scales(name, block):
    return twice_lowest_bytes(bytes_of_i32x8((odd_i32x16(load_i32x16(block + _QS)) >> 27) & 30 | 1))


if HAS_BYTE_PERMUTES:

    @implements(points, "IQ2_XXS")
    def _iq2_xxs_points(name, block):
        return find_iq2_xxs(words_of(twice_indices(load_i8x64(block + _QS))))

    @implements(magnitudes, "IQ2_XXS")
    def _iq2_xxs_magnitudes(name, points, chunk):
        return expand_iq2(points, chunk)

    @implements(sign_bits, "IQ2_XXS")
    def _iq2_xxs_sign_bits(name, block):
        return iq2_xxs_sign_fields(load_i8x64(block + _QS))
else:

    @implements(points, "IQ2_XXS")
    def _iq2_xxs_points(name, block):
        return block + _QS

    @implements(magnitudes, "IQ2_XXS")
    def _iq2_xxs_magnitudes(name, points, chunk):
        return iq2_xxs_points(points + 16 * chunk)

    @implements(sign_bits, "IQ2_XXS")
    def _iq2_xxs_sign_bits(name, block):
        return packed_signs(odd_i32x16(load_i32x16(block + _QS)))


# IQ2_XS


@implements(points, "IQ2_XS", "IQ2_S")
def _block(name, block):
    return block + _QS


@implements(magnitudes, "IQ2_XS")
def _iq2_xs_magnitudes(name, points, chunk):
    return iq2_xs_points(points + 16 * chunk)


if HAS_BYTE_PERMUTES:

    @implements(sign_bits, "IQ2_XS")
    def _iq2_xs_sign_bits(name, block):
        return iq2_xs_sign_fields(load_i8x64(block + _QS))

    @implements(signed, "IQ2_XXS", "IQ2_XS")
    def _signed(name, bits, chunk, x):
        return negate_where(x, eight_times_sparse(bits, chunk))
else:

    @implements(sign_bits, "IQ2_XS")
    def _iq2_xs_sign_bits(name, block):
        return with_parity(narrow_i16x32(load_i16x32(block + _QS) >> 9))

    @implements(signed, "IQ2_XXS", "IQ2_XS")
    def _signed(name, bits, chunk, x):
        return negate_where(x, eight_times(bits, chunk))


@implements(scales, "IQ2_XS")
def _iq2_xs_scales(name, block):
    return _nibble_scales(block + _IQ2_XS_SCALES)


# IQ2_S


@implements(magnitudes, "IQ2_S")
def _iq2_s_magnitudes(name, points, chunk):
    return iq2_s_points(points + 8 * chunk, points + _IQ2_S_QH - _QS + 2 * chunk)


@implements(sign_bits, "IQ2_S")
def _iq2_s_sign_bits(name, block):
    return block + _IQ2_S_SIGNS


@implements(signed, "IQ2_S")
def _iq2_s_signed(name, bits, chunk, x):
    return negate_by_mask(x, load_u64(bits + 8 * chunk))


@implements(scales, "IQ2_S")
def _iq2_s_scales(name, block):
    return _nibble_scales(block + _IQ2_S_SCALES)
