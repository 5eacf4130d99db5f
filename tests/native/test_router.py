"""Expert choice against the numpy oracle: sigmoid and softmax, bias, groups, ties, and what is not finite."""

import numpy as np
import pytest

from kimi_lite.native import reference
from kimi_lite.native.cpu.router import route_op
from tests.native.harness import run_ops, run_table


def route(
    logits, bias, top_k, groups=(1, 1), is_sigmoid=True, is_normalized=True, scale=1.0, num_threads=1, nudge=None
):
    num_tokens, _ = logits.shape
    scores, choice = logits.astype(np.float32), np.empty(logits.shape, np.float32)
    ids, weights = np.full((num_tokens, top_k), -1, np.int32), np.empty((num_tokens, top_k), np.float32)
    run = run_table(num_tokens, num_threads)
    op = route_op(run, scores, choice, bias, ids, weights, groups, is_sigmoid, is_normalized, scale, nudge)
    run_ops([op], num_threads)
    return ids, weights


def check(logits, bias, top_k, **options):
    ids, weights = route(logits, bias, top_k, **options)
    expected_ids, expected_weights = reference.route(logits, bias, top_k, **options)
    assert np.array_equal(ids, expected_ids)
    assert np.allclose(weights, expected_weights, rtol=2e-6, atol=1e-30)
    return ids, weights


@pytest.mark.parametrize("is_sigmoid", [True, False])
@pytest.mark.parametrize("is_normalized", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(384, 8), (8, 2), (5, 5), (17, 3), (1, 1)])
def test_choice_and_weights(num_experts, top_k, has_bias, is_normalized, is_sigmoid):
    rng = np.random.default_rng(num_experts)
    logits = (2 * rng.standard_normal((9, num_experts))).astype(np.float32)
    bias = rng.standard_normal(num_experts).astype(np.float32) if has_bias else None
    check(logits, bias, top_k, is_sigmoid=is_sigmoid, is_normalized=is_normalized, scale=2.827)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "groups", "top_k"), [(256, (8, 4), 8), (64, (8, 3), 6), (12, (4, 1), 3), (12, (3, 3), 4)]
)
def test_groups(num_experts, groups, top_k, has_bias):
    rng = np.random.default_rng(7)
    logits = rng.standard_normal((13, num_experts)).astype(np.float32)
    bias = (0.3 * rng.standard_normal(num_experts)).astype(np.float32) if has_bias else None
    ids, _ = check(logits, bias, top_k, groups=groups, is_sigmoid=has_bias)
    size = num_experts // groups[0]
    assert all(len(set(row // size)) <= groups[1] for row in ids)


def test_the_bias_changes_the_choice_and_not_the_weights():
    logits = np.array([[0.0, 1.0, 2.0, 3.0]], np.float32)
    ids, weights = check(logits, np.array([9, 0, 0, 0], np.float32), 2, is_normalized=False)
    assert ids.tolist() == [[0, 3]]
    assert weights[0, 0] == 0.5


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_sigmoid", [True, False])
def test_a_nudge_is_a_second_bias(has_bias, is_sigmoid):
    """It moves near-equal experts to the front and leaves the weights of whoever is chosen alone."""
    rng = np.random.default_rng(8)
    logits = rng.standard_normal((7, 48)).astype(np.float32)
    bias = rng.standard_normal(48).astype(np.float32) if has_bias else None
    nudge = np.where(rng.random(48) < 0.5, np.float32(1), np.float32(0))
    ids, weights = route(logits, bias, 6, is_sigmoid=is_sigmoid, nudge=nudge)
    both = nudge if bias is None else bias + nudge
    expected_ids, expected_weights = reference.route(logits, both, 6, is_sigmoid=is_sigmoid)
    assert np.array_equal(ids, expected_ids) and np.allclose(weights, expected_weights, rtol=2e-6)
    assert not np.array_equal(ids, route(logits, bias, 6, is_sigmoid=is_sigmoid)[0])
    plain = route(logits, bias, 6, is_sigmoid=is_sigmoid, nudge=np.zeros(48, np.float32))
    assert all(np.array_equal(*pair) for pair in zip(plain, route(logits, bias, 6, is_sigmoid=is_sigmoid), strict=True))


def test_a_nudge_may_change_between_runs():
    logits, nudge = np.array([[0.0, 0.1, 0.2]], np.float32), np.zeros(3, np.float32)
    assert route(logits, None, 1, nudge=nudge)[0].tolist() == [[2]]
    nudge[0] = 0.5
    assert route(logits, None, 1, nudge=nudge)[0].tolist() == [[0]]


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_equals_go_by_number(groups):
    logits = np.zeros((2, 16), np.float32)
    logits[1, 5:] = 100  # sigmoid saturates: all exactly one
    check(logits, np.zeros(16, np.float32), 3, groups=groups)


def test_extreme_logits():
    logits = np.array([[-200, 200, 0, 88, -88, 1e30, -1e30, 5]], np.float32)
    check(logits, None, 8)
    check(logits, None, 8, is_sigmoid=False)


@pytest.mark.parametrize("is_sigmoid", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (8, 2)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_nan_is_chosen_and_nobody_twice(groups, is_sigmoid, has_bias):
    """A NaN must reach the output, and memory for the slots of an expert is made for one of each token."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((5, 64)).astype(np.float32)
    logits[1] = np.nan
    logits[2, 40] = np.nan
    logits[3, 7] = np.inf
    bias = np.zeros(64, np.float32) if has_bias else None
    ids, weights = route(logits, bias, 8, groups=groups, is_sigmoid=is_sigmoid)
    for row in ids:
        assert len(set(row.tolist())) == 8 and (row >= 0).all() and (row < 64).all()
    assert np.isnan(weights[1:4]).any(axis=1).all()
    assert np.isfinite(weights[[0, 4]]).all()
    assert is_sigmoid <= (7 in ids[3])


@pytest.mark.parametrize("hostile", [np.nan, np.inf])
def test_a_bias_that_is_not_finite_is_seen_in_the_weights(hostile):
    bias = np.array([0, hostile, -np.inf, 0], np.float32)
    ids, weights = check_nan(np.zeros((1, 4), np.float32), bias)
    assert ids[0, 0] == 1 and np.isnan(weights).all()


def check_nan(logits, bias):
    ids, weights = route(logits, bias, 2)
    expected_ids, expected_weights = reference.route(logits, bias, 2)
    assert np.array_equal(ids, expected_ids) and np.array_equal(weights, expected_weights, equal_nan=True)
    return ids, weights


def test_minus_infinity_everywhere():
    ids, _ = route(np.full((1, 16), -np.inf, np.float32), np.full(16, -np.inf, np.float32), 4, groups=(4, 2))
    assert len(set(ids[0].tolist())) == 4


def test_threads_do_not_matter():
    logits = np.random.default_rng(4).standard_normal((37, 64)).astype(np.float32)
    one, three = route(logits, None, 6), route(logits, None, 6, num_threads=3)
    assert np.array_equal(one[0], three[0]) and np.array_equal(one[1], three[1])
