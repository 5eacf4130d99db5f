"""IQ2 and IQ3 points from registers, where the CPU can permute bytes: faster than any load (numbers in tools/LOG.md)."""

from numba import njit, uint64

from native.codebook_registers import (
    HAS_BYTE_PERMUTES,
    expand_iq2_0,
    expand_iq2_1,
    expand_iq2_2,
    expand_iq2_3,
    expand_iq3_s_0,
    expand_iq3_s_1,
    expand_iq3_s_2,
    expand_iq3_s_3,
    expand_iq3_xxs_0,
    expand_iq3_xxs_1,
    expand_iq3_xxs_2,
    expand_iq3_xxs_3,
    find_high_iq3_s,
    find_high_iq3_xxs,
    find_iq2_xxs,
    find_low_iq3_s,
    find_low_iq3_xxs,
    iq2_xs_sign_fields,
    iq2_xxs_sign_fields,
    iq3_xxs_sign_fields,
)
from native.cpu.blocks import implements
from native.cpu.types.grids import magnitudes, signed, signed_by_bits, spread_scales
from native.grid_lanes import (
    byte_pairs_of_quads,
    negate_where,
    sparse_eight_times_0,
    sparse_eight_times_1,
    sparse_eight_times_2,
    sparse_eight_times_3,
    sparse_spread_0,
    sparse_spread_1,
    sparse_spread_2,
    sparse_spread_3,
    words_of_i32x16,
)
from native.simd import load_i8x32, load_i8x64, load_i32x16, load_u64, words_of

if HAS_BYTE_PERMUTES:

    @njit(forceinline=True)
    def _expand_iq2(points):
        return expand_iq2_0(points), expand_iq2_1(points), expand_iq2_2(points), expand_iq2_3(points)

    @implements(magnitudes, "IQ2_XXS")
    def _iq2_xxs(name, block):
        return _expand_iq2(find_iq2_xxs(words_of(byte_pairs_of_quads(load_i8x64(block + 2)))))

    @implements(magnitudes, "IQ3_XXS")
    def _iq3_xxs(name, block):
        indices = load_i8x64(block + 2)
        a, b = find_low_iq3_xxs(indices, uint64(0)), find_high_iq3_xxs(indices, uint64(0))
        return expand_iq3_xxs_0(a, b), expand_iq3_xxs_1(a, b), expand_iq3_xxs_2(a, b), expand_iq3_xxs_3(a, b)

    @implements(magnitudes, "IQ3_S")
    def _iq3_s(name, block):
        indices, ninth = load_i8x64(block + 2), load_u64(block + 66)
        a, b = find_low_iq3_s(indices, ninth), find_high_iq3_s(indices, ninth)
        return expand_iq3_s_0(a, b), expand_iq3_s_1(a, b), expand_iq3_s_2(a, b), expand_iq3_s_3(a, b)

    @njit(forceinline=True)
    def _signed_by_sparse_bits(bits, a, b, c, d):
        return (
            negate_where(a, sparse_eight_times_0(bits)),
            negate_where(b, sparse_eight_times_1(bits)),
            negate_where(c, sparse_eight_times_2(bits)),
            negate_where(d, sparse_eight_times_3(bits)),
        )

    @implements(signed, "IQ2_XXS")
    def _iq2_xxs_signed(name, block, a, b, c, d):
        return _signed_by_sparse_bits(iq2_xxs_sign_fields(load_i8x64(block + 2)), a, b, c, d)

    @implements(signed, "IQ2_XS")
    def _iq2_xs_signed(name, block, a, b, c, d):
        return _signed_by_sparse_bits(iq2_xs_sign_fields(load_i8x64(block + 2)), a, b, c, d)

    @implements(signed, "IQ3_XXS")
    def _iq3_xxs_signed(name, block, a, b, c, d):
        return signed_by_bits(iq3_xxs_sign_fields(load_i8x32(block + 66)), a, b, c, d)

    @implements(spread_scales, "IQ2_XXS")
    def _iq2_xxs_scales(name, block):
        factors = words_of_i32x16((load_i32x16(block + 2) >> 27) & 30 | 1)
        return sparse_spread_0(factors), sparse_spread_1(factors), sparse_spread_2(factors), sparse_spread_3(factors)
