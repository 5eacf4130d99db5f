"""Types that only ik_llama.cpp writes: sizes and decoders against its library's, bit for bit."""

import numpy as np
import pytest

from kimi_lite.native.cpu.matrix import dequantize as decoded_by_kernel
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.random_blocks import REGIMES, hostile_rows
from tests.native.types.ik_oracle import IK_TYPES, Oracle, installed_library, recorded


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    path = installed_library()
    if path is None:
        pytest.skip("ik-llama-cpp-python is not installed: what it decoded is recorded")
    return Oracle(path)


@pytest.mark.parametrize("name", IK_TYPES)
def test_decoders_agree_with_what_was_recorded(name):
    record = recorded(name)
    assert record.rows.shape[1] == BY_NAME[name].row_bytes(record.weights.shape[1])
    assert np.array_equal(dequantize(record.rows, name), record.weights)
    assert np.array_equal(decoded_by_kernel(record.rows, name), record.weights)


@pytest.mark.parametrize("name", IK_TYPES)
def test_sizes(oracle, name):
    layout = BY_NAME[name]
    assert oracle.sizes(name) == (layout.block_size, layout.block_bytes, layout.header_bytes)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", IK_TYPES)
def test_decoders_agree_with_ik_llama(oracle, name, regime):
    rows = hostile_rows(name, 16, 16 * BY_NAME[name].block_size, np.random.default_rng(1), regime)
    assert np.array_equal(dequantize(rows, name), oracle.decode(name, rows))
