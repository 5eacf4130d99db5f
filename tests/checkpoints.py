"""Small random Hugging Face checkpoints of the deepseek family, and the `transformers` model each of them decodes to.

The parity fixtures: a test writes one, converts it with `quantize.convert.convert`, and compares our forward pass or
llama.cpp's with the returned model. Weights are large enough for every part to matter (experts differ, the router bias
changes choices, norms are not ones), rows are multiples of 32, and of 256 where the real model's are.
"""

import json
from pathlib import Path

from tests.checkpoint_formats import write_fp8, write_int4, write_plain
from tests.checkpoint_tokenizers import write_kimi_tokenizer, write_tokenizer_json

VOCAB_SIZE = 512
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 480,
    "eos_token_id": 482,
    "pad_token_id": 511,
}


def _yarn(theta: float, factor: float, mscale: float, beta_fast: float = 32.0) -> dict:
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 32,
    }


_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 50000.0}
_DEEPSEEK = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1280,
}
_KINDS: dict[str, dict] = {
    # Kimi K2: low-rank queries, YaRN, sigmoid router with a selection bias, one group
    "kimi": {"rope_parameters": _yarn(50000.0, 64.0, 1.0)},
    # Kimi K2.5: the same inside `text_config`, tensors under `language_model.`, routed experts INT4, a vision tensor to
    # skip
    "kimi_int4": {"rope_parameters": _yarn(50000.0, 64.0, 1.0)},
    # Moonlight: one plain query projection, no YaRN, two shared experts
    "moonlight": {
        "q_lora_rank": None,
        "rope_parameters": _PLAIN_ROPE,
        "n_shared_experts": 2,
        "routed_scaling_factor": 2.446,
    },
    # DeepSeek-V3: four groups of experts of which two are used, two dense layers
    "deepseek_v3": {
        "rope_parameters": _yarn(10000.0, 40.0, 1.0),
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 2,
        "moe_intermediate_size": 64,
        **_DEEPSEEK,
    },
    # the same stored as block FP8, with blocks that the matrices do not fill
    "deepseek_v3_fp8": {
        "rope_parameters": _yarn(10000.0, 40.0, 1.0),
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 2,
        "moe_intermediate_size": 160,
        **_DEEPSEEK,
    },
    # DeepSeek-V2-Lite: softmax router, weights not normalised, mscale below one
    "deepseek_v2": {
        "q_lora_rank": None,
        "rope_parameters": _yarn(10000.0, 40.0, 0.707),
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        **_DEEPSEEK,
    },
}
KINDS = tuple(_KINDS)


def make_checkpoint(
    path: Path, kind: str, *, num_layers: int | None = None, dtype: str = "bfloat16", seed: int = 0, **sizes
):
    """Writes a checkpoint of `kind` (one of KINDS) into the folder `path`; returns the transformers model in float32.

    The returned model's weights are exactly what the files decode to: rounded to `dtype` ("float32", "bfloat16",
    "float16"), to INT4 groups of 32 or to FP8 blocks. llama.cpp takes a model without low-rank queries only with 27
    layers: pass num_layers=27 for those. `sizes` overrides fields of config.json. All norms use rms_norm_eps, as
    llama.cpp and vLLM do.
    """
    config = _make_config(kind, num_layers, sizes)
    model = _make_model(config, dtype, seed)
    path.mkdir(parents=True, exist_ok=True)
    if kind == "kimi_int4":
        write_int4(path, model)
    elif kind == "deepseek_v3_fp8":
        write_fp8(path, model)
    else:
        write_plain(path, model, dtype)
    if kind in ("kimi", "kimi_int4", "moonlight"):
        write_kimi_tokenizer(path, config.vocab_size)
    else:
        write_tokenizer_json(path, "deepseek-llm" if kind == "deepseek_v2" else "deepseek-v3", config.vocab_size)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    (path / "generation_config.json").write_text(json.dumps(ids))
    return model


def _make_config(kind: str, num_layers: int | None, sizes: dict):
    from transformers import DeepseekV2Config, DeepseekV3Config

    fields = _SIZES | _KINDS[kind] | sizes
    if num_layers is not None:
        fields["num_hidden_layers"] = num_layers
    if kind == "deepseek_v2":
        return DeepseekV2Config(**fields)
    return DeepseekV3Config(**fields, num_mtp_layers=0)


def _make_model(config, dtype: str, seed: int):
    """Random weights of a size that keeps activations near one and every token's routing different."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _randomise(name, weight, generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1, generator=generator)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)).float())
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = config.rms_norm_eps
    return model.requires_grad_(False)


def _randomise(name: str, weight, generator) -> None:
    if name.endswith("norm.weight"):
        weight.normal_(1.0, 0.2, generator=generator)
    elif "embed_tokens" in name:
        weight.normal_(0.0, 1.0, generator=generator)
    else:
        weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
