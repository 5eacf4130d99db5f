"""IQ1_KT, IQ2_KT, IQ3_KT, IQ4_KT: the generator runs on 16 states at a time, one vector multiplication for 16 weights.

The products of IQ3_KT are those of the grid types (`native.types.grids`): its magnitudes are unsigned and its scales
small. The others are signed with scales of eight bits: codes are kept CENTRE too large where the product wants them
unsigned.
"""

from numba import njit, types

from kimi_lite.native.cpu.blocks import chosen_by_name, dot256, implements, unpack
from kimi_lite.native.grid_lanes import load_i32x8, twice_i8x8
from kimi_lite.native.simd import (
    extend_f32x8,
    int_to_f32x8,
    int_to_f32x16,
    load_f32x8,
    load_i8x16,
    load_i8x32,
    load_i8x64,
    load_i16x16,
    load_u32,
    low_f32x16,
    pack_u64,
    store_f32x8,
    store_i8x64,
    twice_i8x32,
    widen_i8x16,
    widen_signed_i8x16,
    zero_i32x16,
)
from kimi_lite.native.simd_dot import HAS_FULL_UNSIGNED_DOT, dot_i8x64, dot_u8x64
from kimi_lite.native.trellis_lanes import (
    each_of_two,
    eight_each,
    eight_each_of_words,
    four_each,
    four_times_each_byte,
    magnitudes_i8x64,
    negate_where_set,
    shifts_8_7_6_5,
    shifts_8_then_4,
    shifts_of_eight,
    twice_i8x16,
    values_of_nibbles,
    widen_i8x32,
    widen_i16x16,
)
from kimi_lite.native.types.blocks_of_32.cpu import scaled_chunks
from kimi_lite.native.types.grids import magnitudes, points, scales, sign_bits, signed, unit
from kimi_lite.native.types.sixteen_values.layout import IQ4_VALUES
from kimi_lite.native.types.trellis.layout import CENTRE, FIRST_STATE, IQ1_KT, IQ2_KT, IQ3_KT, IQ4_KT

_SH, _IQ1_QL, _IQ1_QH = IQ1_KT.offsets("sh", "ql", "qh")
_SCALES, _QS = IQ2_KT.offsets("scales", "qs")  # the same in IQ3_KT
[_SIGNS] = IQ3_KT.offsets("qh")
_WORDS, _IQ4_QL, _IQ4_QH = IQ4_KT.offsets("qs", "ql", "qh")

_scale_values = values_of_nibbles(IQ4_VALUES)


@chosen_by_name
def states(name, block):
    """What `sums` needs to know of a block: its states in vectors, or its address."""


@chosen_by_name
def sums(name, states, chunk):
    """i8x64: CENTRE + the integers of a chunk's weights."""


@chosen_by_name
def group_scales(name, block):
    """f32x8: an integer for every 32 weights."""


# States and scales ----------------------------------------------------------------------------------------------------


@implements(states, "IQ1_KT")
def _iq1_kt_states(name, block):
    """Below 2^14: in one i16x32."""
    nibbles = widen_i8x32(twice_i8x16(load_i8x16(block + _IQ1_QH))) << shifts_8_then_4() & 0xF00
    top = widen_i8x32(four_times_each_byte(load_i8x16(block + _SH))) << shifts_8_7_6_5() & 0x1000
    return (widen_i8x32(load_i8x32(block + _IQ1_QL)) | nibbles | top) + FIRST_STATE


@implements(sums, "IQ1_KT")
def _iq1_kt_sums(name, states, chunk):
    return eight_each_of_words(states, chunk)


@implements(group_scales, "IQ1_KT")
def _iq1_kt_scales(name, block):
    nibbles = load_i8x16(block + _SH) & 15
    return low_f32x16(int_to_f32x16(widen_signed_i8x16(_scale_values(nibbles))))


@njit(forceinline=True)
def _words_states(block):
    low, high = widen_i16x16(load_i16x16(block + _QS)), widen_i16x16(load_i16x16(block + _QS + 32))
    return low + FIRST_STATE, high + FIRST_STATE


@implements(states, "IQ2_KT")
def _iq2_kt_states(name, block):
    return _words_states(block)


@njit(forceinline=True)
def _nibbles(block):
    """The 8 of IQ2_KT's and IQ3_KT's scales as bytes, then zeros."""
    word = types.uint64(load_u32(block + _SCALES))
    low, high = word & types.uint64(0x0F0F0F0F), (word >> types.uint64(4)) & types.uint64(0x0F0F0F0F)
    return pack_u64(low | (high << types.uint64(32)), types.uint64(0))


@implements(group_scales, "IQ2_KT")
def _iq2_kt_scales(name, block):
    return low_f32x16(int_to_f32x16(widen_signed_i8x16(_scale_values(_nibbles(block)))))


@implements(sums, "IQ2_KT")
def _iq2_kt_sums(name, states, chunk):
    return eight_each(states[0] if chunk < 2 else states[1], chunk)


@implements(states, "IQ4_KT")
def _iq4_kt_states(name, block):
    return block


@implements(sums, "IQ4_KT")
def _iq4_kt_sums(name, block, chunk):
    words = each_of_two(load_i32x8(block + _WORDS), chunk)
    nibbles = widen_i8x16(load_i8x16(block + _IQ4_QH + 16 * (chunk % 2))) >> (4 * (chunk // 2)) & 15
    low = widen_i8x16(load_i8x16(block + _IQ4_QL + 16 * chunk))
    top = words >> shifts_of_eight() & 7
    return four_each((low | nibbles << 8 | top << 12 | (words & 1) << 15) + FIRST_STATE)


@implements(group_scales, "IQ4_KT")
def _iq4_kt_scales(name, block):
    return int_to_f32x8((load_i32x8(block + _WORDS) >> 1 & 127) - 64)


# Products of the signed types -----------------------------------------------------------------------------------------

_SIGNED = ("IQ1_KT", "IQ2_KT", "IQ4_KT")

if HAS_FULL_UNSIGNED_DOT:
    _OFFSET = -float(CENTRE)

    @njit(forceinline=True)
    def _product(codes, x):
        return dot_u8x64(zero_i32x16(), codes, load_i8x64(x))
else:
    _OFFSET = 0.0

    @njit(forceinline=True)
    def _product(codes, x):
        return dot_i8x64(zero_i32x16(), codes - CENTRE, load_i8x64(x))


@implements(dot256, *_SIGNED)
def _dot(name, block, x, sums16, sums32, minus16):
    at, factors = states(name, block), group_scales(name, block)
    p0, p1 = _product(sums(name, at, 0), x), _product(sums(name, at, 1), x + 64)
    p2, p3 = _product(sums(name, at, 2), x + 128), _product(sums(name, at, 3), x + 192)
    return scaled_chunks(factors, extend_f32x8(factors * load_f32x8(sums32)) * _OFFSET, p0, p1, p2, p3)


@implements(unpack, *_SIGNED)
def _unpack(name, block, codes, scales, minima):
    at, factors = states(name, block), group_scales(name, block)
    store_i8x64(codes, sums(name, at, 0) - CENTRE)
    store_i8x64(codes + 64, sums(name, at, 1) - CENTRE)
    store_i8x64(codes + 128, sums(name, at, 2) - CENTRE)
    store_i8x64(codes + 192, sums(name, at, 3) - CENTRE)
    store_f32x8(scales, factors)
    store_f32x8(minima, factors * 0.0)


# IQ3_KT: what `native.types.grids` asks -------------------------------------------------------------------------------


@implements(points, "IQ3_KT")
def _iq3_kt_points(name, block):
    return _words_states(block)


@implements(magnitudes, "IQ3_KT")
def _iq3_kt_magnitudes(name, points, chunk):
    return magnitudes_i8x64(eight_each(points[0] if chunk < 2 else points[1], chunk) - CENTRE)


@implements(sign_bits, "IQ3_KT")
def _iq3_kt_sign_bits(name, block):
    return twice_i8x32(load_i8x32(block + _SIGNS))


@implements(signed, "IQ3_KT")
def _iq3_kt_signed(name, bits, chunk, x):
    return negate_where_set(x, bits, chunk)


@implements(scales, "IQ3_KT")
def _iq3_kt_scales(name, block):
    return twice_i8x8(_nibbles(block))


@implements(unit, "IQ3_KT")
def _iq3_kt_unit(name, block):
    return types.float32(1)
