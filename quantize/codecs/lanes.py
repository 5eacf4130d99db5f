"""The two inner loops of error feedback: columns coded one after another, 16 rows at a time, each in a lane of a
vector.

Column j of a block needs what all columns before it gave: carry[0..j) times a row of coefficients. That sum, half a
block long on average, is all the work; four sums run at once. Arrays come as addresses, float32 (size, R) with R a
multiple of 16; `carry`, float32 (size, LANES), is working memory that the caller owns: Numba frees an array of its own
after the array's last use by name, whatever still knows its address.
"""

from numba import njit, types

from kimi_lite.native.cpu.compiler import function
from kimi_lite.native.simd import (
    broadcast_f32,
    clamp_f32x16,
    fma_f32x16,
    load_f32x16,
    round_f32x16,
    splat_f32x16,
    store_f32x16,
    zero_f32x16,
)

LANES = 16
_OPTIONS = {"fastmath": {"nsz", "contract"}, "error_model": "numpy"}


@njit(**_OPTIONS)
def _add_carried(start, carry, coefficients, count):
    """start + the sum over i < count of carry[i] * coefficients[i]; carry: a vector of 16 every 64 bytes."""
    sum0, sum1, sum2, sum3 = start, zero_f32x16(), zero_f32x16(), zero_f32x16()
    i = 0
    while i + 4 <= count:
        at, by = carry + 64 * i, coefficients + 4 * i
        sum0 = fma_f32x16(load_f32x16(at), broadcast_f32(by), sum0)
        sum1 = fma_f32x16(load_f32x16(at + 64), broadcast_f32(by + 4), sum1)
        sum2 = fma_f32x16(load_f32x16(at + 128), broadcast_f32(by + 8), sum2)
        sum3 = fma_f32x16(load_f32x16(at + 192), broadcast_f32(by + 12), sum3)
        i += 4
    while i < count:
        sum0 = fma_f32x16(load_f32x16(carry + 64 * i), broadcast_f32(coefficients + 4 * i), sum0)
        i += 1
    return (sum0 + sum1) + (sum2 + sum3)


@function(types.void(*[types.int64] * 11), **_OPTIONS)
def feed(block, coefficients, inverse_diagonal, scales, inverses, codes, lost, carry, size, num_rows, largest_code):
    """codes[j] is the nearest to block[j] + what was carried, lost[j] what it misses, times inverse_diagonal[j]."""
    low, high = splat_f32x16(types.float32(-1)), splat_f32x16(types.float32(largest_code))
    minus = splat_f32x16(types.float32(-1))
    stride = 4 * num_rows
    for lane in range(0, stride, 64):
        scale, inverse = load_f32x16(scales + lane), load_f32x16(inverses + lane)
        for j in range(size):
            at = j * stride + lane
            value = _add_carried(load_f32x16(block + at), carry, coefficients + 4 * size * j, j)
            code = clamp_f32x16(round_f32x16(value * inverse), low, high)
            error = fma_f32x16(code * minus, scale, value) * broadcast_f32(inverse_diagonal + 4 * j)
            store_f32x16(carry + 64 * j, error)
            store_f32x16(codes + at, code)
            store_f32x16(lost + at, error)


@function(types.void(*[types.int64] * 10), **_OPTIONS)
def descend(gradient, hessian, inverse_diagonal, scales, inverses, codes, carry, size, num_rows, largest_code):
    """Each code in turn becomes the best one given the others; gradient: as before the first of them moved."""
    low, high = splat_f32x16(types.float32(-1)), splat_f32x16(types.float32(largest_code))
    minus = splat_f32x16(types.float32(-1))
    stride = 4 * num_rows
    for lane in range(0, stride, 64):
        scale, inverse = load_f32x16(scales + lane), load_f32x16(inverses + lane)
        for j in range(size):
            at = j * stride + lane
            slope = _add_carried(load_f32x16(gradient + at), carry, hessian + 4 * size * j, j)
            old = load_f32x16(codes + at)
            step = slope * inverse * broadcast_f32(inverse_diagonal + 4 * j)
            code = clamp_f32x16(round_f32x16(fma_f32x16(step, minus, old)), low, high)
            store_f32x16(carry + 64 * j, fma_f32x16(old, minus, code) * scale)
            store_f32x16(codes + at, code)
