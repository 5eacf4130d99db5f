"""Every type decoded by the Triton kernel, against the oracle."""

import numpy as np
import pytest
import torch

from kimi_lite.native.gpu.dequant import dequantize
from kimi_lite.native.gpu.formats import formats
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference_types import dequantize as oracle
from kimi_lite.native.types.random_blocks import REGIMES, hostile_rows
from tests.native.gpu.tensors import apart, back, on

TYPES = list(BY_NAME)


def test_every_type_has_a_format():
    assert set(formats()) == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_equals_the_oracle(name, device):
    """All scale regimes as rows of one matrix; rows lie apart; an odd number of blocks."""
    rng = np.random.default_rng(0)
    k = 3 * max(BY_NAME[name].block_size, 9)
    rows = np.concatenate([hostile_rows(name, 1, k, rng, regime) for regime in REGIMES])
    expected = oracle(rows, name)
    actual = back(dequantize(apart(device, rows, 8), name))
    assert actual.shape == expected.shape
    size = np.abs(expected).max(axis=1, keepdims=True)  # a scale and a minimum may be fused into one rounding on a GPU
    assert (np.abs(actual - expected) <= 5e-7 * size + 1e-44).all()


@pytest.mark.parametrize("name", ["Q8_0", "TQ1_0", "IQ1_M", "Q4_K"])
def test_arbitrary_bytes(name, device):
    """Files may hold anything: scales that are infinite or no number give what the formula gives, and nothing else."""
    rng = np.random.default_rng(1)
    layout = BY_NAME[name]
    rows = rng.integers(0, 256, (4, layout.row_bytes(layout.block_size)), np.uint8)
    if name != "IQ1_M":
        rows.view(layout.dtype)["d"] = np.array([[np.inf], [np.nan], [-0.0], [1]], np.float16)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = oracle(rows, name)
    actual = back(dequantize(on(device, rows), name)).astype(np.float32)
    np.testing.assert_allclose(actual, expected, rtol=3e-7, atol=1e-3)


def test_writes_to_a_view_in_bfloat16(device):
    rows = hostile_rows("Q8_0", 3, 96, np.random.default_rng(2))
    whole = torch.full((3, 200), 7.0, dtype=torch.bfloat16, device=device)
    result = dequantize(on(device, rows), "Q8_0", torch.bfloat16, out=whole[:, :96])
    assert result.data_ptr() == whole.data_ptr()
    np.testing.assert_allclose(
        back(result), oracle(rows, "Q8_0"), rtol=2**-7
    )  # the interpreter cuts bits off, a GPU rounds
    assert (whole[:, 96:] == 7).all()
