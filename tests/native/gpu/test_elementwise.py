"""Norms, rotation, SwiGLU and the join of expert outputs, against the oracle."""

import numpy as np
import pytest
import torch

from kimi_lite.native import reference
from kimi_lite.native.gpu.elementwise import rms_norm, rope, swiglu, weighted_sum
from tests.native.gpu.tensors import back, on, seen

_RNG = np.random.default_rng


def _normal(*shape, seed=5):
    return _RNG(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("k", [16, 200, 2500])
def test_rms_norm(k, device):
    x, weight = _normal(3, k), _normal(k, seed=6)
    actual = back(rms_norm(on(device, x), on(device, weight), 1e-5))
    np.testing.assert_allclose(actual, reference.rms_norm(x, weight, 1e-5), rtol=1e-6, atol=1e-6)


def test_rms_norm_adds_the_residual_first(device):
    """And writes its result twice, each in its own type."""
    x, delta, weight = _normal(3, 70), _normal(3, 70, seed=7), _normal(70, seed=8)
    stream, out = on(device, x.copy()), torch.empty((3, 70), dtype=torch.bfloat16, device=device)
    also = torch.zeros((3, 80), device=device)[:, 5:75]
    rms_norm(stream, on(device, weight), 1e-6, out=out, delta=on(device, delta), also=also)
    np.testing.assert_allclose(back(stream), x + delta, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(back(out), reference.rms_norm(x + delta, weight, 1e-6), rtol=2**-7)  # bfloat16
    np.testing.assert_allclose(back(also), reference.rms_norm(x + delta, weight, 1e-6), rtol=1e-6, atol=1e-6)


def test_rms_norm_of_zeros_and_nan(device):
    x = np.zeros((2, 32), np.float32)
    x[1, 3] = np.nan
    actual = back(rms_norm(on(device, x), on(device, np.ones(32, np.float32)), 1e-5))
    assert (actual[0] == 0).all() and np.isnan(actual[1]).all()


def test_rope_turns_the_end_of_each_head(device):
    q, angles = _normal(2, 19, 56), _normal(2, 12, seed=9)  # 19 heads: not a multiple of what a program takes
    actual = on(device, q.copy())
    rope(actual[:, :, 32:], on(device, np.cos(angles)), on(device, np.sin(angles)))
    expected = q.astype(np.float64)
    expected[:, :, 32:] = reference.rotate_pairs(q[:, :, 32:], np.cos(angles)[:, None], np.sin(angles)[:, None])
    np.testing.assert_allclose(back(actual), expected, rtol=1e-6, atol=1e-6)


def test_swiglu(device):
    gate, up = 40 * _normal(2, 1030), _normal(2, 1030, seed=10)
    gate[0, :3] = [-200, 200, np.nan]
    expected = reference.silu(gate) * up
    np.testing.assert_allclose(
        back(swiglu(on(device, gate), on(device, up))), expected, rtol=2e-5, atol=1e-30
    )  # a GPU's e^x is off by x * 2^-24


@pytest.mark.parametrize("has_base", [True, False])
def test_weighted_sum(has_base, device):
    choices, weights, base = _normal(3, 4, 1050), _normal(3, 4, seed=11), on(device, _normal(3, 1050, seed=12))
    expected = np.einsum("tkd,tk->td", choices.astype(np.float64), weights) + (seen(base) if has_base else 0)
    actual = weighted_sum(on(device, choices), on(device, weights), base if has_base else None)
    np.testing.assert_allclose(back(actual), expected, rtol=1e-5, atol=1e-5)


def test_weighted_sum_may_write_over_its_base(device):
    """The residual stream: x += sum."""
    choices, weights, base = _normal(2, 2, 40), _normal(2, 2, seed=13), _normal(2, 40, seed=14)
    stream = on(device, base.copy())
    weighted_sum(on(device, choices), on(device, weights), stream, out=stream)
    expected = np.einsum("tkd,tk->td", choices.astype(np.float64), weights) + base
    np.testing.assert_allclose(back(stream), expected, rtol=1e-5, atol=1e-5)
