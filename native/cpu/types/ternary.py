"""TQ1_0 and TQ2_0: super-blocks of 256 codes in {-1, 0, 1} (TQ2_0 also decodes +2) with one float16 scale."""

from numba import njit

from native.cpu.blocks import dot256, implements, unpack
from native.simd import (
    bytes_of,
    dot_u8x64,
    halves_0_2,
    halves_4_6,
    int_to_f32x16,
    join_i8x16,
    join_i8x32,
    last_i8x64,
    load_f16,
    load_f32x16,
    load_i8x4,
    load_i8x16,
    load_i8x32,
    load_i8x64,
    low_i8x64,
    splat_f32x8,
    store_f32x8,
    store_i8x4,
    store_i8x16,
    store_i8x32,
    store_i8x64,
    third_i8x64,
    twice_i8x32,
    words_of,
    zero_i8x16,
    zero_i32x16,
)

# TQ2_0: qs:64 (two groups of 32 bytes, 4 x 32 two-bit codes each) | d:2; codes - 1 -------------------------------------


@njit
def _two_bits_low(address):
    """32 bytes as 64 codes: bits 0..1 of each, then bits 2..3."""
    return bytes_of(words_of(twice_i8x32(load_i8x32(address))) >> halves_0_2()) & 3


@njit
def _two_bits_high(address):
    """32 bytes as 64 codes: bits 4..5 of each, then bits 6..7."""
    return bytes_of(words_of(twice_i8x32(load_i8x32(address))) >> halves_4_6()) & 3


@implements(dot256, "TQ2_0")
def _tq2_0_dot(name, block, x, sums16, sums32):
    acc = dot_u8x64(zero_i32x16(), _two_bits_low(block), load_i8x64(x))
    acc = dot_u8x64(acc, _two_bits_high(block), load_i8x64(x + 64))
    acc = dot_u8x64(acc, _two_bits_low(block + 32), load_i8x64(x + 128))
    acc = dot_u8x64(acc, _two_bits_high(block + 32), load_i8x64(x + 192))
    return (int_to_f32x16(acc) - load_f32x16(sums16)) * load_f16(block + 64)


@njit
def _uniform(scale, scales, minima):
    """One scale for all 8 groups, and codes that start at -1."""
    store_f32x8(scales, splat_f32x8(scale))
    store_f32x8(minima, splat_f32x8(scale))


@implements(unpack, "TQ2_0")
def _tq2_0_unpack(name, block, codes, scales, minima):
    for half in range(2):
        store_i8x64(codes + 128 * half, _two_bits_low(block + 32 * half))
        store_i8x64(codes + 128 * half + 64, _two_bits_high(block + 32 * half))
    _uniform(load_f16(block + 64), scales, minima)


# TQ1_0: qs:48 (32 bytes of 5 x 32 trits, 16 bytes of 5 x 16) | qh:4 (4 x 4 trits) | d:2 -------------------------------
# A byte b holds its trits as the digits of the fraction b / 256 in base 3, most significant first. Digit n is
# floor(3 * ((b * 3^n) mod 256) / 256). All 52 bytes are handled as one vector; plane n of the activations is
# [x[32 n .. 32 n + 31] | x[160 + 16 n ..  + 15] | x[240 + 4 n .. + 3] | zeros].


@njit
def _tq1_0_bytes(block):
    return join_i8x32(load_i8x32(block), join_i8x16(load_i8x16(block + 32), load_i8x4(block + 48)))


@njit
def _digit(remainder):
    """The next digit of each byte: floor(3 * byte / 256), by halves of 16-bit words."""
    even, odd = words_of(remainder) & 255, words_of(remainder) >> 8
    return bytes_of((even * 3 >> 8) | (odd * 3 & 0xFF00))


@njit
def _next_remainder(remainder):
    """3 * byte mod 256."""
    return remainder + remainder + remainder


@njit
def _plane(x, n):
    return join_i8x32(load_i8x32(x + 32 * n), join_i8x16(load_i8x16(x + 160 + 16 * n), load_i8x4(x + 240 + 4 * n)))


@njit
def _last_plane(x):
    """Plane 4: the 4 bytes of qh have only 4 digits."""
    return join_i8x32(load_i8x32(x + 128), join_i8x16(load_i8x16(x + 224), zero_i8x16()))


@implements(dot256, "TQ1_0")
def _tq1_0_dot(name, block, x, sums16, sums32):
    rest = _tq1_0_bytes(block)
    acc = dot_u8x64(zero_i32x16(), _digit(rest), _plane(x, 0))
    rest = _next_remainder(rest)
    acc = dot_u8x64(acc, _digit(rest), _plane(x, 1))
    rest = _next_remainder(rest)
    acc = dot_u8x64(acc, _digit(rest), _plane(x, 2))
    rest = _next_remainder(rest)
    acc = dot_u8x64(acc, _digit(rest), _plane(x, 3))
    rest = _next_remainder(rest)
    acc = dot_u8x64(acc, _digit(rest), _last_plane(x))
    return (int_to_f32x16(acc) - load_f32x16(sums16)) * load_f16(block + 52)


@implements(unpack, "TQ1_0")
def _tq1_0_unpack(name, block, codes, scales, minima):
    rest = _tq1_0_bytes(block)
    for n in range(5):
        digits = _digit(rest)
        store_i8x32(codes + 32 * n, low_i8x64(digits))
        store_i8x16(codes + 160 + 16 * n, third_i8x64(digits))
        if n < 4:
            store_i8x4(codes + 240 + 4 * n, last_i8x64(digits))
        rest = _next_remainder(rest)
    _uniform(load_f16(block + 52), scales, minima)
