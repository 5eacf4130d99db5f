"""The lane operations that only these types need."""

from numba import njit

from kimi_lite.native.simd_bytes import bit_fields
from kimi_lite.native.vectors import (
    bitcaster,
    converter,
    i8x16,
    i8x64,
    i16x16,
    i32x16,
    maker,
    shuffler,
)

words_of_i32x16 = converter(i32x16, i16x16, "trunc")
twice_each_of_16 = shuffler(i8x16, i8x64, [i // 2 % 16 for i in range(64)])  # bytes 0 0 1 1 ..., and again
odd_places = maker(i8x64, [32 * (i % 2) for i in range(64)])
# The byte of each group of 16 of chunk 0 .. 3, 16 times.
groups16_0, groups16_1, groups16_2, groups16_3 = (
    shuffler(i8x16, i8x64, [4 * chunk + i // 16 for i in range(64)]) for chunk in range(4)
)
_as_i32x16, _as_i8x64 = bitcaster(i8x64, i32x16), bitcaster(i32x16, i8x64)
_first_two = shuffler(i8x64, i8x64, [*range(16)] * 2 + [*range(16, 32)] * 2)
_last_two = shuffler(i8x64, i8x64, [*range(32, 48)] * 2 + [*range(48, 64)] * 2)
_by_turns = bit_fields(15, 0, 4, 0, 4)


@njit
def nibbles_of_four(packed):
    """Four times 16 bytes as twice 64 codes: the low nibbles of 16 bytes, then the high ones."""
    return _by_turns(_first_two(packed)), _by_turns(_last_two(packed))


@njit
def unfolded(packed):
    """Words of 16 bits whose bits were the running exclusive or of the next higher ones; the lowest is left out."""
    words = _as_i32x16(packed) & 0xFFFEFFFE
    return _as_i8x64(words ^ ((words >> 1) & 0x7FFF7FFF))
