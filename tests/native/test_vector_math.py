"""exp, SiLU and rotary pairs on vectors against numpy, and RMSNorm through its operation."""

import numpy as np
import pytest

from kimi_lite.native import reference
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.compiler import function
from kimi_lite.native.cpu.linear import rms_norm_op
from kimi_lite.native.cpu.vector_math import exp_f32x16, rotate_pairs, silu_f32x16
from kimi_lite.native.simd import load_f32x16, store_f32x16
from tests.native.harness import run_ops, run_table


@function("void(int64, int64, int64)")
def _exp(x, out, count):
    for i in range(0, 4 * count, 64):
        store_f32x16(out + i, exp_f32x16(load_f32x16(x + i)))


@function("void(int64, int64, int64)")
def _silu(x, out, count):
    for i in range(0, 4 * count, 64):
        store_f32x16(out + i, silu_f32x16(load_f32x16(x + i)))


@function("void(int64, int64, int64, int64, int64)")
def _rotate(x, out, cos, sin, num_pairs):
    rotate_pairs(x, out, cos, sin, num_pairs)


def apply(kernel, values):
    x = np.zeros(-(-len(values) // 16) * 16, np.float32)
    x[: len(values)] = values
    out = np.empty_like(x)
    kernel(x.ctypes.data, out.ctypes.data, len(x))
    return out[: len(values)]


def test_exp_everywhere():
    x = np.concatenate([np.linspace(-87, 88, 100_001), np.random.default_rng(1).standard_normal(1000) * 1e-3])
    x = x.astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    assert np.abs(apply(_exp, x) / expected - 1).max() < 2e-7


def test_exp_at_its_ends():
    x = np.array([0, -0.0, 1e-45, -87, -88, -1e30, -np.inf, 88, 89, 1e30, np.inf], np.float32)
    actual = apply(_exp, x)
    assert (actual[:3] == 1).all()
    assert (actual[3:7] <= 1.7e-38).all() and (actual[3:7] >= 0).all(), "nothing, but no NaN"
    assert np.isfinite(actual).all() and (actual[7:] > 1.6e38).all(), "saturates"


@pytest.mark.parametrize("kernel", [_exp, _silu])
def test_nan_stays_nan(kernel):
    x = np.array([1, np.nan, 2, -np.nan], np.float32)
    assert np.isnan(apply(kernel, x)).tolist() == [False, True, False, True]


def test_silu():
    x = np.concatenate([np.linspace(-80, 80, 10_001), [0, -0.0, 1e-40, 1e30]]).astype(np.float32)
    expected = reference.silu(x.astype(np.float64))
    actual = apply(_silu, x)
    assert (np.abs(actual - expected) <= 3e-7 * np.abs(expected) + 1e-42).all()
    assert np.abs(apply(_silu, [-100, -1000])).max() < 1e-35
    assert not np.isfinite(apply(_silu, [np.inf, -np.inf])).any()


@pytest.mark.parametrize("num_pairs", [1, 8, 13, 32])
def test_rotation_also_in_place(num_pairs):
    rng = np.random.default_rng(2)
    x, angles = rng.standard_normal(2 * num_pairs).astype(np.float32), rng.uniform(-9, 9, num_pairs)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    expected, out = reference.rotate_pairs(x, cos, sin), np.empty_like(x)
    _rotate(x.ctypes.data, out.ctypes.data, cos.ctypes.data, sin.ctypes.data, num_pairs)
    assert np.abs(out - expected).max() < 1e-6
    _rotate(x.ctypes.data, x.ctypes.data, cos.ctypes.data, sin.ctypes.data, num_pairs)
    assert np.array_equal(x, out)


def norm(x, weight, eps=1e-5, width=None):
    out = Activations(len(x), len(weight), {32} if len(weight) % 32 == 0 else set())
    run_ops([rms_norm_op(run_table(len(x)), x, weight, out, eps)])
    return out.values


@pytest.mark.parametrize("k", [16, 48, 576, 7168])
def test_rms_norm(k):
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((5, k + 16)).astype(np.float32), rng.standard_normal(k).astype(np.float32)
    x[1], x[2], x[3] = 0, x[2] * 1e-30, x[3] * 1e15
    expected = reference.rms_norm(x[:, :k], weight, 1e-5)
    assert (np.abs(norm(x, weight) - expected) <= 1e-6 * np.abs(expected).max(axis=1, keepdims=True) + 1e-42).all()


@pytest.mark.parametrize("hostile", [np.nan, np.inf, -np.inf, 1e30])
def test_rms_norm_hides_no_overflow(hostile):
    """The square of 1e30 is infinite: zeros would look like a healthy token."""
    x = np.ones((2, 32), np.float32)
    x[1, 3] = hostile
    values = norm(x, np.ones(32, np.float32))
    assert np.isfinite(values[0]).all() and np.isnan(values[1]).any()
