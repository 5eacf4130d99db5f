"""Rotary position frequencies: plain, linear, and YaRN as the DeepSeek-V3 model code computes it.

Pair i of the rotary dimensions (elements 2i and 2i+1) turns by `position * frequency[i]`. YaRN (Peng et al. 2023,
arXiv:2309.00071) keeps the fast pairs, divides the slow ones by the factor, and blends between. It is static: it holds
at every position, also below the original context length.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from kimi_lite.arch.reader import Reader, shown
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import Value, f32, text, u32

if TYPE_CHECKING:
    from kimi_lite.arch.config import ModelConfig

_SCALING = {"none": "none", "linear": "linear", "yarn": "yarn"}
_MAX_CONTEXT = 1 << 30


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position encoding; everything after `scaling` matters only for the scaling that uses it."""

    freq_base: float
    scaling: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0
    original_context_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    log_multiplier: float = 0.0  # 0.1 * mscale_all_dim of the original config.json


def read_metadata(read: Reader) -> RopeConfig:
    """The scaling keys as llama.cpp reads them, but for YaRN's betas, which it ignores and the original model code does
    not. Raises KimiLiteError."""
    freq_base = read.number("rope.freq_base", 1.0001, 1e12, default=10_000.0)
    factor = read.number("rope.scaling.factor", 0, 1e6, default=0.0) or 1.0  # 0 says "off"
    scaling = read.choice("rope.scaling.type", _SCALING, default="linear")
    if scaling == "none" or (scaling == "linear" and factor == 1):
        return RopeConfig(freq_base)
    if scaling == "linear":
        return RopeConfig(freq_base, "linear", factor)
    if (attention_factor := read.number("rope.scaling.attn_factor", -1e6, 1e6, default=1.0)) != 1:
        raise read.error("rope.scaling.attn_factor", attention_factor, "1, as in every model of the family")
    return RopeConfig(
        freq_base,
        "yarn",
        read.number("rope.scaling.factor", 1, 1e6),
        read.integer("rope.scaling.original_context_length", 1, _MAX_CONTEXT),
        beta_fast=read.number("rope.scaling.yarn_beta_fast", 1e-6, 1e6, default=32.0),
        beta_slow=read.number("rope.scaling.yarn_beta_slow", 1e-6, 1e6, default=1.0),
        log_multiplier=read.number("rope.scaling.yarn_log_multiplier", 0, 1e3, default=0.0),
    )


def read_json(fields: Mapping[str, object], source: str, hint: str) -> RopeConfig:
    """The older `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`, which holds both. Raises
    KimiLiteError, also for what a GGUF file has no key for."""
    name = next((name for name in ("rope_parameters", "rope_scaling") if fields.get(name)), "rope_scaling")
    inner = fields.get(name) or {}
    if not isinstance(inner, Mapping):
        raise KimiLiteError(f"{source}: {name} is {shown(inner)}, and must be an object.", hint)
    rope = Reader(inner, "", f"{source}, {name}", hint, is_null_missing=True)
    plain = Reader(fields, "", source, hint, is_null_missing=True)
    freq_base = (rope if rope.has("rope_theta") else plain).number("rope_theta", 1.0001, 1e12, default=10_000.0)
    kind = rope.text("rope_type" if rope.has("rope_type") else "type", default="default")
    if kind == "default":
        return RopeConfig(freq_base)
    if kind not in ("linear", "yarn"):
        problem = f"{source} asks for {shown(kind)} rotary positions"
        raise KimiLiteError(f"{problem}; this program knows default, linear and yarn.", hint)
    if kind == "linear":
        return RopeConfig(freq_base, "linear", rope.number("factor", 1e-6, 1e6))
    mscale_all_dim = rope.number("mscale_all_dim", 0, 1e4, default=0.0)
    mscale = rope.number("mscale", 0, 1e4, default=0.0)
    if not mscale or mscale != mscale_all_dim:
        problem = f"{source} has mscale = {mscale!r} and mscale_all_dim = {mscale_all_dim!r}"
        raise KimiLiteError(f"{problem}, which a GGUF file cannot say.", hint)
    attention_factor = rope.number("attention_factor", -1e6, 1e6, default=1.0)
    if attention_factor != 1:
        raise rope.error("attention_factor", attention_factor, "1: a GGUF file cannot say another")
    return RopeConfig(
        freq_base,
        "yarn",
        rope.number("factor", 1, 1e6),
        rope.integer("original_max_position_embeddings", 1, _MAX_CONTEXT),
        rope.number("beta_fast", 0, 1e6, default=32.0) or 32.0,
        rope.number("beta_slow", 0, 1e6, default=1.0) or 1.0,
        0.1 * mscale_all_dim,
    )


def metadata(config: "ModelConfig") -> dict[str, Value]:
    """GGUF keys below the architecture's prefix."""
    rope = config.rope
    keys = {"rope.dimension_count": u32(config.qk_rope_head_dim), "rope.freq_base": f32(rope.freq_base)}
    if rope.scaling != "none":
        keys |= {"rope.scaling.type": text(rope.scaling), "rope.scaling.factor": f32(rope.factor)}
    if rope.scaling == "yarn":
        keys |= {
            "rope.scaling.original_context_length": u32(rope.original_context_length),
            "rope.scaling.yarn_log_multiplier": f32(rope.log_multiplier),
            "rope.scaling.yarn_beta_fast": f32(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": f32(rope.beta_slow),
        }
    return keys


def json_fields(rope: RopeConfig) -> dict[str, object]:
    """The same in config.json's words, as the models of the family are published."""
    keys: dict[str, object] = {"rope_theta": rope.freq_base}
    if rope.scaling == "linear":
        return keys | {"rope_scaling": {"type": "linear", "factor": rope.factor}}
    if rope.scaling == "none":
        return keys
    scaling = {"type": "yarn", "factor": rope.factor, "original_max_position_embeddings": rope.original_context_length}
    scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    mscale = 10 * rope.log_multiplier
    return keys | {"rope_scaling": scaling | {"mscale": mscale, "mscale_all_dim": mscale}}


def rope_inverse_frequencies(config: "ModelConfig") -> np.ndarray:
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


def rope_attention_factor(config: "ModelConfig") -> float:
    """What cos and sin are multiplied with: YaRN's g(factor, mscale) / g(factor, mscale_all_dim), g(s, m) = 0.1 m ln(s)
    + 1.

    GGUF keeps only mscale_all_dim (`log_multiplier`, a tenth of it). In every model of the family mscale equals it, so
    the quotient is 1; a file without the key comes from a model with mscale_all_dim 0, where mscale is 1 by default.
    """
    rope = config.rope
    if rope.scaling != "yarn" or rope.factor <= 1 or rope.log_multiplier:
        return 1.0
    return 1.0 + 0.1 * math.log(rope.factor)


def _pair_that_turns(num_turns: float, config: "ModelConfig") -> float:
    """The (fractional) pair that makes `num_turns` full turns over the original context."""
    rope = config.rope
    turns_of_pair_0 = rope.original_context_length / (2 * math.pi)
    return config.qk_rope_head_dim * math.log(turns_of_pair_0 / num_turns) / (2 * math.log(rope.freq_base))
