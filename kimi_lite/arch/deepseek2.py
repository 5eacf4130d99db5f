"""The `deepseek2` architecture as a table: Kimi K2 to K2.6, Moonlight, Kimi-VL's language model, DeepSeek-V2-Lite, V3
and R1.

Key names and types are llama.cpp's (llama-arch.cpp, gguf-py), the meaning of a missing key is what its loader does
(models/deepseek2.cpp); config.json's fields and their defaults are those of the models' own code. Rotary positions and
the head sizes are kinds of their own: `arch.rope` and `arch.mla`.
"""

from kimi_lite.arch.architecture import REQUIRED, Architecture, Field, Row

_MAX_LAYERS, _MAX_WIDTH, _MAX_EXPERTS = 1024, 1 << 20, 65_536  # far beyond what exists: more is damage
_MAX_VOCAB, _MAX_CONTEXT = 1 << 24, 1 << 30
_SIGMOID = {"scoring_func": "sigmoid", "norm_topk_prob": True}
_SOFTMAX = {"scoring_func": "softmax", "norm_topk_prob": False}


def _default_gating(values: dict) -> str:
    """Files older than the gating key are softmax, but for GLM-4.7-Flash, which llama.cpp knows by its size."""
    return "sigmoid" if values["num_layers"] in (47, 48) and values["vocab_size"] == 154_880 else "softmax"


def _if_experts(values: dict) -> object:
    """A model without experts need not say anything about them."""
    return REQUIRED if values["num_experts"] else 0


def _one_if_experts(values: dict) -> int:
    return 1 if values["num_experts"] else 0


FIELDS = (
    Field("vocab_size", "vocab_size", "vocab_size", high=_MAX_VOCAB),
    Field("num_layers", "block_count", "num_hidden_layers", high=_MAX_LAYERS),
    Field("hidden_size", "embedding_length", "hidden_size", high=_MAX_WIDTH),
    Field("feed_forward_size", "feed_forward_length", "intermediate_size", high=_MAX_WIDTH),
    Field("num_dense_layers", "leading_dense_block_count", "first_k_dense_replace", low=0,
          high=lambda values: values["num_layers"], missing=0),
    Field("num_experts", "expert_count", "n_routed_experts", low=0, high=_MAX_EXPERTS, missing=0),
    Field("num_experts_used", "expert_used_count", "num_experts_per_tok", low=_one_if_experts, high=_MAX_EXPERTS,
          missing=_if_experts),
    Field("num_shared_experts", "expert_shared_count", "n_shared_experts", low=0, high=_MAX_EXPERTS,
          missing=_if_experts),
    Field("expert_feed_forward_size", "expert_feed_forward_length", "moe_intermediate_size", low=_one_if_experts,
          high=_MAX_WIDTH, missing=_if_experts),
    Field("expert_weights_scale", "expert_weights_scale", "routed_scaling_factor", "number", low=0, high=1e6,
          missing=1.0, off=0.0),
    Field("is_expert_weights_norm", "expert_weights_norm", "norm_topk_prob", "flag", missing=False),
    Field("expert_gating", "expert_gating_func", "scoring_func", "choice", missing=_default_gating, off=0,
          choices={1: "softmax", 2: "sigmoid"}),
    Field("num_expert_groups", "expert_group_count", "n_group", low=0, high=_MAX_EXPERTS, missing=1, off=0),
    Field("num_expert_groups_used", "expert_group_used_count", "topk_group", low=0, high=_MAX_EXPERTS,
          missing=lambda values: 1 if values["num_expert_groups"] == 1 else REQUIRED),
    Field("rms_norm_eps", "attention.layer_norm_rms_epsilon", "rms_norm_eps", "number", low=1e-12, high=0.1),
    Field("context_length", "context_length", "max_position_embeddings", high=_MAX_CONTEXT),
)  # fmt: skip


def _experts(part: str, shape: tuple[str, ...], stacked: tuple[str, int, int]) -> Row:
    weight = f"mlp.experts.{{expert}}.{part}_proj.weight"
    return Row(f"ffn_{part}_exps.weight", ("num_experts", *shape), weight, "routed", "moe", cut="experts",
               stacked=stacked)  # fmt: skip


_SHARED_SIZE = "num_shared_experts * expert_feed_forward_size"
_GATE_UP = "mlp.experts.gate_up_proj"
ROWS = (
    Row("token_embd.weight", ("vocab_size", "hidden_size"), "model.embed_tokens.weight", "embedding", "none"),
    Row("output_norm.weight", ("hidden_size",), "model.norm.weight", "norm", "none", is_exact=True),
    Row("output.weight", ("vocab_size", "hidden_size"), "lm_head.weight", "head", "none"),
    Row("attn_norm.weight", ("hidden_size",), "input_layernorm.weight", "norm", is_exact=True),
    Row("attn_kv_a_mqa.weight", ("kv_latent_size", "hidden_size"), "self_attn.kv_a_proj_with_mqa.weight", "attention"),
    Row("attn_kv_a_norm.weight", ("kv_lora_rank",), "self_attn.kv_a_layernorm.weight", "attention", is_exact=True),
    Row("attn_output.weight", ("hidden_size", "num_heads * v_head_dim"), "self_attn.o_proj.weight", "attention"),
    Row("ffn_norm.weight", ("hidden_size",), "post_attention_layernorm.weight", "norm", is_exact=True),
    Row("attn_q_a.weight", ("q_lora_rank", "hidden_size"), "self_attn.q_a_proj.weight", "attention",
        when="q_lora_rank"),
    Row("attn_q_a_norm.weight", ("q_lora_rank",), "self_attn.q_a_layernorm.weight", "attention", when="q_lora_rank",
        is_exact=True),
    Row("attn_q_b.weight", ("num_heads * qk_head_dim", "q_lora_rank"), "self_attn.q_b_proj.weight", "attention",
        when="q_lora_rank"),
    Row("attn_q.weight", ("num_heads * qk_head_dim", "hidden_size"), "self_attn.q_proj.weight", "attention",
        when="not q_lora_rank"),
    Row("ffn_gate.weight", ("feed_forward_size", "hidden_size"), "mlp.gate_proj.weight", "dense", "dense"),
    Row("ffn_up.weight", ("feed_forward_size", "hidden_size"), "mlp.up_proj.weight", "dense", "dense"),
    Row("ffn_down.weight", ("hidden_size", "feed_forward_size"), "mlp.down_proj.weight", "dense", "dense"),
    Row("ffn_gate_shexp.weight", (_SHARED_SIZE, "hidden_size"), "mlp.shared_experts.gate_proj.weight", "shared", "moe",
        when="num_shared_experts"),
    Row("ffn_up_shexp.weight", (_SHARED_SIZE, "hidden_size"), "mlp.shared_experts.up_proj.weight", "shared", "moe",
        when="num_shared_experts"),
    Row("ffn_down_shexp.weight", ("hidden_size", _SHARED_SIZE), "mlp.shared_experts.down_proj.weight", "shared", "moe",
        when="num_shared_experts"),
    Row("ffn_gate_inp.weight", ("num_experts", "hidden_size"), "mlp.gate.weight", "router", "moe", is_exact=True),
    Row("exp_probs_b.bias", ("num_experts",), "mlp.gate.e_score_correction_bias", "router", "moe",
        when="has_selection_bias", is_exact=True, is_optional=True),
    Row("attn_k_b.weight", ("num_heads", "kv_lora_rank", "qk_nope_head_dim"), "self_attn.kv_b_proj.weight",
        "attention", cut="keys"),
    Row("attn_v_b.weight", ("num_heads", "v_head_dim", "kv_lora_rank"), "self_attn.kv_b_proj.weight", "attention",
        cut="values"),
    _experts("gate", ("expert_feed_forward_size", "hidden_size"), (_GATE_UP, 0, 2)),
    _experts("up", ("expert_feed_forward_size", "hidden_size"), (_GATE_UP, 1, 2)),
    _experts("down", ("hidden_size", "expert_feed_forward_size"), ("mlp.experts.down_proj", 0, 1)),
    # older and newer spellings that files have
    Row("attn_kv_b.weight", ("num_heads * kv_head_dim", "kv_lora_rank"), "", "attention",
        cut="keys and values",
        replaces=("attn_k_b.weight", "attn_v_b.weight")),
    Row("ffn_gate_up_exps.weight", ("num_experts", "2 * expert_feed_forward_size", "hidden_size"), "", "routed", "moe",
        replaces=("ffn_gate_exps.weight", "ffn_up_exps.weight")),
)  # fmt: skip

DEEPSEEK2 = Architecture(
    name="deepseek2",
    family="Kimi K2, K2-Thinking, K2.5, K2.6, Moonlight, Kimi-VL, DeepSeek-V2-Lite, V3 and R1",
    attention="mla",
    fields=FIELDS,
    rows=ROWS,
    model_types={"deepseek_v3": _SIGMOID, "kimi_k2": _SIGMOID, "deepseek_v2": _SOFTMAX},
    wrappers=("kimi_k25", "kimi_vl"),
    fixed={
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "moe_layer_freq": (1,),
        "hidden_act": ("silu",),
        "rope_interleave": (True,),
    },
    neutral={
        "attention.causal": (True,),
        "attention.clamp_kqv": (0.0,),
        "attention.max_alibi_bias": (0.0,),
        "attention.scale": (0.0,),
        "attention.sliding_window": (0,),
        "attention.temperature_scale": (0.0,),
        "attn_logit_softcapping": (0.0,),
        "embedding_scale": (0.0, 1.0),
        "final_logit_softcapping": (0.0,),
        "interleave_moe_layer_step": (0, 1),
        "logit_scale": (0.0, 1.0),
        "moe_every_n_layers": (0, 1),
        "residual_scale": (0.0, 1.0),
        "rope.scaling.yarn_attn_factor": (1.0,),
        "rope.scaling.yarn_ext_factor": (1.0, -1.0),
        "swiglu_clamp_exp": (0.0,),
        "use_parallel_residual": (False,),
    },
    unused={
        r"blk\.\d+\.attn_rot_embd\.weight": "rotary frequencies are computed from the metadata",
    },
    unused_weights={r".*\.rotary_emb\.inv_freq": "rotary frequencies are computed from config.json"},
)
