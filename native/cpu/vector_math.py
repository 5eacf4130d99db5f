"""exp and SiLU on 16 float32 lanes, and rotary embedding on pairs."""

from numba import njit, types

from kimi_lite.native.simd import (
    clamp_f32x16,
    divide_f32x16,
    f32_from_bits,
    f32_to_i32x16,
    fma_f32x16,
    load_f32,
    round_f32x16,
    splat_f32x16,
    store_f32,
)

_OPTIONS = {"fastmath": {"nsz", "contract"}, "error_model": "numpy"}
LOG2_E, LN2_HIGH, LN2_LOW = 1.44269504, 0.693145752, 1.42860677e-06
# exp(r) on |r| <= ln(2) / 2 as 1 + r + r^2 * polynomial: minimax coefficients as in Cephes' expf (Moshier)
EXP_COEFFICIENTS = (1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 1.6666666e-1, 0.5)
_C0, _C1, _C2, _C3, _C4, _C5 = EXP_COEFFICIENTS


@njit(**_OPTIONS)
def splat(value):
    return splat_f32x16(types.float32(value))


@njit(**_OPTIONS)
def exp_f32x16(x):
    """e^x, relative error about 1e-7; below -87 it is (nearly) 0, above 88 it saturates, of NaN it is NaN."""
    x = clamp_f32x16(x, splat(-87.0), splat(88.0))
    n = round_f32x16(x * LOG2_E)
    r = fma_f32x16(n, splat(-LN2_LOW), fma_f32x16(n, splat(-LN2_HIGH), x))
    p = fma_f32x16(splat(_C0), r, splat(_C1))
    p = fma_f32x16(p, r, splat(_C2))
    p = fma_f32x16(p, r, splat(_C3))
    p = fma_f32x16(p, r, splat(_C4))
    p = fma_f32x16(p, r, splat(_C5))
    value = fma_f32x16(p, r * r, r) + 1.0
    return value * f32_from_bits((f32_to_i32x16(n) + 127) << 23)


@njit(**_OPTIONS)
def silu_f32x16(x):
    """x * sigmoid(x)."""
    return divide_f32x16(x, exp_f32x16(x * -1.0) + 1.0)


@njit(**_OPTIONS)
def rotate_pairs(x, out, cos, sin, num_pairs):
    """out = the pairs (x[2i], x[2i+1]) turned by the angle of pair i (RoFormer; GGUF's "normal" order). May be in
    place."""
    for i in range(num_pairs):
        a, b = load_f32(x + 8 * i), load_f32(x + 8 * i + 4)
        c, s = load_f32(cos + 4 * i), load_f32(sin + 4 * i)
        store_f32(out + 8 * i, a * c - b * s)
        store_f32(out + 8 * i + 4, a * s + b * c)
