"""Row lengths worth testing, and how close a product must be."""

import numpy as np

from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.layouts import BY_NAME


def sizes(name: str) -> list[int]:
    """Row lengths worth testing: one unit of the kernels' work, three, and 576 (no multiple of 256) where it fits."""
    unit = max(16, activation_kind(name), BY_NAME[name].block_size)
    return [unit, 3 * unit, *([576] if 576 % unit == 0 else [5 * unit])]


def assert_close(actual: np.ndarray, expected: np.ndarray, size: np.ndarray | float, tolerance: float = 2e-6) -> None:
    """|actual - expected| <= tolerance * size, where `size` is the sum of what was added; but for float32's limits."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = np.abs(actual.astype(np.float64) - expected)
    bound = tolerance * np.broadcast_to(size, expected.shape) + 1e-42
    is_bad = ~(error <= bound)  # NaN is bad
    if is_bad.any():
        at = tuple(int(i) for i in np.argwhere(is_bad)[0])
        raise AssertionError(
            f"{is_bad.sum()} of {is_bad.size} differ; at {at}: {actual[at]} is not {expected[at]} +- {bound[at]:.3g}"
        )


def product_size(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """weights (N, K), x (T, K) -> (T, N): the largest weight of a row times the sum of |x|, a scale for rounding
    errors.

    Codes with an offset cancel in sums of products, so even a row of zeros may leave the rounding of small weights
    behind.
    """
    largest = np.abs(weights).astype(np.float64).max(axis=1)
    return np.abs(x).astype(np.float64).sum(axis=1)[:, None] * np.where(largest == 0, 1e-7, largest)
