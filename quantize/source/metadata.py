"""GGUF metadata of a deepseek-family model, from the fields of its config.json: keys, and the exact type of every
value.

llama.cpp refuses a key of another type than it expects, so the types are part of the format. `quantize.convert` calls
this with a checkpoint's configuration, `kimi_lite.demo.build` with its own. Keys: llama.cpp's llama-arch.cpp.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from gguf import GGUFValueType, LlamaFileType

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.write.writer import Value

ARCHITECTURE = "deepseek2"  # what llama.cpp calls the family, Kimi K2.5 included
_GATING = {"softmax": 1, "sigmoid": 2}
_QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION
_FLOAT_TYPES = ("F32", "F16", "BF16")


def text(value: str) -> Value:
    return Value(value, GGUFValueType.STRING)


def u32(value: int) -> Value:
    return Value(int(value), GGUFValueType.UINT32)


def f32(value: float) -> Value:
    return Value(float(value), GGUFValueType.FLOAT32)


def boolean(value: bool) -> Value:
    return Value(bool(value), GGUFValueType.BOOL)


def array(values: Sequence[str] | Sequence[int] | np.ndarray) -> Value:
    """Strings, or integers as i32: the two kinds of array that tokenizers need."""
    element_type = GGUFValueType.STRING if isinstance(values[0], str) else GGUFValueType.INT32
    return Value(
        [value if isinstance(value, str) else int(value) for value in values], GGUFValueType.ARRAY, element_type
    )


def guess_value(value: object) -> Value:
    """The GGUF value of a tokenizer key that was read from another file: text, flag, id, or an array of texts or
    i32."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bool):
        return boolean(value)
    return u32(value) if isinstance(value, int) else array(value)


def model_metadata(config: Mapping, name: str, layout: Layout) -> dict[str, Value]:
    """The `general.*` and `deepseek2.*` keys. `config` has the fields of a text model's config.json (see
    quantize.source.config)."""
    keys = {"general.architecture": text(ARCHITECTURE), "general.type": text("model"), "general.name": text(name)}
    keys |= quantization_metadata(layout)
    model = _sizes(config) | _attention(config) | _experts(config) | _rope(config)
    return keys | {f"{ARCHITECTURE}.{key}": value for key, value in model.items()}


def quantization_metadata(layout: Layout) -> dict[str, Value]:
    """The keys that say how a file of mostly `layout` is quantized."""
    keys = {"general.file_type": u32(_file_type(layout))}
    if layout.name not in _FLOAT_TYPES:
        keys["general.quantization_version"] = u32(_QUANTIZATION_VERSION)
    return keys


def _sizes(config: Mapping) -> dict[str, Value]:
    return {
        "vocab_size": u32(config["vocab_size"]),
        "context_length": u32(config["max_position_embeddings"]),
        "block_count": u32(config["num_hidden_layers"]),
        "embedding_length": u32(config["hidden_size"]),
        "feed_forward_length": u32(config["intermediate_size"]),
    }


def _attention(config: Mapping) -> dict[str, Value]:
    """MLA as llama.cpp sees it: one key head as wide as the cached latent, and the true head sizes under `_mla`."""
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    keys = {
        "attention.head_count": u32(config["num_attention_heads"]),
        "attention.head_count_kv": u32(1),
        "attention.layer_norm_rms_epsilon": f32(config["rms_norm_eps"]),
        "attention.kv_lora_rank": u32(latent),
        "attention.key_length": u32(latent + rope),
        "attention.value_length": u32(latent),
        "attention.key_length_mla": u32(config["qk_nope_head_dim"] + rope),
        "attention.value_length_mla": u32(config["v_head_dim"]),
    }
    if config.get("q_lora_rank"):
        keys["attention.q_lora_rank"] = u32(config["q_lora_rank"])
    return keys


def _experts(config: Mapping) -> dict[str, Value]:
    return {
        "leading_dense_block_count": u32(config["first_k_dense_replace"]),
        "expert_count": u32(config["n_routed_experts"]),
        "expert_used_count": u32(config["num_experts_per_tok"]),
        "expert_shared_count": u32(config["n_shared_experts"]),
        "expert_feed_forward_length": u32(config["moe_intermediate_size"]),
        "expert_weights_scale": f32(config["routed_scaling_factor"]),
        "expert_weights_norm": boolean(config["norm_topk_prob"]),
        "expert_gating_func": u32(_GATING[config["scoring_func"]]),
        "expert_group_count": u32(config.get("n_group") or 1),
        "expert_group_used_count": u32(config.get("topk_group") or 1),
    }


def _rope(config: Mapping) -> dict[str, Value]:
    """The older `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`, which holds both."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    keys = {"rope.dimension_count": u32(config["qk_rope_head_dim"]), "rope.freq_base": f32(theta)}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return keys
    if kind not in ("linear", "yarn"):
        raise KimiLiteError(
            f"config.json asks for {kind!r} rotary positions; this program knows default, linear and yarn."
        )
    keys |= {"rope.scaling.type": text(kind), "rope.scaling.factor": f32(rope["factor"])}
    if kind == "yarn":
        keys |= {
            "rope.scaling.original_context_length": u32(rope["original_max_position_embeddings"]),
            "rope.scaling.yarn_log_multiplier": f32(0.1 * rope["mscale_all_dim"]),
            "rope.scaling.yarn_beta_fast": f32(rope.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": f32(rope.get("beta_slow") or 1),
        }
    return keys


def _file_type(layout: Layout) -> int:
    """llama.cpp's number for "mostly this type"; its K types have sizes in their names, of which S means one type
    throughout."""
    if layout.name == "F32":
        return LlamaFileType.ALL_F32
    names = (f"MOSTLY_{layout.name}", f"MOSTLY_{layout.name}_S")
    known = [LlamaFileType[name] for name in names if name in LlamaFileType.__members__]
    return known[0] if known else LlamaFileType.GUESSED
