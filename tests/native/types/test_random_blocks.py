"""Random rows have the mean and spread that were asked for; where a decoder is not ours, it is the judge."""

import gguf
import numpy as np
import pytest

from kimi_lite.native.layouts import BY_NAME, LAYOUTS, Layout
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.random_blocks import REGIMES, hostile_rows, random_blocks, random_rows
from kimi_lite.native.types.sixteen_values.blocks import MAKERS

SPREADS = (7168**-0.5, 1.0)


def decode(layout: Layout, rows: np.ndarray) -> np.ndarray:
    """uint8 (rows, row_bytes) -> float64 (num_blocks, block_size)"""
    if layout.is_ik:  # test_ik_types.py compares this decoder with ik_llama.cpp's
        return dequantize(rows, layout.name).astype(np.float64).reshape(-1, layout.block_size)
    blocks = layout.blocks(rows).reshape(-1)
    if layout.name == "Q1_0":  # +d or -d, by the bit
        bits = np.unpackbits(blocks["qs"], axis=1, bitorder="little")
        return (2.0 * bits - 1) * blocks["d"].astype(np.float64)[:, None]
    if layout.name in ("Q2_0", "LITE2_128"):  # two bits a code, low ones first: -d, 0, d, 2d
        codes = (blocks["qs"][:, :, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
        return (codes.reshape(len(blocks), -1) - 1.0) * blocks["d"].astype(np.float64)[:, None]
    data = blocks.view(np.uint8).reshape(len(blocks), layout.block_bytes)
    weights = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(layout.ggml_id))
    return weights.reshape(len(blocks), layout.block_size).astype(np.float64)


def as_rows(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(np.uint8).reshape(len(blocks), -1)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_mean_and_spread(layout, spread):
    num_blocks = 400_000 // layout.block_size + 2000
    weights = decode(layout, random_rows(layout, 1, num_blocks * layout.block_size, spread, np.random.default_rng(1)))
    assert np.isfinite(weights).all()
    assert weights.std() == pytest.approx(spread, rel=0.03)
    assert abs(weights.mean()) < 0.03 * spread


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_rows_are_reproducible_and_differ(layout):
    first, again, other = (random_rows(layout, 3, 512, 0.1, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.shape == (3, layout.row_bytes(512)) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


def test_ternary_codes_are_those_an_encoder_writes():
    rng = np.random.default_rng(2)
    for name in ("TQ1_0", "TQ2_0"):
        blocks = random_blocks(BY_NAME[name], 50, 1.0, rng)
        weights = decode(BY_NAME[name], as_rows(blocks))
        assert set(np.unique(np.sign(weights))) == {-1.0, 0.0, 1.0}
        assert np.abs(weights).max(axis=1) == pytest.approx(blocks["d"].astype(np.float64), rel=1e-3)
        again = gguf.quants.quantize(weights.astype(np.float32), gguf.GGMLQuantizationType[name])
        assert np.array_equal(again.reshape(-1), blocks.view(np.uint8))


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_fp4_scales(name):
    """The table against the decoder: one block for each scale byte, every code 2, which stands for the integer 2."""
    layout, scales = BY_NAME[name], MAKERS[name].values
    blocks = np.zeros(len(scales), layout.dtype)
    blocks["qs"] = 0x22
    if name == "MXFP4":
        blocks["e"] = np.arange(len(scales))
    else:
        blocks["d"] = np.arange(len(scales))[:, None]
    is_normal = scales < 1e38  # the largest overflow float32
    assert decode(layout, as_rows(blocks))[is_normal, 0] == pytest.approx(2 * scales[is_normal], rel=1e-6)


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_fp4_spread_far_out(name):
    """Between two scales, and near the smallest: the mean square is right, not the nearest power of two's."""
    for spread in (0.0301, 0.9, 3.7):
        weights = decode(BY_NAME[name], as_rows(random_blocks(BY_NAME[name], 8000, spread, np.random.default_rng(3))))
        assert weights.std() == pytest.approx(spread, rel=0.03)


@pytest.mark.parametrize("name", BY_NAME)
def test_hostile_rows_are_what_their_regime_says(name):
    """Twice the same; zeros decode to zeros, subnormal scales to small weights, huge ones to large, none to NaN."""
    k, largest = 4 * max(16, BY_NAME[name].block_size), {}
    for regime in REGIMES:
        first, again = (hostile_rows(name, 5, k, np.random.default_rng(1), regime) for _ in range(2))
        assert np.array_equal(first, again) and first.shape == (5, BY_NAME[name].row_bytes(k))
        with np.errstate(over="ignore"):
            weights = dequantize(first, name)
        assert np.isfinite(weights).all()
        largest[regime] = np.abs(weights).max()
    assert largest["zero"] == 0
    assert largest["denormal"] < 0.2 * largest["normal"] <= 0.2 * largest["huge"]
