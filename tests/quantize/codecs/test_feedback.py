"""Error feedback: the products' error it leaves, its bytes, and its edges."""

import numpy as np
import pytest

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference_types import dequantize
from kimi_lite.quantize.codecs import encode, feedback
from kimi_lite.quantize.codecs.feedback import CODE_TYPES, FEEDBACK_TYPES, Curvature, encode_with_feedback

TYPES = sorted(CODE_TYPES)
BLOCK_TYPES = ("IQ2_XXS", "IQ4_NL", "Q2_K", "Q4_K")
K = 512


@pytest.fixture(scope="module")
def problem():
    """Weights (40, 512), training inputs and others of the same kind: a few strong directions, columns of unequal
    size."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((64, K)) * rng.gamma(1.0, size=K)

    def draw(count: int) -> np.ndarray:
        mixed = rng.standard_normal((count, 64)) @ mixing
        return (mixed + 0.3 * rng.standard_normal((count, K))).astype(np.float32)

    return rng.standard_normal((40, K)).astype(np.float32), draw(2000), draw(500)


def product_error(weights: np.ndarray, encoded: np.ndarray, type_name: str, inputs: np.ndarray) -> float:
    error = (dequantize(encoded, type_name) - weights) @ inputs.T
    return float((error**2).sum() / ((weights @ inputs.T) ** 2).sum())


@pytest.mark.parametrize("type_name", TYPES)
def test_products_on_other_inputs_lose_less_than_half(problem, type_name):
    weights, inputs, others = problem
    layout = BY_NAME[type_name]
    importance = np.square(inputs).mean(axis=0)
    with_feedback = encode_with_feedback(layout, weights, Curvature.of(inputs.T @ inputs, len(inputs)))
    assert with_feedback.shape == (40, layout.row_bytes(K))
    before = product_error(weights, encode(layout, weights, importance), type_name, others)
    assert product_error(weights, with_feedback, type_name, others) < 0.5 * before


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_types_of_ggml_lose_less_by_feedback_from_block_to_block(problem, type_name):
    """On other inputs too; and each row's H-weighted error is that of its decoded codes."""
    pytest.importorskip("llama_cpp", reason="needs the ggml extra", exc_type=ImportError)
    weights, inputs, others = problem
    layout = BY_NAME[type_name]
    assert type_name in FEEDBACK_TYPES
    importance = np.square(inputs).mean(axis=0)
    with_feedback = encode_with_feedback(layout, weights, Curvature.of(inputs.T @ inputs, len(inputs)))
    assert with_feedback.shape == (40, layout.row_bytes(K))
    before = product_error(weights, encode(layout, weights, importance), type_name, others)
    assert product_error(weights, with_feedback, type_name, others) < 0.9 * before


def test_descent_goes_on_where_feedback_ends(problem, monkeypatch):
    weights, inputs, _ = problem
    curvature = Curvature.of(inputs.T @ inputs, len(inputs))

    def error(num_rounds: int) -> float:
        monkeypatch.setattr(feedback, "_NUM_ROUNDS", num_rounds)
        difference = dequantize(encode_with_feedback(BY_NAME["TQ1_0"], weights, curvature), "TQ1_0") - weights
        return float(((difference @ curvature.hessian) * difference).sum())

    errors = [error(num_rounds) for num_rounds in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("type_name", TYPES)
def test_packed_codes_decode_to_themselves(type_name):
    layout, rng = BY_NAME[type_name], np.random.default_rng(1)
    codes = rng.integers(0, 3 if type_name == "TQ1_0" else 4, (6, layout.block_size)).astype(np.uint8)
    scales = rng.standard_normal(6).astype(np.float16).astype(np.float32)
    packed = feedback._PACK[type_name](codes, scales, 3)
    assert packed.shape == (3, 2 * layout.block_bytes)
    want = ((codes.astype(np.float32) - 1) * scales[:, None]).reshape(3, -1)
    assert (dequantize(packed, type_name) == want).all()


@pytest.mark.parametrize("type_name", TYPES)
def test_inputs_that_are_all_alike_need_no_feedback(type_name):
    """With H a multiple of the identity each block is fitted for itself, so its error is that of the plain encoder, or
    less."""
    weights = np.random.default_rng(2).standard_normal((5, K)).astype(np.float32)
    curvature = Curvature.of(np.eye(K, dtype=np.float32) * 7, 10_000)
    error = [
        float(((dequantize(encoded, type_name) - weights) ** 2).sum())
        for encoded in (
            encode_with_feedback(BY_NAME[type_name], weights, curvature),
            encode(BY_NAME[type_name], weights),
        )
    ]
    assert error[0] <= error[1] * 1.001


def test_zeros_and_columns_without_inputs(problem):
    weights, inputs, _ = problem
    weights, inputs = weights[:3].copy(), inputs.copy()
    weights[1] = 0
    weights[2, :256] = 0
    inputs[:, 100:200] = 0
    encoded = encode_with_feedback(BY_NAME["TQ1_0"], weights, Curvature.of(inputs.T @ inputs, len(inputs)))
    decoded = dequantize(encoded, "TQ1_0")
    assert np.isfinite(decoded).all() and (decoded[1] == 0).all() and (decoded[2, :256] == 0).all()
    assert np.abs(decoded[0]).max() > 0


def test_what_cannot_be_calibrated(problem):
    weights, inputs, _ = problem
    assert Curvature.of(np.zeros((K, K)), 0) is None
    assert Curvature.of(np.zeros((K, K)), 100) is None  # inputs of zeros
    with pytest.raises(KimiLiteError, match="infinite"):
        Curvature.of(np.full((K, K), np.inf), 100)
    with pytest.raises(KimiLiteError, match="not finite"):
        encode_with_feedback(
            BY_NAME["TQ1_0"], np.where(weights > 2, np.nan, weights), Curvature.of(inputs.T @ inputs, 2000)
        )
    with pytest.raises(KimiLiteError, match="65504"):
        encode_with_feedback(BY_NAME["TQ2_0"], weights * 1e6, Curvature.of(inputs.T @ inputs, 2000))
