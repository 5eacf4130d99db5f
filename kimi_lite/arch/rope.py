"""Rotary position frequencies: plain, linear, and YaRN as the DeepSeek-V3 model code computes it.

Pair i of the rotary dimensions (elements 2i and 2i+1) turns by `position * frequency[i]`. YaRN (Peng et al. 2023,
arXiv:2309.00071) keeps the fast pairs, divides the slow ones by the factor, and blends between. It is static: it holds
at every position, also below the original context length.
"""

import math

import numpy as np

from kimi_lite.arch.config import ModelConfig


def rope_inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair: float64 (qk_rope_head_dim / 2,)."""
    rope, dim = config.rope, config.qk_rope_head_dim
    extrapolated = rope.freq_base ** (-np.arange(0, dim, 2) / dim)  # (D/2,)
    if rope.scaling == "none":
        return extrapolated
    interpolated = extrapolated / rope.factor
    if rope.scaling == "linear":
        return interpolated
    low = max(math.floor(_pair_that_turns(rope.beta_fast, config)), 0)
    high = min(math.ceil(_pair_that_turns(rope.beta_slow, config)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)  # (D/2,) 0: as trained, 1: interpolated
    return interpolated * ramp + extrapolated * (1 - ramp)


def rope_attention_factor(config: ModelConfig) -> float:
    """What cos and sin are multiplied with: YaRN's g(factor, mscale) / g(factor, mscale_all_dim), g(s, m) = 0.1 m ln(s)
    + 1.

    GGUF keeps only mscale_all_dim (`log_multiplier`, a tenth of it). In every model of the family mscale equals it, so
    the quotient is 1; a file without the key comes from a model with mscale_all_dim 0, where mscale is 1 by default.
    """
    rope = config.rope
    if rope.scaling != "yarn" or rope.factor <= 1 or rope.log_multiplier:
        return 1.0
    return 1.0 + 0.1 * math.log(rope.factor)


def _pair_that_turns(num_turns: float, config: ModelConfig) -> float:
    """The (fractional) pair that makes `num_turns` full turns over the original context."""
    rope = config.rope
    turns_of_pair_0 = rope.original_context_length / (2 * math.pi)
    return config.qk_rope_head_dim * math.log(turns_of_pair_0 / num_turns) / (2 * math.log(rope.freq_base))
