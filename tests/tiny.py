"""A tiny random deepseek2 model in a GGUF file, so that the whole program runs in tests without a download.

    from tests.tiny import write_tiny_gguf
    write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), types={"_exps": "TQ2_0"}, hidden_size=512)

It is a Kimi K2.5 in everything but size: MLA with `attn_k_b`/`attn_v_b`, one dense layer, then sigmoid-routed experts
with a selection bias and a shared expert, YaRN, a byte-level tokenizer with Kimi's control tokens and a chat template.
The defaults are about 6 MB of F32. Written by the `gguf` package's writer, which knows nothing of our reader.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

from kimi_lite.native.layouts import BY_NAME, Layout
from tests.tiny_blocks import encode_rows
from tests.tiny_tokenizer import tokenizer_metadata

_GATING_IDS = {"softmax": 1, "sigmoid": 2}


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """Names as in ModelConfig; `types` maps ends of tensor names (".weight" may be left out) to layouts, the longest
    wins."""

    name: str = "tiny"
    num_layers: int = 3
    hidden_size: int = 256
    num_heads: int = 4
    q_lora_rank: int = 64
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    feed_forward_size: int = 128
    num_dense_layers: int = 1
    num_experts: int = 8
    num_experts_used: int = 2
    num_shared_experts: int = 1
    expert_feed_forward_size: int = 64
    expert_weights_scale: float = 2.827
    is_expert_weights_norm: bool = True
    expert_gating: str = "sigmoid"
    num_expert_groups: int = 1
    num_expert_groups_used: int = 1
    rms_norm_eps: float = 1e-5
    vocab_size: int = 300
    context_length: int = 4096
    rope_freq_base: float = 50000.0
    rope_scaling: str = "yarn"
    rope_factor: float = 64.0
    rope_original_context_length: int = 64
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_log_multiplier: float = 0.1
    is_kv_b_joined: bool = False  # files older than the MLA tensors: attn_kv_b, and 192/128-style key/value lengths
    is_tied: bool = False  # no matrix of its own for the logits
    is_gate_up_fused: bool = False  # ffn_gate_up_exps in place of ffn_gate_exps and ffn_up_exps
    max_tensors_per_shard: int = 0  # 0: one file; else PREFIX-00001-of-0000N.gguf
    types: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, object] = field(
        default_factory=dict
    )  # extra keys; str, bool, int (u32), float (f32), lists; None removes


def write_tiny_gguf(path: str | Path, rng: np.random.Generator, **config_overrides) -> Path:
    """Write a valid random model and return the file to open: `path`, or shard 1 of it if `max_tensors_per_shard`
    splits it."""
    config = TinyConfig(**config_overrides)
    path = Path(path)
    writer = gguf.GGUFWriter(path, "deepseek2", split_max_tensors=config.max_tensors_per_shard)
    metadata = model_metadata(config) | tokenizer_metadata(config.vocab_size) | dict(config.metadata)
    for key, value in metadata.items():
        if value is not None and key != "general.architecture":
            _add_key(writer, key, value)
    for name, weights in tiny_tensors(config, rng).items():
        layout = _layout_for(name, config.types)
        data = encode_rows(weights, layout, rng)
        writer.add_tensor(name, data.view(np.int8), raw_shape=weights.shape, raw_dtype=layout.ggml_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    shards = writer.format_shard_names(path)
    writer.close()
    return shards[0]


def model_metadata(config: TinyConfig) -> dict[str, object]:
    """The `general.*` and `deepseek2.*` keys that llama.cpp's converter writes for this model."""
    c, qk_head_dim = config, config.qk_nope_head_dim + config.qk_rope_head_dim
    mla = {
        "attention.head_count_kv": 1,
        "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "attention.value_length": c.kv_lora_rank,
        "attention.key_length_mla": qk_head_dim,
        "attention.value_length_mla": c.v_head_dim,
    }
    joined = {
        "attention.head_count_kv": c.num_heads,
        "attention.key_length": qk_head_dim,
        "attention.value_length": c.v_head_dim,
    }
    keys = {
        "vocab_size": c.vocab_size,
        "context_length": c.context_length,
        "block_count": c.num_layers,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.feed_forward_size,
        "attention.head_count": c.num_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.q_lora_rank": c.q_lora_rank or None,
        "attention.kv_lora_rank": c.kv_lora_rank,
        **(joined if c.is_kv_b_joined else mla),
        "leading_dense_block_count": c.num_dense_layers,
        "expert_count": c.num_experts,
        "expert_used_count": c.num_experts_used,
        "expert_shared_count": c.num_shared_experts,
        "expert_feed_forward_length": c.expert_feed_forward_size,
        "expert_weights_scale": float(c.expert_weights_scale),
        "expert_weights_norm": c.is_expert_weights_norm,
        "expert_gating_func": _GATING_IDS[c.expert_gating],
        "expert_group_count": c.num_expert_groups,
        "expert_group_used_count": c.num_expert_groups_used,
        **_rope_metadata(c),
    }
    return {"general.type": "model", "general.name": c.name} | {
        f"deepseek2.{key}": value for key, value in keys.items()
    }


def _rope_metadata(c: TinyConfig) -> dict[str, object]:
    plain = {"rope.dimension_count": c.qk_rope_head_dim, "rope.freq_base": c.rope_freq_base}
    if c.rope_scaling == "none":
        return plain
    scaled = plain | {"rope.scaling.type": c.rope_scaling, "rope.scaling.factor": c.rope_factor}
    if c.rope_scaling == "linear":
        return scaled
    return scaled | {
        "rope.scaling.original_context_length": c.rope_original_context_length,
        "rope.scaling.yarn_log_multiplier": c.rope_log_multiplier,
        "rope.scaling.yarn_beta_fast": c.rope_beta_fast,
        "rope.scaling.yarn_beta_slow": c.rope_beta_slow,
    }


def tiny_tensors(config: TinyConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Every tensor as float32 in numpy order (last axis = input): matrices N(0, 1/inputs), norms about one."""
    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, *shape: int) -> None:
        tensors[f"{name}.weight"] = (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"] = (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    c = config
    tensors["token_embd.weight"] = rng.standard_normal((c.vocab_size, c.hidden_size)).astype(np.float32)
    norm("output_norm", c.hidden_size)
    if not c.is_tied:
        matrix("output", c.vocab_size, c.hidden_size)
    for layer in range(c.num_layers):
        _add_attention(f"blk.{layer}", c, matrix, norm)
        norm(f"blk.{layer}.ffn_norm", c.hidden_size)
        if layer < c.num_dense_layers:
            _add_feed_forward(f"blk.{layer}", "", (), c.feed_forward_size, c, matrix)
        else:
            _add_experts(f"blk.{layer}", c, matrix)
            if c.expert_gating == "sigmoid":
                tensors[f"blk.{layer}.exp_probs_b.bias"] = (0.1 * rng.standard_normal(c.num_experts)).astype(np.float32)
    return tensors


def _add_attention(block: str, c: TinyConfig, matrix, norm) -> None:
    qk_head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
    norm(f"{block}.attn_norm", c.hidden_size)
    if c.q_lora_rank:
        matrix(f"{block}.attn_q_a", c.q_lora_rank, c.hidden_size)
        norm(f"{block}.attn_q_a_norm", c.q_lora_rank)
        matrix(f"{block}.attn_q_b", c.num_heads * qk_head_dim, c.q_lora_rank)
    else:
        matrix(f"{block}.attn_q", c.num_heads * qk_head_dim, c.hidden_size)
    matrix(f"{block}.attn_kv_a_mqa", c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size)
    norm(f"{block}.attn_kv_a_norm", c.kv_lora_rank)
    if c.is_kv_b_joined:
        matrix(f"{block}.attn_kv_b", c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    else:
        matrix(f"{block}.attn_k_b", c.num_heads, c.kv_lora_rank, c.qk_nope_head_dim)
        matrix(f"{block}.attn_v_b", c.num_heads, c.v_head_dim, c.kv_lora_rank)
    matrix(f"{block}.attn_output", c.hidden_size, c.num_heads * c.v_head_dim)


def _add_experts(block: str, c: TinyConfig, matrix) -> None:
    matrix(f"{block}.ffn_gate_inp", c.num_experts, c.hidden_size)
    if c.is_gate_up_fused:
        matrix(f"{block}.ffn_gate_up_exps", c.num_experts, 2 * c.expert_feed_forward_size, c.hidden_size)
        matrix(f"{block}.ffn_down_exps", c.num_experts, c.hidden_size, c.expert_feed_forward_size)
    else:
        _add_feed_forward(block, "_exps", (c.num_experts,), c.expert_feed_forward_size, c, matrix)
    if c.num_shared_experts:
        _add_feed_forward(block, "_shexp", (), c.num_shared_experts * c.expert_feed_forward_size, c, matrix)


def _add_feed_forward(block: str, suffix: str, experts: tuple[int, ...], size: int, c: TinyConfig, matrix) -> None:
    matrix(f"{block}.ffn_gate{suffix}", *experts, size, c.hidden_size)
    matrix(f"{block}.ffn_up{suffix}", *experts, size, c.hidden_size)
    matrix(f"{block}.ffn_down{suffix}", *experts, c.hidden_size, size)


def _layout_for(name: str, types: Mapping[str, str]) -> Layout:
    """F32 unless `types` names an end of the name: "attn_output", "_exps", "blk.1.ffn_up_exps", "_shexp.weight"."""
    matches = [suffix for suffix in types if name.endswith((suffix, f"{suffix}.weight"))]
    return BY_NAME[types[max(matches, key=len)]] if matches else BY_NAME["F32"]


def _add_key(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """The GGUF value type that llama.cpp expects for a Python value: u32 for int, f32 for float."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
