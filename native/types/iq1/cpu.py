"""IQ1_S and IQ1_M: points of 8 weights in {-1, 0, 1}, all plus or minus 1/8."""

from numba import njit, types

from kimi_lite.native.codebooks import iq1_m_points, iq1_m_signed_points, iq1_s_points
from kimi_lite.native.cpu.blocks import implements
from kimi_lite.native.grid_lanes import (
    add_eighths,
    bytes_of_i16x8,
    f16_from_bits,
    four_times_upper_i16x8,
    load_i16x8,
    narrow_i16x16,
    shifts_0_3_6_9,
    twice_i8x16,
)
from kimi_lite.native.isa import AVX512_VNNI, isa
from kimi_lite.native.simd import load_f16, load_i8x16, load_u64
from kimi_lite.native.types.grids import as_floats, magnitudes, points, scaled_excess, scales, unit
from kimi_lite.native.types.iq1.layout import IQ1_M, IQ1_S

_IQ1_S_D, _IQ1_S_QS, _IQ1_S_QH = IQ1_S.offsets("d", "qs", "qh")
_IQ1_M_QS, _IQ1_M_QH, _IQ1_M_SCALES = IQ1_M.offsets("qs", "qh", "scales")

# IQ1_S


@implements(points, "IQ1_S")
def _iq1_s_block(name, block):
    return block


@implements(magnitudes, "IQ1_S")
def _iq1_s_magnitudes(name, block, chunk):
    return iq1_s_points(block + _IQ1_S_QS + 8 * chunk, block + _IQ1_S_QH + 4 * chunk)


@njit(forceinline=True)
def _iq1_s_factors(block):
    return (load_i16x8(block + _IQ1_S_QH) >> 11) & 14 | 1


@implements(scales, "IQ1_S")
def _iq1_s_scales(name, block):
    factors = _iq1_s_factors(block)
    return bytes_of_i16x8(factors | factors << 8)


@implements(scaled_excess, "IQ1_S")
def _iq1_s_excess(name, block):
    too_much = _iq1_s_factors(block) * (((load_i16x8(block + _IQ1_S_QH) >> 14) & 2) + 7)  # 9 - 2 if plus 1/8, else 9
    return as_floats(bytes_of_i16x8(too_much | too_much << 8))


@implements(unit, "IQ1_S")
def _iq1_s_unit(name, block):
    return load_f16(block + _IQ1_S_D) * types.float32(0.125)


# IQ1_M


if isa().name == AVX512_VNNI:

    @implements(points, "IQ1_M")
    def _iq1_m_block(name, block):
        return block, twice_i8x16(load_i8x16(block + _IQ1_M_QH))

    @implements(magnitudes, "IQ1_M")
    def _iq1_m_magnitudes(name, points, chunk):
        block, nibbles = points
        return add_eighths(iq1_m_points(block + _IQ1_M_QS + 8 * chunk, block + _IQ1_M_QH + 4 * chunk), nibbles, chunk)
else:  # the sign of the 1/8 picks the half of a doubled codebook

    @implements(points, "IQ1_M")
    def _iq1_m_block(name, block):
        return block

    @implements(magnitudes, "IQ1_M")
    def _iq1_m_magnitudes(name, points, chunk):
        return iq1_m_signed_points(points + _IQ1_M_QS + 8 * chunk, points + _IQ1_M_QH + 4 * chunk)


@implements(scales, "IQ1_M")
def _iq1_m_scales(name, block):
    words = four_times_upper_i16x8(load_i16x8(block + _IQ1_M_SCALES - 8)) >> shifts_0_3_6_9()
    return narrow_i16x16((words & 7) << 1 | 1)


@implements(scaled_excess, "IQ1_M")
def _iq1_m_excess(name, block):
    return as_floats(scales(name, block)) * 9.0


@implements(unit, "IQ1_M")
def _iq1_m_unit(name, block):
    s = load_u64(block + _IQ1_M_SCALES)
    bits = (s >> 12) & 0xF | (s >> 24) & 0xF0 | (s >> 36) & 0xF00 | (s >> 48) & 0xF000
    return f16_from_bits(bits) * types.float32(0.125)
