"""Rotary frequencies against the values of the original models' code."""

import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.rope import rope_attention_factor, rope_inverse_frequencies
from tests.model.family import FAMILY, family_metadata

PAIRS = [0, 1, 8, 9, 14, 19, 20, 31]
_K25 = [1, 0.713111085, 0.0668740305, 0.043776656, 0.00446584875, 0.000158374991, 1.80702339e-05, 4.38220646e-07]
_THINKING = [1, 0.713111085, 0.0668740305, 0.0476886124, 0.00879428677, 0.00162175991, 1.80702339e-05, 4.38220646e-07]
_INSTRUCT = [1, 0.713111085, 0.0668740305, 0.0476886124, 0.00879428677, 0.00162175991, 3.61404677e-05, 8.76441291e-07]
_DEEPSEEK = [1, 0.749894209, 0.1, 0.0749894209, 0.0124479559, 0.00137051364, 0.000790569415, 3.33380358e-06]
REFERENCE = {
    "K2.5": _K25, "K2.6": _K25, "K2-Thinking": _THINKING, "K2-Instruct": _INSTRUCT, "DeepSeek-V3": _DEEPSEEK,
    "DeepSeek-V2-Lite": _DEEPSEEK,
}  # fmt: skip


def config_of(model: str, **changes) -> ModelConfig:
    return ModelConfig.from_metadata(family_metadata(model, **changes))


@pytest.mark.parametrize("model", REFERENCE)
def test_yarn_reference_values(model):
    frequencies = rope_inverse_frequencies(config_of(model))
    assert (frequencies.shape, frequencies.dtype) == ((32,), np.float64)
    np.testing.assert_allclose(frequencies[PAIRS], REFERENCE[model], rtol=5e-9)


@pytest.mark.parametrize(("model", "base"), [("Moonlight", 50_000), ("Kimi-VL", 800_000)])
def test_plain(model, base):
    want = [base ** (-2 * i / 64) for i in range(32)]
    np.testing.assert_allclose(rope_inverse_frequencies(config_of(model)), want, rtol=1e-14)


def test_linear_divides_every_frequency():
    plain, linear = config_of("Moonlight"), config_of("Moonlight", rope__scaling__factor=8.0)
    np.testing.assert_allclose(rope_inverse_frequencies(linear) * 8, rope_inverse_frequencies(plain), rtol=1e-15)


def test_yarn_of_factor_one_changes_nothing():
    plain, yarn = config_of("K2.5", rope__scaling__type="none"), config_of("K2.5", rope__scaling__factor=1.0)
    np.testing.assert_allclose(rope_inverse_frequencies(yarn), rope_inverse_frequencies(plain), rtol=1e-15)
    assert yarn.softmax_scale == plain.softmax_scale
    assert rope_attention_factor(yarn) == 1


@pytest.mark.parametrize("model", FAMILY)
def test_cos_and_sin_are_not_scaled_in_the_family(model):
    assert rope_attention_factor(config_of(model)) == 1


def test_cos_and_sin_are_scaled_without_the_multiplier():
    config = config_of("K2.5", rope__scaling__yarn_log_multiplier=None)
    assert rope_attention_factor(config) == pytest.approx(1.41588831, rel=1e-8)


@pytest.mark.parametrize("model", ["K2.5", "K2-Thinking", "K2-Instruct", "DeepSeek-V3"])
def test_same_as_transformers(model):
    """The library computes in float32, so six digits are what the two can share."""
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    config = config_of(model)
    parameters = {
        "rope_type": "yarn", "rope_theta": config.rope.freq_base, "factor": config.rope.factor,
        "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": config.rope.beta_fast, "beta_slow": config.rope.beta_slow,
        "original_max_position_embeddings": config.rope.original_context_length,
    }  # fmt: skip
    theirs = transformers.DeepseekV3Config(rope_parameters=parameters, max_position_embeddings=config.context_length)
    frequencies, factor = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    np.testing.assert_allclose(rope_inverse_frequencies(config), frequencies.numpy(), rtol=2e-6)
    assert rope_attention_factor(config) == pytest.approx(factor)
