"""The scale of a block that minimises the importance-weighted squared error, for codes {-1, 0, 1} and {-1, 0, 1, 2}.

For given codes q the best scale is A / B with A = sum w x q and B = sum w q^2, and it lowers the error by A^2 / B. For
a given scale the best code is the nearest one. So a block's error depends on one number only: it is scanned at a few
sizes between those that can be best (a block's weighted mean and its largest weight), and the best is polished by
taking the two rules in turns (Lloyd 1982). Tests compare the result with the exact optimum over all thresholds.

Stock encoders scale by the largest weight, which throws away half of a Gaussian block's energy.
"""

import numpy as np
from numba import njit, types

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.cpu.compiler import function

_STEP_TERNARY, _STEP_TWO_BITS = np.float32(1.15), np.float32(1.12)  # ratio of one tried scale to the next
_MAX_STEPS = 64  # enough for an outlier 7,000 times as large as the mean; Gaussian blocks need ten
_NUM_POLISH = 3
_FAST = {"fastmath": {"nsz", "contract", "reassoc", "nnan", "ninf", "arcp"}, "error_model": "numpy"}
_BLOCKS = types.Array(types.float32, 2, "C", readonly=True)  # (B, block)
_SCALES = types.Array(types.float32, 1, "C")  # (B,)
_SIGNATURE = types.void(_BLOCKS, _BLOCKS, _SCALES)


def fit_scales(blocks: np.ndarray, weights: np.ndarray, max_code: int) -> np.ndarray:
    """Float32 (B, block) and weights of the squared errors (blocks of a row, block) to the float32 scales (B,), rounded
    to float16: for codes -1 to `max_code`, 1 or 2. A scale for 2 may be negative. Raises KimiLiteError."""
    assert max_code in (1, 2), max_code
    assert len(blocks) % len(weights) == 0, (blocks.shape, weights.shape)
    if not np.isfinite(blocks).all():
        raise KimiLiteError(
            "A weight is not finite and cannot be stored in this type.", "Convert to F32 and look at it."
        )
    scales = np.empty(len(blocks), np.float32)
    fit = _fit_ternary if max_code == 1 else _fit_two_bits
    fit(blocks, weights, scales)
    largest = np.abs(scales).max(initial=0)
    if largest >= 65520:  # rounds to infinity
        raise KimiLiteError(
            f"A scale of {largest:.6g} does not fit F16, whose largest is 65504.", "Choose BF16 or F32."
        )
    return scales.astype("<f2").astype(np.float32)


def spread_importance(importance: np.ndarray | None, row: int, block: int) -> np.ndarray:
    """Weights of the squared errors, float32 (row / block, block), of mean 1. The least counts a little, so that its
    weights are not arbitrary. `importance` is known for every column (`codecs.importance`)."""
    if importance is None:
        return np.ones((row // block, block), np.float32)
    assert importance.shape == (row,), (importance.shape, row)
    weights = importance / importance.mean(dtype=np.float64)
    return np.maximum(weights, 1e-4).astype(np.float32).reshape(-1, block)


@njit(**_FAST)
def _bounds(x, w):
    """The weighted mean of |x|, and its largest."""
    sum_wx, sum_w, largest = np.float32(0), np.float32(0), np.float32(0)
    for i in range(len(x)):
        size = abs(x[i])
        sum_wx += w[i] * size
        sum_w += w[i]
        largest = max(largest, size)
    return sum_wx / sum_w, largest


@njit(**_FAST)
def _ternary_sums(x, w, scale):
    """A and B of the nearest codes -1, 0, 1."""
    threshold = scale * np.float32(0.5)
    a, b = np.float32(0), np.float32(0)
    for i in range(len(x)):
        size = abs(x[i])
        weight = w[i] if size > threshold else np.float32(0)
        a += weight * size
        b += weight
    return a, b


@function(_SIGNATURE, **_FAST)
def _fit_ternary(blocks, weights, scales):
    for block in range(len(blocks)):
        x, w = blocks[block], weights[block % len(weights)]
        scale, largest = _bounds(x, w)
        best_gain, best = np.float32(0), np.float32(0)
        for _ in range(_MAX_STEPS):  # the best scale is a mean of the largest weights, so it lies between these bounds
            a, b = _ternary_sums(x, w, scale)
            if b > 0 and a * (a / b) > best_gain:
                best_gain, best = a * (a / b), a / b
            scale *= _STEP_TERNARY
            if scale > largest:
                break
        for _ in range(_NUM_POLISH):
            a, b = _ternary_sums(x, w, best)
            if b > 0:
                best = a / b
        scales[block] = best


@njit(**_FAST)
def _two_bit_sums(x, w, scale):
    """A and B of the nearest codes -1, 0, 1, 2 of x, and of -x: the latter stands for a negative scale."""
    half, more = scale * np.float32(0.5), scale * np.float32(1.5)
    zero = np.float32(0)
    a, b, a_minus, b_minus = zero, zero, zero, zero
    for i in range(len(x)):
        size, weight = abs(x[i]), w[i]
        once = weight if size > half else zero
        twice = weight if size > more else zero
        up, down = (twice, zero) if x[i] > 0 else (zero, twice)
        a += size * (once + up)
        b += once + up + up + up
        a_minus += size * (once + down)
        b_minus += once + down + down + down
    return a, b, a_minus, b_minus


@function(_SIGNATURE, **_FAST)
def _fit_two_bits(blocks, weights, scales):
    for block in range(len(blocks)):
        x, w = blocks[block], weights[block % len(weights)]
        mean, largest = _bounds(x, w)
        scale = mean * np.float32(0.5)  # all weights coded 2
        best_gain, best = np.float32(0), np.float32(0)
        for _ in range(_MAX_STEPS):
            a, b, a_minus, b_minus = _two_bit_sums(x, w, scale)
            if b > 0 and a * (a / b) > best_gain:
                best_gain, best = a * (a / b), a / b
            if b_minus > 0 and a_minus * (a_minus / b_minus) > best_gain:
                best_gain, best = a_minus * (a_minus / b_minus), -(a_minus / b_minus)
            scale *= _STEP_TWO_BITS
            if scale > largest:
                break
        for _ in range(_NUM_POLISH):
            a, b, a_minus, b_minus = _two_bit_sums(x, w, abs(best))
            if best > 0 and b > 0:
                best = a / b
            elif best < 0 and b_minus > 0:
                best = -(a_minus / b_minus)
        scales[block] = best
