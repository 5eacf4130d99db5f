"""config.json of a deepseek-family checkpoint: the text model's fields, whether nested or not, checked and completed.

What a missing field means is what the model's own code does; what the GGUF architecture cannot express is refused here,
before any weight is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from kimi_lite.errors import KimiLiteError

_SIGMOID_TYPES = ("deepseek_v3", "kimi_k2")  # these route by sigmoid and normalise unless they say otherwise
_SOFTMAX_TYPES = ("deepseek_v2",)
_OUTER_TYPES = ("kimi_k25", "kimi_vl")  # the text model is in `text_config`
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts",
    "num_experts_per_tok", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip
_FAMILY_HINT = "Kimi K2 to K2.6, Kimi-VL's text model, Moonlight, DeepSeek-V2-Lite, V3 and R1 can be converted."


def read_config(folder: Path) -> dict:
    """The text model's fields. Raises KimiLiteError where config.json is missing, of another family, or not
    expressible."""
    file = folder / "config.json"
    if not file.is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise KimiLiteError(
            f"{folder} {what}.", "Name the folder of a Hugging Face checkpoint: config.json, weights, tokenizer."
        )
    try:
        outer = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KimiLiteError(f"{file} is not JSON: {error}.", "Download it again.") from error
    config = outer | (outer.get("text_config") or {})
    _check_family(file, outer, config)
    missing = [field for field in _REQUIRED if not config.get(field)]
    if missing:
        raise KimiLiteError(f"{file} lacks {', '.join(missing)}.", _FAMILY_HINT)
    config = _complete(config)
    _check_expressible(file, config)
    return config


def _check_family(file: Path, outer: Mapping, config: Mapping) -> None:
    known = (*_SIGMOID_TYPES, *_SOFTMAX_TYPES)
    kind, inner = outer.get("model_type"), config.get("model_type")
    if kind not in known and not (kind in _OUTER_TYPES and inner in known):
        named = f"{kind!r}" if kind == inner else f"{kind!r} around {inner!r}"
        raise KimiLiteError(f"{file} is a model of type {named}.", _FAMILY_HINT)


def _complete(config: dict) -> dict:
    is_sigmoid = config["model_type"] in _SIGMOID_TYPES
    defaults = {
        "scoring_func": "sigmoid" if is_sigmoid else "softmax",
        "norm_topk_prob": is_sigmoid,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
    }
    return config | {field: value for field, value in defaults.items() if config.get(field) is None}


def _check_expressible(file: Path, config: Mapping) -> None:
    """Raises KimiLiteError for what a deepseek2 GGUF has no key for."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    is_yarn = "yarn" in (rope.get("rope_type"), rope.get("type"))
    refusals = {
        "attention_bias": bool(config.get("attention_bias")),
        "moe_layer_freq": config.get("moe_layer_freq", 1) != 1,
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "rope_interleave": config.get("rope_interleave", True) is False,
        "scoring_func": config["scoring_func"] not in ("sigmoid", "softmax"),
        "topk_method": config.get("topk_method") == "group_limited_greedy" and config["n_group"] > 1,
        "mscale": is_yarn and not (rope.get("mscale") and rope.get("mscale") == rope.get("mscale_all_dim")),
    }
    for field, is_refused in refusals.items():
        if is_refused:
            value = rope.get(field) if field == "mscale" else config.get(field)
            raise KimiLiteError(f"{file} has {field} = {value!r}, which a deepseek2 GGUF cannot say.", _FAMILY_HINT)
