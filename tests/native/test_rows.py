"""Rows of every type times single tokens, and their values as float32, against the numpy oracle."""

import numpy as np
import pytest

from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference import linear, seen_activations
from kimi_lite.native.reference_types import dequantize as dequantize_reference
from kimi_lite.native.types.random_blocks import REGIMES, hostile_rows
from tests.native.closeness import assert_close, product_size, sizes
from tests.native.harness import activations_for, rows_product

NUM_ROWS = (1, 3, 5, 13, 17)


def hostile_tokens(k: int, rng: np.random.Generator) -> np.ndarray:
    """float32 (6, K): ordinary, zeros, subnormal, one outlier, all of one sign, and large."""
    x = rng.standard_normal((6, k)).astype(np.float32)
    x[1] = 0
    x[2] *= 1e-40
    x[3, k // 2] = 1000
    x[4] = np.abs(x[4]) + 3
    x[5] *= 1e12
    return x


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("regime", REGIMES)
def test_rows_equal_the_oracle(name, regime):
    rng = np.random.default_rng(1)
    for k in sizes(name):
        x = hostile_tokens(k, rng)
        prepared = activations_for(name, x)
        for num_rows in NUM_ROWS:
            data = hostile_rows(name, num_rows, k, rng, regime)
            weights, kind = dequantize_reference(data, name), activation_kind(name)
            actual = rows_product(name, data, prepared)
            assert_close(actual, linear(weights, x, kind), product_size(weights, seen_activations(x, kind)))
            assert not actual[1].any(), "zero activations make zeros"


@pytest.mark.parametrize("name", BY_NAME)
def test_a_row_does_not_depend_on_its_neighbours(name):
    """Four rows are multiplied at once, the rest one by one: a result must not tell which."""
    rng = np.random.default_rng(2)
    k = sizes(name)[-1]
    data, x = hostile_rows(name, 7, k, rng), activations_for(name, rng.standard_normal((1, k)).astype(np.float32))
    together = rows_product(name, data, x)
    alone = np.concatenate([rows_product(name, data[row : row + 1], x) for row in range(7)], axis=1)
    weights = dequantize_reference(data, name)
    assert_close(together, alone.astype(np.float64), product_size(weights, x.values), 3e-7)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_other_tokens_do_not_matter(name):
    """However many are multiplied at once, and whatever they are: the bits of one alone."""
    rng = np.random.default_rng(7)
    for k in sizes(name):
        x = activations_for(name, np.concatenate([hostile_tokens(k, rng), rng.standard_normal((5, k))]).astype("f4"))
        data = hostile_rows(name, 21, k, rng)
        alone = np.concatenate([rows_product(name, data, x, np.array([t], np.int32)) for t in range(x.capacity)])
        for num_tokens in (2, 3, 4, 5, 8, 11):
            tokens = rng.permutation(x.capacity)[:num_tokens].astype(np.int32)
            together = rows_product(name, data, x, tokens)
            assert np.array_equal(together.view(np.int32), alone[tokens].view(np.int32))


@pytest.mark.parametrize("name", BY_NAME)
def test_rows_at_odd_addresses_and_strides(name):
    rng = np.random.default_rng(3)
    k = sizes(name)[1]
    data = hostile_rows(name, 5, k, rng)
    x = activations_for(name, rng.standard_normal((1, k)).astype(np.float32))
    room = np.zeros((5, data.shape[1] + 7), np.uint8).reshape(-1)
    shifted = np.lib.stride_tricks.as_strided(room[3:], data.shape, (data.shape[1] + 5, 1))
    shifted[:] = data
    assert np.array_equal(rows_product(name, shifted, x), rows_product(name, data, x))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("hostile", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(name, hostile):
    rng = np.random.default_rng(4)
    k = sizes(name)[1]
    x = rng.standard_normal((3, k)).astype(np.float32)
    x[1, k - 5] = hostile
    out = rows_product(name, hostile_rows(name, 5, k, rng), activations_for(name, x))
    assert not np.isfinite(out[1]).any()
    assert np.isfinite(out[[0, 2]]).all()


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("regime", REGIMES)
def test_values_equal_the_oracle(name, regime):
    rng = np.random.default_rng(5)
    for num_rows, k in zip((1, 3, 5), sizes(name), strict=True):
        data = hostile_rows(name, num_rows, k, rng, regime)
        expected = dequantize_reference(data, name).astype(np.float64)
        assert_close(dequantize(data, name), expected, np.abs(expected).max(axis=1, keepdims=True), 5e-7)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_values_of_vectors_that_are_no_multiple_of_16(name):
    rng = np.random.default_rng(6)
    for k in (1, 8, 15, 17, 33):
        data = hostile_rows(name, 1, k, rng)
        assert np.array_equal(dequantize(data, name), dequantize_reference(data, name))
