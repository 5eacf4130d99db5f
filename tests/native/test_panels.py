"""Panels of 16 rows times many tokens, for every type, against the numpy oracle."""

import numpy as np
import pytest

from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.cpu.panel import CODES, code_bias, panel_bytes, panel_kernel
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference import linear, seen_activations
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.random_blocks import REGIMES, hostile_rows
from tests.native.closeness import assert_close, product_size, sizes
from tests.native.harness import activations_for, panel_product
from tests.native.test_rows import hostile_tokens

TOKEN_COUNTS = (*range(1, 10), 37)


def check(name, data, x, tokens, start=None):
    weights, kind = dequantize(data, name), activation_kind(name)
    expected = linear(weights, x, kind)[tokens]
    size = product_size(weights, seen_activations(x, kind))[tokens]
    if start is not None:
        expected, size = expected + start, size + np.abs(start)
    assert_close(panel_product(name, data, activations_for(name, x), tokens, start), expected, size)


@pytest.mark.parametrize("name", BY_NAME)
def test_any_number_of_tokens(name):
    rng = np.random.default_rng(1)
    k = sizes(name)[1]
    x, data = rng.standard_normal((11, k)).astype(np.float32), hostile_rows(name, 13, k, rng)
    for num_tokens in TOKEN_COUNTS:
        tokens = rng.integers(0, len(x), num_tokens).astype(np.int32)  # some twice, in any order
        check(name, data, x, tokens)


@pytest.mark.parametrize("name", BY_NAME)
def test_any_number_of_rows_and_columns(name):
    rng = np.random.default_rng(2)
    for k in sizes(name):
        for num_rows in (1, 3, 5, 13, 16, 17):
            x = rng.standard_normal((5, k)).astype(np.float32)
            check(name, hostile_rows(name, num_rows, k, rng), x, np.arange(5, dtype=np.int32))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("regime", REGIMES)
def test_hostile_weights_and_tokens(name, regime):
    rng = np.random.default_rng(3)
    k = sizes(name)[-1]
    check(name, hostile_rows(name, 7, k, rng, regime), hostile_tokens(k, rng), np.arange(6, dtype=np.int32))


@pytest.mark.parametrize("name", BY_NAME)
def test_adding_to_what_is_there(name):
    rng = np.random.default_rng(4)
    k = sizes(name)[0]
    for num_rows in (13, 16):
        x, start = rng.standard_normal((5, k)).astype(np.float32), rng.standard_normal((5, num_rows)).astype(np.float32)
        check(name, hostile_rows(name, num_rows, k, rng), x, np.arange(5, dtype=np.int32), start)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_result_does_not_depend_on_the_other_tokens(name):
    rng = np.random.default_rng(5)
    k = sizes(name)[-1]
    data, x = hostile_rows(name, 16, k, rng), activations_for(name, rng.standard_normal((6, k)).astype(np.float32))
    together = panel_product(name, data, x, np.arange(6, dtype=np.int32))
    alone = [panel_product(name, data, x, np.array([token], np.int32))[0] for token in range(6)]
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("name", [name for name, layout in BY_NAME.items() if layout.product != "float"])
def test_no_code_is_larger_than_its_layout_says(name):
    """Sums of products in 16 bits rest on it; random bytes reach the bound where it is not that of all bytes."""
    layout, k = BY_NAME[name], 2048
    data = np.random.default_rng(7).integers(0, 256, (16, layout.row_bytes(k)), np.uint8)
    panel = np.zeros(panel_bytes(k), np.uint8)
    panel_kernel(name)(data.ctypes.data, data.shape[1], 16, k, panel.ctypes.data)
    codes, bias = panel[CODES : CODES + 16 * k].astype(np.int16), code_bias(name)
    if layout.is_signed and bias == 0:
        codes = codes.astype(np.int8).astype(np.int16)
    largest = np.abs(codes - bias).max()
    assert largest == layout.max_code or (layout.max_code == 128 and largest > 100), largest


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("hostile", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(name, hostile):
    rng = np.random.default_rng(6)
    k = sizes(name)[1]
    x = rng.standard_normal((5, k)).astype(np.float32)
    x[2, 3] = hostile
    out = panel_product(name, hostile_rows(name, 16, k, rng), activations_for(name, x), np.arange(5, dtype=np.int32))
    assert not np.isfinite(out[2]).any()
    assert np.isfinite(out[[0, 1, 3, 4]]).all()
