"""Rows of any GGUF type for kernel tests: random codes, scales from ordinary to hostile, and how close a product must
be."""

import numpy as np

from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.layouts import BY_NAME

REGIMES = ("normal", "negative", "denormal", "huge", "zero")
_FLOATS = {"normal": 1.0, "negative": 1.0, "denormal": 1e-40, "huge": 1e15, "zero": 0.0}
_FLOATS16 = {"normal": 1.0, "negative": 1.0, "denormal": 1e-6, "huge": 1.5e4, "zero": 0.0}
_MXFP4_EXPONENTS = {
    "normal": (118, 134),
    "negative": (118, 134),
    "denormal": (0, 3),
    "huge": (170, 180),
    "zero": (100, 101),
}
_NVFP4_SCALES = {"normal": (1, 0x7F), "negative": (1, 0x80), "denormal": (1, 8), "huge": (0x78, 0x7F), "zero": (0, 1)}


def sizes(name: str) -> list[int]:
    """Row lengths worth testing: one unit of the kernels' work, three, and 576 (no multiple of 256) where it fits."""
    unit = max(16, activation_kind(name), BY_NAME[name].block_size)
    return [unit, 3 * unit, *([576] if 576 % unit == 0 else [5 * unit])]


def random_rows(name: str, num_rows: int, k: int, rng: np.random.Generator, regime: str = "normal") -> np.ndarray:
    """uint8 (num_rows, row_bytes): all codes as likely, scales by `regime`."""
    layout = BY_NAME[name]
    if layout.block_size == 1:
        return _float_rows(name, num_rows, k, rng, regime)
    data = rng.integers(0, 256, (num_rows, layout.row_bytes(k)), np.uint8)
    blocks = data.view(layout.dtype)  # (num_rows, blocks)
    for field in ("d", "dmin", "m"):
        if field in layout.dtype.fields and layout.dtype[field] == np.float16:
            blocks[field] = half_scales(blocks.shape, rng, regime)
    if name == "IQ1_M":  # the bits of d are the top nibbles of the four scale words
        bits = half_scales(blocks.shape, rng, regime).view(np.uint16)[..., None]
        nibbles = (bits >> np.array([0, 4, 8, 12], np.uint16)) & 15
        blocks["scales"] = (blocks["scales"] & 0x0FFF) | (nibbles << 12)
    elif name == "MXFP4":
        blocks["e"] = rng.integers(*_MXFP4_EXPONENTS[regime], blocks.shape)
        if regime == "zero":
            blocks["qs"] = 0
    elif name == "NVFP4":
        blocks["d"] = rng.integers(*_NVFP4_SCALES[regime], blocks["d"].shape)
    return data


def half_scales(shape: tuple[int, ...], rng: np.random.Generator, regime: str) -> np.ndarray:
    """float16: near one, below zero, subnormal, near the largest (65504), or zero."""
    if regime == "denormal":
        return (rng.integers(1, 0x400, shape) | rng.integers(0, 2, shape) << 15).astype(np.uint16).view(np.float16)
    low, high = {"normal": (0.5, 1), "negative": (-1, -0.5), "huge": (6e4, 65504), "zero": (0, 0)}[regime]
    return rng.uniform(low, high, shape).astype(np.float16)


def _float_rows(name: str, num_rows: int, k: int, rng: np.random.Generator, regime: str) -> np.ndarray:
    values = rng.standard_normal((num_rows, k)) * (_FLOATS16 if name == "F16" else _FLOATS)[regime]
    if name == "F16":
        return values.astype(np.float16).view(np.uint8)
    single = values.astype(np.float32)
    return (
        single.view(np.uint8) if name == "F32" else np.ascontiguousarray(single.view(np.uint16)[:, 1::2]).view(np.uint8)
    )


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
