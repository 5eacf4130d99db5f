"""TQ1_0 and TQ2_0: products with int8, and unpacking."""

from numba import njit

from kimi_lite.native.cpu.blocks import dot256, has_digits, implements, unpack
from kimi_lite.native.simd import (
    int_to_f32x16,
    join_i8x16,
    join_i8x32,
    load_f16,
    load_f32x16,
    load_i8x16,
    load_i8x32,
    load_i8x64,
    low_i8x64,
    splat_f32x8,
    store_f32,
    store_f32x8,
    store_i8x64,
    twice_i8x32,
)
from kimi_lite.native.simd_bytes import (
    HAS_BYTE_PERMUTES,
    bit_fields,
    byte_table_256,
    fourth_parts,
    load_first_bytes,
    low_i8x32,
    powers_of_3,
    ternary_digits,
    third_parts,
    times_3,
)
from kimi_lite.native.simd_dot import small_dot, sum_small, zero_small
from kimi_lite.native.types.ternary.layout import TQ1_0, TQ2_0

_TQ1_0_QS, _TQ1_0_QH, _TQ1_0_D = TQ1_0.offsets("qs", "qh", "d")
_TQ2_0_QS, _TQ2_0_D = TQ2_0.offsets("qs", "d")

_low_fields, _high_fields = bit_fields(3, 0, 2), bit_fields(3, 4, 6)

# TQ2_0
# -------------------------------------


@njit
def _four_fields(bytes32):
    """32 bytes as 2 x 64 codes: bits 0..1, 2..3; 4..5, 6..7."""
    twice = twice_i8x32(bytes32)
    return _low_fields(twice), _high_fields(twice)


@njit
def _tq2_0_codes(block):
    c0, c1 = _four_fields(load_i8x32(block + _TQ2_0_QS))
    c2, c3 = _four_fields(load_i8x32(block + _TQ2_0_QS + 32))
    return c0, c1, c2, c3


@njit
def _ternary_total(codes, x):
    """The products of 4 x 64 codes as f32x16."""
    c0, c1, c2, c3 = codes
    acc = small_dot(zero_small(), c0, load_i8x64(x))
    acc = small_dot(acc, c1, load_i8x64(x + 64))
    acc = small_dot(acc, c2, load_i8x64(x + 128))
    return int_to_f32x16(sum_small(small_dot(acc, c3, load_i8x64(x + 192))))


@implements(dot256, "TQ2_0")
def _tq2_0_dot(name, block, x, sums16, sums32, minus16):
    return (_ternary_total(_tq2_0_codes(block), x) - load_f32x16(sums16)) * load_f16(block + _TQ2_0_D)


@njit
def _store_ternary(codes, values, scale, scales, minima):
    """256 codes that start at -1, and one scale for all 8 groups."""
    c0, c1, c2, c3 = values
    store_i8x64(codes, c0)
    store_i8x64(codes + 64, c1)
    store_i8x64(codes + 128, c2)
    store_i8x64(codes + 192, c3)
    store_f32x8(scales, splat_f32x8(scale))
    store_f32x8(minima, splat_f32x8(scale))


@implements(unpack, "TQ2_0")
def _tq2_0_unpack(name, block, codes, scales, minima):
    _store_ternary(codes, _tq2_0_codes(block), load_f16(block + _TQ2_0_D), scales, minima)


# TQ1_0. In natural order the four vectors of 64 codes are, with a = bytes 0..31, u = 32..47, q = 48..51 and the digits'
# numbers behind:
#     a0 a1 | a2 a3 | a4 u0 u1 | u2 u3 u4 q0 q1 q2 q3

if HAS_BYTE_PERMUTES:

    def _digit(code: int, n: int) -> int:
        return code * 3**n % 256 * 3 >> 8

    _first_four = byte_table_256(
        [sum(_digit(code, n) << 2 * n for n in range(4)) for code in range(256)]
    )  # 2 bits each
    _fifth = byte_table_256([_digit(code, 4) for code in range(256)])
    _load_52, _third_fields = load_first_bytes(52), bit_fields(3, 0, 0, 0, 2)
    _fourth_fields = bit_fields(3, 4, 4, 4, 4, 6, 6, 6, 6, 0, 0, 0, 0, 0, 2, 4, 6)

    @njit
    def _tq1_0_codes(block):
        """The 4 x 64 codes, looked up: all bytes' first four digits at once, and their fifth."""
        rest = _load_52(block + _TQ1_0_QS)
        four, fifth = _first_four(rest), _fifth(rest)
        c0, c1 = _four_fields(low_i8x64(four))
        return c0, c1, _third_fields(third_parts(four, fifth)), _fourth_fields(fourth_parts(four, fifth))
else:

    @njit
    def _tq1_0_codes(block):
        """The 4 x 64 codes, by arithmetic: digits of the remainders."""
        a, u = load_i8x32(block + _TQ1_0_QS), load_i8x16(block + _TQ1_0_QS + 32)
        a3 = times_3(a)
        a9 = times_3(a3)
        a27 = times_3(a9)
        u0_u1 = join_i8x16(u, times_3(u))
        u2_u3 = times_3(times_3(u0_u1))
        u4 = times_3(times_3(low_i8x32(u2_u3)))
        rest0, rest1, rest2 = join_i8x32(a, a3), join_i8x32(a9, a27), join_i8x32(times_3(a27), u0_u1)
        rest3 = join_i8x32(u2_u3, join_i8x16(u4, powers_of_3(block + _TQ1_0_QH)))
        return ternary_digits(rest0), ternary_digits(rest1), ternary_digits(rest2), ternary_digits(rest3)


@implements(dot256, "TQ1_0")
def _tq1_0_dot(name, block, x, sums16, sums32, minus16):
    return (_ternary_total(_tq1_0_codes(block), x) - load_f32x16(sums16)) * load_f16(block + _TQ1_0_D)


@implements(unpack, "TQ1_0")
def _tq1_0_unpack(name, block, codes, scales, minima):
    _store_ternary(codes, _tq1_0_codes(block), load_f16(block + _TQ1_0_D), scales, minima)


@njit
def _store_digits(low, values):
    c0, c1, c2, c3 = values
    store_i8x64(low, c0 - 1)
    store_i8x64(low + 64, c1 - 1)
    store_i8x64(low + 128, c2 - 1)
    store_i8x64(low + 192, c3 - 1)


@has_digits("TQ1_0", shift=0, is_signed=True)
def _tq1_0_digits(name, block, low, high, minima, factors):
    _store_digits(low, _tq1_0_codes(block))
    store_f32(factors, load_f16(block + _TQ1_0_D))


@has_digits("TQ2_0", shift=0, is_signed=True)
def _tq2_0_digits(name, block, low, high, minima, factors):
    _store_digits(low, _tq2_0_codes(block))
    store_f32(factors, load_f16(block + _TQ2_0_D))
