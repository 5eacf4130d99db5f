"""Encoders against gguf-py's and ggml's, bit for bit, at odd sizes and hostile values."""

import importlib.util

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.arch.recipe import OWN_TYPES
from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize import codecs
from kimi_lite.quantize.codecs import encode, find_layout, ggml

needs_ggml = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs the ggml extra")


def reference(rows: np.ndarray, name: str) -> np.ndarray:
    return gguf.quants.quantize(rows, GGMLQuantizationType[name]).view(np.uint8).reshape(len(rows), -1)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (7, 1056)])
def test_own_encoders_equal_gguf(name, shape):
    rows = np.random.default_rng(1).standard_normal(shape, np.float32)
    assert np.array_equal(encode(BY_NAME[name], rows), reference(rows, name))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, min_value=-(2.0**20), max_value=2.0**20), min_size=32, max_size=32))
def test_q8_0_equals_gguf_on_any_block(values):
    rows = np.array([values], np.float32)
    if 0 < np.abs(rows).max() < 2.0**-120:
        return  # the reciprocal overflows there, and gguf-py's own codes are undefined
    assert np.array_equal(encode(BY_NAME["Q8_0"], rows), reference(rows, "Q8_0"))


def test_q8_0_rounds_halves_away_from_zero():
    rows = np.zeros((1, 32), np.float32)
    rows[0, :5] = [127, 0.5, -0.5, 2.5, np.nextafter(np.float32(0.5), np.float32(0))]
    codes = encode(BY_NAME["Q8_0"], rows)[0, 2:].view(np.int8)
    assert codes[:5].tolist() == [127, 1, -1, 3, 0]


def test_q8_0_of_nearly_nothing_is_zero():
    rows = np.full((1, 32), 1e-40, np.float32)
    rows[0, 0] = -1e-42
    assert gguf.quants.dequantize(encode(BY_NAME["Q8_0"], rows), GGMLQuantizationType.Q8_0).tolist() == [[0.0] * 32]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_bf16_equals_gguf_on_any_bits(bits):
    rows = np.array([bits], "<u4").view("<f4")
    assert np.array_equal(encode(BY_NAME["BF16"], rows), reference(rows, "BF16"))


@pytest.mark.parametrize(
    ("name", "value"), [("F16", 65520.0), ("F16", np.nan), ("Q8_0", 1e9), ("Q8_0", np.nan), ("Q8_0", np.inf)]
)
def test_a_value_that_does_not_fit_is_refused(name, value):
    rows = np.zeros((2, 32), np.float32)
    rows[1, 3] = value
    with pytest.raises(KimiLiteError, match="does not fit"):
        encode(BY_NAME[name], rows)


@needs_ggml
def test_own_q8_0_equals_ggml():
    rows = np.random.default_rng(2).standard_normal((5, 512), np.float32)
    assert np.array_equal(encode(BY_NAME["Q8_0"], rows), ggml.encode(BY_NAME["Q8_0"], rows))


@needs_ggml
@pytest.mark.parametrize(
    ("name", "error"),
    [("Q4_0", 0.1), ("Q5_1", 0.05), ("Q4_K", 0.08), ("Q6_K", 0.02), ("Q2_K", 0.3), ("IQ4_XS", 0.09)],
)
def test_ggml_types_decode_to_the_weights(name, error):
    rows = np.random.default_rng(3).standard_normal((4, 1024), np.float32)
    decoded = gguf.quants.dequantize(encode(BY_NAME[name], rows), GGMLQuantizationType[name])
    relative = np.sqrt(((decoded - rows) ** 2).mean() / (rows**2).mean())
    assert 0.5 * error < relative < error


@needs_ggml
@pytest.mark.parametrize(("name", "word"), [("IQ2_XXS", "importance"), ("IQ1_S", "importance")])
def test_types_that_would_end_the_process_are_refused(name, word):
    with pytest.raises(KimiLiteError, match=word):
        find_layout(name)


@needs_ggml
def test_ggml_refuses_what_is_not_finite():
    with pytest.raises(KimiLiteError, match="not finite"):
        encode(BY_NAME["Q4_K"], np.full((1, 256), np.nan, np.float32))


def test_without_the_extra_the_message_names_it(monkeypatch):
    ggml._library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KimiLiteError, match="not installed") as caught:
        find_layout("q4_k")
    assert 'kimi-lite[ggml]"' in caught.value.hint
    assert find_layout("q8_0").name == "Q8_0"  # ours need nothing
    ggml._library.cache_clear()


def test_an_unknown_type_is_refused_with_the_known_ones():
    with pytest.raises(KimiLiteError, match="no type 'q9_9'") as caught:
        find_layout("q9_9")
    assert "Q8_0" in caught.value.hint


def test_the_types_that_need_no_ggml_are_those_with_an_encoder_here():
    """`plan` says so of a recipe before anything is downloaded."""
    own = {name for name in BY_NAME if BY_NAME[name].encoder in ("floats", "q8_0", "ternary", "two_bits")}
    assert own == OWN_TYPES == {"F32", "F16", "BF16", "Q8_0", "TQ1_0", "TQ2_0", "Q2_0", "LITE2_128"}
    assert own > codecs.EXACT_TYPES == {"F32", "F16", "BF16", "Q8_0"}
