"""Random but valid blocks of every GGUF type: for benchmarks, models made of nothing, and tests.

`random_rows` has weights of mean 0 and a wanted spread, in bytes that an encoder could have written: a random model of
the right spread stays finite through its layers, and its bytes are as hard to multiply as real ones. `hostile_rows` has
any bytes, with scales from ordinary to hostile. What is special about a type is in `native/types/*/blocks.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.families import parts

REGIMES = ("normal", "negative", "denormal", "huge", "zero")
_JITTER = np.sqrt(1 + 1 / 12)  # rms of a scale that varies uniformly between half and one and a half times its mean
_PROBED_WEIGHTS = 1 << 18
_FLOATS = {"normal": 1.0, "negative": 1.0, "denormal": 1e-40, "huge": 1e15, "zero": 0.0}
_FLOATS16 = {"normal": 1.0, "negative": 1.0, "denormal": 1e-6, "huge": 1.5e4, "zero": 0.0}


def set_d(blocks: np.ndarray, d: np.ndarray) -> None:
    """blocks (...) of a layout's dtype, d float16 (...): the scale as most types hold it."""
    blocks["d"] = d


@dataclass(frozen=True, slots=True)
class Maker:
    """What is special about a type's blocks. `restrict(blocks, rng)`: only the bytes that an encoder writes, where that
    is not all of them. `minimum`: the field that centres the weights on zero, and how many scales it is. `is_lopsided`:
    codes reach further on one side, so the sign of the scale varies."""

    restrict: Callable[[np.ndarray, np.random.Generator], None] | None = None
    set_scale: Callable[[np.ndarray, np.ndarray], None] = set_d
    minimum: tuple[str, float] | None = None
    is_lopsided: bool = False


@dataclass(frozen=True, slots=True)
class ByteScales:
    """Of a type whose scales are single bytes: the field, what each byte multiplies the integers with (float64,
    ascending), and the range of bytes [low, high) of each regime."""

    field: str
    values: np.ndarray
    regimes: dict[str, tuple[int, int]]


@cache
def _makers() -> dict[str, Maker | ByteScales | None]:
    """By type; None for floats."""
    return {name: maker for part in parts("blocks") for name, maker in part.MAKERS.items()}


def random_rows(layout: Layout, num_rows: int, row_weights: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 (num_rows, row_bytes) of weights with mean 0 and standard deviation `spread`."""
    if layout.row_scale:
        return _rows_of_scale(layout, num_rows, row_weights, spread / _unit_rms(layout), rng)
    num_blocks = num_rows * row_weights // layout.block_size
    blocks = random_blocks(layout, num_blocks, spread, rng)
    return blocks.view(np.uint8).reshape(num_rows, layout.row_bytes(row_weights))


def random_blocks(layout: Layout, num_blocks: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """(num_blocks,) of `layout.dtype`, of a type whose rows have no scale."""
    assert not layout.row_scale, layout.name
    if layout.block_size == 1:
        return _as_floats(layout, rng.standard_normal(num_blocks, np.float32) * np.float32(spread))
    return _blocks_of_scale(layout, num_blocks, spread / _unit_rms(layout), rng)


@cache
def _unit_rms(layout: Layout) -> float:
    """Root mean square of the weights of blocks whose scales have the mean square 1."""
    rng = np.random.default_rng(0)
    if layout.row_scale:
        rows = _rows_of_scale(layout, 1, _PROBED_WEIGHTS, 1.0, rng)
    else:
        rows = _blocks_of_scale(layout, _PROBED_WEIGHTS // layout.block_size, 1.0, rng).view(np.uint8)[None]
    weights = dequantize(rows, layout.name)
    return float(np.sqrt(np.square(weights, dtype=np.float64).mean()))


def _rows_of_scale(layout: Layout, num_rows: int, row_weights: int, scale: float, rng: np.random.Generator):
    """uint8 (num_rows, row_bytes) of a type whose rows have a scale: the same for all, as few rows would not average
    out."""
    maker = _makers()[layout.name]
    rows = rng.integers(0, 256, (num_rows, layout.row_bytes(row_weights)), np.uint8)
    if maker.restrict:
        maker.restrict(layout.blocks(rows), rng)
    layout.row_scales(rows)[:] = scale
    return rows


def _blocks_of_scale(layout: Layout, num_blocks: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    maker = _makers()[layout.name]
    blocks = rng.integers(0, 256, num_blocks * layout.block_bytes, np.uint8).view(layout.dtype)
    if isinstance(maker, ByteScales):
        blocks[maker.field] = _nearest_bytes(maker.values, scale, blocks[maker.field].shape, rng)
        return blocks
    if maker.restrict:
        maker.restrict(blocks, rng)
    d = scale / _JITTER * rng.uniform(0.5, 1.5, num_blocks)
    if maker.is_lopsided:
        d *= rng.choice((-1.0, 1.0), num_blocks)
    d = d.astype(np.float16)
    maker.set_scale(blocks, d)
    if maker.minimum:
        field, per_scale = maker.minimum
        blocks[field] = d * np.float16(per_scale)
    return blocks


def _nearest_bytes(scales: np.ndarray, wanted: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """The bytes on either side of `wanted`, in the proportion that gives its mean square."""
    above = int(np.clip(np.searchsorted(scales, wanted), 1, len(scales) - 1))
    low, high = scales[above - 1] ** 2, scales[above] ** 2
    return above - 1 + (rng.random(shape) < (wanted**2 - low) / (high - low))


def _as_floats(layout: Layout, values: np.ndarray) -> np.ndarray:
    """float32 (n,) as elements of a float type."""
    if layout.name == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(layout.dtype)
    return values.astype(np.float16 if layout.name == "F16" else np.float32).view(layout.dtype)


def hostile_rows(name: str, num_rows: int, k: int, rng: np.random.Generator, regime: str = "normal") -> np.ndarray:
    """uint8 (num_rows, row_bytes): all codes as likely, scales by `regime` (REGIMES)."""
    layout, maker = BY_NAME[name], _makers()[name]
    if layout.block_size == 1:
        values = rng.standard_normal(num_rows * k) * (_FLOATS16 if name == "F16" else _FLOATS)[regime]
        return _as_floats(layout, values.astype(np.float32)).view(np.uint8).reshape(num_rows, -1)
    data = rng.integers(0, 256, (num_rows, layout.row_bytes(k)), np.uint8)
    blocks = layout.blocks(data)  # (num_rows, blocks)
    if layout.row_scale:
        layout.row_scales(data)[:] = half_scales((num_rows,), rng, regime)
        return data
    if isinstance(maker, ByteScales):
        blocks[maker.field] = rng.integers(*maker.regimes[regime], blocks[maker.field].shape)
        if regime == "zero":
            blocks["qs"] = 0
        return data
    maker.set_scale(blocks, half_scales(blocks.shape, rng, regime))
    if maker.minimum:
        blocks[maker.minimum[0]] = half_scales(blocks.shape, rng, regime)
    return data


def half_scales(shape: tuple[int, ...], rng: np.random.Generator, regime: str) -> np.ndarray:
    """float16: near one, below zero, subnormal, near the largest (65504), or zero."""
    if regime == "denormal":
        return (rng.integers(1, 0x400, shape) | rng.integers(0, 2, shape) << 15).astype(np.uint16).view(np.float16)
    low, high = {"normal": (0.5, 1), "negative": (-1, -0.5), "huge": (6e4, 65504), "zero": (0, 0)}[regime]
    return rng.uniform(low, high, shape).astype(np.float16)
