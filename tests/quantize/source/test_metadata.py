"""Keys, values and exact value types of the GGUF files, for K2.5's published config.json and for each kind of
checkpoint."""

import json
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFValueType

from kimi_lite.arch.checkpoint import read_checkpoint_config
from kimi_lite.arch.config import ModelConfig
from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.convert import convert
from kimi_lite.quantize.source.metadata import model_metadata
from tests.checkpoints import KINDS, make_checkpoint

KIMI = Path(__file__).parents[3] / "../shared/data/kimi-tokenizer"
U32, F32, TEXT, BOOL = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.BOOL
K2_5 = {
    "vocab_size": (U32, 163840), "context_length": (U32, 262144), "block_count": (U32, 61), "embedding_length": (U32,
    7168),
    "feed_forward_length": (U32, 18432), "attention.head_count": (U32, 64), "attention.head_count_kv": (U32, 1),
    "attention.layer_norm_rms_epsilon": (F32, 1e-5), "attention.q_lora_rank": (U32, 1536),
    "attention.kv_lora_rank": (U32, 512),
    "attention.key_length": (U32, 576), "attention.value_length": (U32, 512), "attention.key_length_mla": (U32, 192),
    "attention.value_length_mla": (U32, 128), "rope.dimension_count": (U32, 64), "rope.freq_base": (F32, 50000.0),
    "rope.scaling.type": (TEXT, "yarn"), "rope.scaling.factor": (F32, 64.0),
    "rope.scaling.original_context_length": (U32, 4096), "rope.scaling.yarn_log_multiplier": (F32, 0.1),
    "rope.scaling.yarn_beta_fast": (F32, 32.0), "rope.scaling.yarn_beta_slow": (F32, 1.0),
    "leading_dense_block_count": (U32, 1), "expert_count": (U32, 384), "expert_used_count": (U32, 8),
    "expert_shared_count": (U32, 1), "expert_feed_forward_length": (U32, 2048), "expert_weights_scale": (F32, 2.827),
    "expert_weights_norm": (BOOL, True), "expert_gating_func": (U32, 2), "expert_group_count": (U32, 1),
    "expert_group_used_count": (U32, 1),
}  # fmt: skip


@pytest.mark.skipif(not KIMI.is_dir(), reason="needs ../shared/data/kimi-tokenizer")
def test_kimi_k2_5_keys_equal_the_published_table():
    keys = model_metadata(read_checkpoint_config(KIMI).config, BY_NAME["Q8_0"])
    model = {
        key.removeprefix("deepseek2."): value[1::-1] for key, value in keys.items() if key.startswith("deepseek2.")
    }
    assert model == K2_5
    assert keys["general.architecture"][:2] == ("deepseek2", TEXT)
    assert keys["general.file_type"][:2] == (7, U32)
    assert keys["general.quantization_version"][:2] == (2, U32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_runtime_reads_back_the_configuration(tmp_path, kind):
    model = make_checkpoint(tmp_path, kind)
    convert(tmp_path, tmp_path / "out.gguf", "bf16")
    fields = GGUFReader(tmp_path / "out.gguf").fields
    config, original = ModelConfig.from_metadata({key: field.contents() for key, field in fields.items()}), model.config
    names = {
        "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "num_heads": "num_attention_heads",
        "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim", "qk_rope_head_dim": "qk_rope_head_dim",
        "v_head_dim": "v_head_dim", "feed_forward_size": "intermediate_size",
        "num_dense_layers": "first_k_dense_replace",
        "num_experts": "n_routed_experts", "num_experts_used": "num_experts_per_tok",
        "num_shared_experts": "n_shared_experts",
        "vocab_size": "vocab_size", "expert_feed_forward_size": "moe_intermediate_size",
        "is_expert_weights_norm": "norm_topk_prob", "num_expert_groups": "n_group",
        "num_expert_groups_used": "topk_group",
        "context_length": "max_position_embeddings",
    }  # fmt: skip
    assert {ours: getattr(config, ours) for ours in names} == {
        ours: getattr(original, theirs) for ours, theirs in names.items()
    }
    assert config.q_lora_rank == (original.q_lora_rank or 0)
    assert config.expert_gating == ("softmax" if kind == "deepseek_v2" else "sigmoid")
    assert config.expert_weights_scale == pytest.approx(original.routed_scaling_factor)
    assert config.rms_norm_eps == pytest.approx(original.rms_norm_eps)
    assert config.softmax_scale == pytest.approx(model.model.layers[0].self_attn.scaling)
    assert config.rope.freq_base == original.rope_parameters["rope_theta"]


def write_config(folder: Path, **changes) -> Path:
    make_checkpoint(folder, "kimi", n_routed_experts=4)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return folder


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "llama"}, "a model of type 'llama'"),
        ({"kv_lora_rank": "absent"}, "lacks kv_lora_rank"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"topk_method": "group_limited_greedy", "n_group": 2}, "topk_method"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4,
                    "mscale": 1.0,
                    "mscale_all_dim": 0.5,
                }
            },
            "mscale = 1.0",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by quant_method 'awq'"),
    ],
)
def test_what_cannot_be_converted_is_refused_first(tmp_path, changes, word):
    folder = write_config(tmp_path / "hf", **changes)
    with pytest.raises(KimiLiteError, match=word):
        convert(folder, tmp_path / "out.gguf", "q8_0")
    assert not list(tmp_path.glob("out.gguf*"))


@pytest.mark.parametrize(("content", "word"), [(None, "has no config.json"), ("{", "is not JSON")])
def test_folders_without_a_configuration(tmp_path, content, word):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(KimiLiteError, match=word):
        read_checkpoint_config(tmp_path)
    with pytest.raises(KimiLiteError, match="is not a folder"):
        read_checkpoint_config(tmp_path / "model.gguf")


def test_defaults_are_the_models_own(tmp_path):
    folder = write_config(
        tmp_path, scoring_func="absent", norm_topk_prob="absent", n_group=None, first_k_dense_replace="absent"
    )
    config = read_checkpoint_config(folder).config
    assert (config.expert_gating, config.is_expert_weights_norm) == ("sigmoid", True)
    assert (config.num_expert_groups, config.num_dense_layers) == (1, 0)
