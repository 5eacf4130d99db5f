"""Types that only ik_llama.cpp writes: sizes and decoders against its library's, bit for bit."""

import numpy as np
import pytest

from kimi_lite.native.cpu.matrix import dequantize as decoded_by_kernel
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.random_blocks import REGIMES, hostile_rows
from kimi_lite.native.types.two_tables.layout import SIX
from tests.native.types.ik_oracle import IK_TYPES, Oracle, installed_library, recorded


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    path = installed_library()
    if path is None:
        pytest.skip("ik-llama-cpp-python is not installed: what it decoded is recorded")
    return Oracle(path)


def agree(name: str, rows: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Bit for bit; but IQ6_K's values are a cubic for its floats, and that cubic rounded for its products and here."""
    if name != "IQ6_K":
        return np.array_equal(ours, theirs)
    blocks = BY_NAME[name].blocks(rows)
    steps = np.abs(blocks["d"].astype(np.float32)[..., None] * blocks["scales"])  # (rows, B, 16)
    return bool((np.abs(ours - theirs) <= 0.5001 * np.repeat(steps, 16, axis=-1).reshape(ours.shape)).all())


def test_iq6_k_has_the_cubic_rounded():
    codes = np.arange(64)
    cubic = -127 + codes * (6.2568 + codes * (-0.11218 + codes * 0.0011972))
    assert np.abs(np.array(SIX) - cubic).max() < 0.5


@pytest.mark.parametrize("name", IK_TYPES)
def test_decoders_agree_with_what_was_recorded(name):
    record = recorded(name)
    assert record.rows.shape[1] == BY_NAME[name].row_bytes(record.weights.shape[1])
    assert agree(name, record.rows, dequantize(record.rows, name), record.weights)
    assert agree(name, record.rows, decoded_by_kernel(record.rows, name), record.weights)


@pytest.mark.parametrize("name", IK_TYPES)
def test_sizes(oracle, name):
    layout = BY_NAME[name]
    assert oracle.sizes(name) == (layout.block_size, layout.block_bytes, layout.header_bytes)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", IK_TYPES)
def test_decoders_agree_with_ik_llama(oracle, name, regime):
    rows = hostile_rows(name, 16, 16 * BY_NAME[name].block_size, np.random.default_rng(1), regime)
    assert agree(name, rows, dequantize(rows, name), oracle.decode(name, rows))
