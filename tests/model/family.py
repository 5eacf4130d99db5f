"""GGUF metadata of the real models of the family, as llama.cpp's converter writes it from their published
config.json."""

_KIMI = {
    "general.architecture": "deepseek2", "general.type": "model",
    "deepseek2.vocab_size": 163840, "deepseek2.context_length": 262144, "deepseek2.block_count": 61,
    "deepseek2.embedding_length": 7168, "deepseek2.feed_forward_length": 18432,
    "deepseek2.attention.head_count": 64, "deepseek2.attention.head_count_kv": 1,
    "deepseek2.attention.layer_norm_rms_epsilon": 1e-5, "deepseek2.attention.q_lora_rank": 1536,
    "deepseek2.attention.kv_lora_rank": 512, "deepseek2.attention.key_length": 576,
    "deepseek2.attention.value_length": 512,
    "deepseek2.attention.key_length_mla": 192, "deepseek2.attention.value_length_mla": 128,
    "deepseek2.rope.dimension_count": 64, "deepseek2.rope.freq_base": 50000.0, "deepseek2.rope.scaling.type": "yarn",
    "deepseek2.rope.scaling.factor": 64.0, "deepseek2.rope.scaling.original_context_length": 4096,
    "deepseek2.rope.scaling.yarn_log_multiplier": 0.1, "deepseek2.rope.scaling.yarn_beta_fast": 32.0,
    "deepseek2.rope.scaling.yarn_beta_slow": 1.0, "deepseek2.leading_dense_block_count": 1,
    "deepseek2.expert_count": 384, "deepseek2.expert_used_count": 8, "deepseek2.expert_shared_count": 1,
    "deepseek2.expert_feed_forward_length": 2048, "deepseek2.expert_weights_scale": 2.827,
    "deepseek2.expert_weights_norm": True, "deepseek2.expert_gating_func": 2, "deepseek2.expert_group_count": 1,
    "deepseek2.expert_group_used_count": 1,
}  # fmt: skip
_UNCOMPRESSED = {  # Moonlight's size: 27 layers, one query matrix
    "deepseek2.block_count": 27, "deepseek2.embedding_length": 2048, "deepseek2.feed_forward_length": 11264,
    "deepseek2.attention.head_count": 16, "deepseek2.attention.q_lora_rank": None, "deepseek2.expert_count": 64,
    "deepseek2.expert_used_count": 6, "deepseek2.expert_shared_count": 2, "deepseek2.expert_feed_forward_length": 1408,
    "deepseek2.expert_weights_scale": 2.446, "deepseek2.rope.scaling.type": None, "deepseek2.rope.scaling.factor": None,
    "deepseek2.rope.scaling.original_context_length": None, "deepseek2.rope.scaling.yarn_log_multiplier": None,
    "deepseek2.rope.scaling.yarn_beta_fast": None, "deepseek2.rope.scaling.yarn_beta_slow": None,
}  # fmt: skip
_DEEPSEEK_ROPE = {
    "deepseek2.rope.freq_base": 10000.0,
    "deepseek2.rope.scaling.factor": 40.0,
    "deepseek2.context_length": 163840,
}
_BEFORE_MLA = {  # llama.cpp before the absorbed tensors (pull request 12801)
    "deepseek2.attention.head_count_kv": 64, "deepseek2.attention.key_length": 192,
    "deepseek2.attention.value_length": 128,
    "deepseek2.attention.key_length_mla": None, "deepseek2.attention.value_length_mla": None,
}  # fmt: skip
_CHANGES: dict[str, dict] = {
    "K2.5": {},
    "K2.6": {},
    "K2-Thinking": {"deepseek2.rope.scaling.yarn_beta_fast": 1.0},
    "K2-Instruct": {
        "deepseek2.context_length": 131072,
        "deepseek2.attention.layer_norm_rms_epsilon": 1e-6,
        "deepseek2.rope.scaling.factor": 32.0,
        "deepseek2.rope.scaling.yarn_beta_fast": 1.0,
    },
    "Moonlight": _UNCOMPRESSED | {"deepseek2.context_length": 8192},
    "Kimi-VL": _UNCOMPRESSED | {"deepseek2.context_length": 131072, "deepseek2.rope.freq_base": 800000.0},
    "DeepSeek-V2-Lite": _UNCOMPRESSED
    | _DEEPSEEK_ROPE
    | {
        "deepseek2.vocab_size": 102400,
        "deepseek2.feed_forward_length": 10944,
        "deepseek2.attention.layer_norm_rms_epsilon": 1e-6,
        "deepseek2.expert_weights_scale": 1.0,
        "deepseek2.expert_weights_norm": None,
        "deepseek2.expert_gating_func": 1,
        "deepseek2.rope.scaling.type": "yarn",
        "deepseek2.rope.scaling.original_context_length": 4096,
        "deepseek2.rope.scaling.yarn_log_multiplier": 0.0707,
    },
    "DeepSeek-V3": _DEEPSEEK_ROPE
    | {
        "deepseek2.vocab_size": 129280,
        "deepseek2.attention.head_count": 128,
        "deepseek2.attention.layer_norm_rms_epsilon": 1e-6,
        "deepseek2.leading_dense_block_count": 3,
        "deepseek2.expert_count": 256,
        "deepseek2.expert_weights_scale": 2.5,
        "deepseek2.expert_group_count": 8,
        "deepseek2.expert_group_used_count": 4,
    },
    "K2-Instruct before MLA": _BEFORE_MLA,
}
FAMILY = tuple(_CHANGES)


def family_metadata(model: str, **changes: object) -> dict[str, object]:
    """The metadata of one model; `changes` are `deepseek2.` keys with `__` for the dot, None removes one."""
    prefixed = {f"deepseek2.{key.replace('__', '.')}": value for key, value in changes.items()}
    merged = _KIMI | {"general.name": model} | _CHANGES[model] | prefixed
    return {key: value for key, value in merged.items() if value is not None}
