"""The experiment of codes below 2 bits: what it codes decodes as it says, its kernel computes the code, bounds hold."""

import numpy as np
import pytest

from kimi_lite.native.simd_bytes import HAS_BYTE_PERMUTES
from kimi_lite.quantize.codecs.feedback import Curvature
from kimi_lite.tools.quality.rates import BLOCK, SCHEDULE, Trellis, iq1_kt, low_rank, row_levels, tq1_0
from kimi_lite.tools.quality.trellis_speed import BLOCK_BYTES, rows_kernel


def gaussian(num_rows, k=BLOCK):
    return np.random.default_rng(3).standard_normal((num_rows, k)).astype(np.float32)


@pytest.fixture(scope="module")
def trellis():
    return Trellis.learn(6, 1, num_blocks=16, rounds=3, beam=8)


def test_no_code_beats_the_bound_and_the_trellis_beats_ternary(trellis):
    weights = gaussian(6)
    ternary = np.square(tq1_0(weights, None).weights - weights).mean()
    for code in (tq1_0, low_rank, row_levels, iq1_kt, trellis.code):
        coded = code(weights, None)
        assert 2 ** (-2 * coded.rate) < np.square(coded.weights - weights).mean() < 0.25
    assert np.square(trellis.code(weights, None).weights - weights).mean() < 0.95 * ternary


@pytest.mark.parametrize(("name", "k"), [("iq1_kt", BLOCK), ("trellis", 2 * BLOCK)])
def test_feedback_lowers_the_error_of_products(trellis, name, k):
    code = iq1_kt if name == "iq1_kt" else trellis.code
    weights, rng = gaussian(8, k), np.random.default_rng(4)
    inputs = rng.standard_normal((2000, 12)) @ rng.standard_normal((12, k))
    inputs += 0.3 * rng.standard_normal(inputs.shape)
    curvature = Curvature.of(inputs.T @ inputs, len(inputs))
    errors = [code(weights, each).weights - weights for each in (None, curvature)]
    plain, fed_back = (np.square(inputs @ error.T).sum() for error in errors)
    assert fed_back < 0.6 * plain


@pytest.mark.skipif(not HAS_BYTE_PERMUTES, reason="the kernel needs AVX-512 VBMI")
@pytest.mark.parametrize("num_tables", [1, 2])
def test_the_kernel_multiplies_what_the_bits_say(num_tables):
    """Windows cut bit by bit from random bytes, the scale's bits before the first ones."""
    rng, num_rows, k = np.random.default_rng(5), 3, 2 * BLOCK
    blocks = rng.integers(0, 256, (num_rows, k // BLOCK, BLOCK_BYTES), np.uint8)
    blocks[:, :, :2] = rng.uniform(0.5, 1, (num_rows, k // BLOCK, 1)).astype(np.float16).view(np.uint8)
    tables = rng.integers(0, 256, 128, np.uint8)
    x, out = rng.integers(-127, 128, k, np.int8), np.zeros(num_rows, np.float32)
    data = np.concatenate([blocks.reshape(-1), np.zeros(64, np.uint8)])
    arguments = np.concatenate([x.view(np.uint8), tables])
    rows_kernel(SCHEDULE, num_tables).compiled.ctypes(
        data.ctypes.data, num_rows, k, arguments.ctypes.data, out.ctypes.data
    )
    bits, ends = np.unpackbits(blocks, axis=2, bitorder="little"), 16 + np.cumsum(SCHEDULE * (BLOCK // 8))
    codes = np.zeros((num_rows, k // BLOCK, BLOCK))
    for table in range(num_tables):
        first = ends - 6 * (num_tables - table)
        index = sum(bits[:, :, first + i].astype(int) << i for i in range(6))
        codes += tables[64 * table :][index]
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16).astype(np.float64)
    products = codes * x.reshape(-1, BLOCK) * scales
    np.testing.assert_allclose(
        out, products.sum(axis=(1, 2)), rtol=0, atol=1e-6 * np.abs(products).sum(axis=(1, 2)).max()
    )
