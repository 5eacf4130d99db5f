"""TQ1_0, TQ2_0 and Q2_0: the layouts, the exact optimum as the oracle of the fit, and hostile blocks."""

import importlib.util

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference_types import dequantize
from kimi_lite.quantize.codecs import encode, find_layout, ggml

MAX_CODE = {"TQ1_0": 1, "TQ2_0": 2, "Q2_0": 2, "LITE2_128": 2}
GAUSSIAN_ERROR = {"TQ1_0": 0.437, "TQ2_0": 0.373, "Q2_0": 0.353, "LITE2_128": 0.365}
needs_ggml = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs the ggml extra")


def least_error(x: np.ndarray, w: np.ndarray, max_code: int) -> float:
    """The smallest sum of w (x - d q)^2 over all d and codes: every partition that a scale can make is tried."""
    best_gain = 0.0
    for y in (x, -x) if max_code == 2 else (x,):
        breaks = np.concatenate([2 * np.abs(y), y[y > 0] / 1.5]) if max_code == 2 else 2 * np.abs(y)
        for d in np.unique(breaks[breaks > 0]) * (1 - 1e-9):
            q = np.clip(np.rint(y / d), -1, max_code)
            a, b = (w * y * q).sum(), (w * q * q).sum()
            best_gain = max(best_gain, a * a / b if b else 0.0)
    return (w * x * x).sum() - best_gain


def relative_error(rows: np.ndarray, name: str, importance: np.ndarray | None = None) -> float:
    decoded = dequantize(encode(BY_NAME[name], rows, importance), name)
    return float(np.sqrt(((rows - decoded) ** 2).sum(dtype=np.float64) / (rows**2).sum(dtype=np.float64)))


@pytest.mark.parametrize("name", MAX_CODE)
def test_gaussian_error(name):
    rows = np.random.default_rng(1).normal(0, 0.02, (128, 1024)).astype(np.float32)
    assert relative_error(rows, name) <= GAUSSIAN_ERROR[name]


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("kind", ["gauss", "laplace", "student", "int4"])
@pytest.mark.parametrize("name", MAX_CODE)
def test_the_fit_is_the_exact_optimum_within_a_thousandth(name, kind, is_weighted):
    rng, shape = np.random.default_rng(2), (12, BY_NAME[name].block_size)
    draws = {
        "gauss": rng.standard_normal, "laplace": lambda size: rng.laplace(size=size),
        "student": lambda size: rng.standard_t(2, size=size), "int4": lambda size: rng.integers(-8, 8, size),
    }  # fmt: skip
    rows = draws[kind](shape).astype(np.float32)
    w = rng.gamma(0.5, size=shape[1]).astype(np.float32) + np.float32(1e-2) if is_weighted else None
    decoded = dequantize(encode(BY_NAME[name], rows, w), name)
    weights = np.ones(shape[1]) if w is None else w.astype(np.float64)
    error = (weights * (rows.astype(np.float64) - decoded) ** 2).sum(axis=1)
    exact = np.array([least_error(row, weights, MAX_CODE[name]) for row in rows.astype(np.float64)])
    assert np.all(error <= exact * 1.03 + 1e-9)
    assert error.sum() <= exact.sum() * 1.002


@pytest.mark.parametrize("name", MAX_CODE)
def test_weights_on_the_grid_survive(name):
    """Decoding and encoding again gives the same values, where every block uses its codes."""
    rng = np.random.default_rng(3)
    codes = rng.integers(-1, MAX_CODE[name] + 1, (6, 512)).reshape(-1, BY_NAME[name].block_size)
    scales = (rng.choice([-1, 1], len(codes)) * rng.uniform(0.01, 2, len(codes))).astype(np.float16).astype(np.float32)
    rows = (codes * scales[:, None]).astype(np.float32).reshape(6, 512)
    assert np.array_equal(dequantize(encode(BY_NAME[name], rows), name), rows)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_layout_equals_gguf(name):
    rows = np.random.default_rng(4).standard_normal((3, 768), np.float32)
    encoded = encode(BY_NAME[name], rows)
    assert np.array_equal(gguf.quants.dequantize(encoded, GGMLQuantizationType[name]), dequantize(encoded, name))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, min_value=-60000, max_value=60000), min_size=64, max_size=64),
    st.sampled_from(list(MAX_CODE)),
)
def test_any_block_is_no_worse_than_zero(values, name):
    rows = np.resize(np.array(values, np.float32), (1, 256))
    decoded = dequantize(encode(BY_NAME[name], rows), name).astype(np.float64)
    energy = (rows.astype(np.float64) ** 2).sum()
    assert ((rows - decoded) ** 2).sum() <= energy * (1 + 1e-3)


@pytest.mark.parametrize("name", MAX_CODE)
def test_hostile_blocks(name):
    rows = np.zeros((3, 256), np.float32)
    rows[1, 7], rows[2] = -3.0, 1e-30
    decoded = dequantize(encode(BY_NAME[name], rows), name)
    assert not decoded[[0, 2]].any()
    assert decoded[1, 7] == -3.0
    assert np.count_nonzero(decoded) == 1
    with pytest.raises(KimiLiteError, match="not finite"):
        encode(BY_NAME[name], np.full((1, 256), np.inf, np.float32))
    with pytest.raises(KimiLiteError, match="does not fit F16"):
        encode(BY_NAME[name], np.full((1, 256), 2e5, np.float32))


@pytest.mark.parametrize(("name", "factor"), [("TQ1_0", 0.99), ("TQ2_0", 0.99), ("Q2_0", 0.99), ("Q2_K", 0.97)])
def test_importance_lowers_the_error_where_it_counts(name, factor):
    if name not in MAX_CODE and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs the ggml extra")
    rng = np.random.default_rng(5)
    rows, importance = rng.standard_normal((16, 512), np.float32), rng.gamma(0.3, size=512).astype(np.float32)
    flat = np.ones(512, np.float32)
    errors = [
        (importance * (rows - dequantize(encode(BY_NAME[name], rows, weights), name)) ** 2).sum()
        for weights in (importance, flat)
    ]
    assert errors[0] < factor * errors[1]


def test_unused_columns_and_experts_are_still_encoded():
    rows = np.random.default_rng(6).standard_normal((4, 256), np.float32)
    assert np.array_equal(encode(BY_NAME["TQ1_0"], rows, np.zeros(256, np.float32)), encode(BY_NAME["TQ1_0"], rows))
    half = np.ones(256, np.float32)
    half[128:] = 0
    decoded = dequantize(encode(BY_NAME["TQ1_0"], rows, half), "TQ1_0")
    assert np.abs(rows - decoded)[:, 128:].mean() < np.abs(rows[:, 128:]).mean()


@needs_ggml
@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_ours_beats_ggml(name):
    rows = np.random.default_rng(7).standard_normal((8, 1024), np.float32)
    stock = dequantize(ggml.encode(BY_NAME[name], rows), name)
    assert relative_error(rows, name) < 0.6 * np.sqrt(((rows - stock) ** 2).sum() / (rows**2).sum())


@needs_ggml
def test_types_that_need_importance_are_taken_with_it():
    with pytest.raises(KimiLiteError, match="needs an importance matrix") as caught:
        find_layout("iq1_s")
    assert "--imatrix" in caught.value.hint
    assert find_layout("iq1_s", has_importance=True).name == "IQ1_S"
