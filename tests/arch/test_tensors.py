"""The shapes that a configuration asks for are those of a file that was written for it, and others are refused."""

import dataclasses

import gguf
import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.tensors import check_tensors, open_model, tensor_shapes, why_unused
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from tests.arch.test_config import VARIANTS
from tests.model.family import FAMILY, family_metadata
from tests.tiny import TinyConfig, _add_key, model_metadata, tiny_tensors, write_tiny_gguf
from tests.tiny_tokenizer import tokenizer_metadata


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_tensor_of_every_variant(tmp_path, variant):
    store = GGUFStore.open(write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), **variant))
    config = ModelConfig.from_metadata(store.metadata)
    check_tensors(store, config)
    assert tensor_shapes(config, store.tensors) == {name: view.shape for name, view in store.tensors.items()}


@pytest.mark.parametrize("model", FAMILY)
def test_shapes_and_costs_agree(model):
    config = ModelConfig.from_metadata(family_metadata(model))
    biases = (
        [f"blk.{layer}.exp_probs_b.bias" for layer in range(config.num_layers)]
        if config.expert_gating == "sigmoid"
        else []
    )
    names = biases + [f"blk.{layer}.attn_kv_b.weight" for layer in range(config.num_layers) if "before" in model]
    shapes = tensor_shapes(config, names)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == config.total_parameters
    if model == "K2.5":
        assert len(shapes) == 1096


FIELDS = (
    "num_layers", "hidden_size", "num_heads", "q_lora_rank", "kv_lora_rank", "v_head_dim", "num_experts", "vocab_size",
    "expert_feed_forward_size", "feed_forward_size", "num_shared_experts",
)  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_metadata_that_does_not_fit_the_tensors(tmp_path, field):
    store = GGUFStore.open(write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0)))
    config = ModelConfig.from_metadata(store.metadata)
    wrong = dataclasses.replace(config, **{field: getattr(config, field) + 1})
    with pytest.raises(KimiLiteError, match=r"the metadata asks for|is missing") as error:
        check_tensors(store, wrong)
    assert "tiny.gguf: tensor " in error.value.message


CHANGING = (
    "blk.1.ffn_up_exps.scale", "blk.1.ffn_down_exps.input_scale", "blk.0.attn_output.bias", "rope_freqs.weight",
    "rope_factors_long.weight", "blk.1.attn_q_a.weight.lora_a", "output.bias", "blk.1.ffn_gate_exps.act_scale",
    "blk.2.attn_sinks.weight", "blk.3.attn_norm.weight", "blk.1.attn_q_norm.weight", "token_embd_norm.weight",
    "blk.1.indexer.k_norm.weight", "blk.0.exp_probs_b.bias", "blk.1.attn_q.weight", "blk.1.ffn_gate_up_exps.weight",
)  # fmt: skip


def with_tensors(path, names, **metadata):
    """A whole model and these tensors."""
    config = TinyConfig(metadata=metadata)
    writer = gguf.GGUFWriter(path, "deepseek2")
    for key, value in (model_metadata(config) | tokenizer_metadata(config.vocab_size) | metadata).items():
        if value is not None and key != "general.architecture":
            _add_key(writer, key, value)
    for name, values in tiny_tensors(config, np.random.default_rng(0)).items():
        writer.add_tensor(name, values)
    for name in names:
        writer.add_tensor(name, np.ones((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", CHANGING)
def test_tensors_that_no_code_reads_are_refused_by_name(tmp_path, name):
    with pytest.raises(KimiLiteError) as error:
        open_model(with_tensors(tmp_path / "tiny.gguf", [name]))
    assert "no code here reads" in error.value.message and repr(name) in error.value.message


def test_what_may_stay_unread(tmp_path):
    """Next-token prediction that the metadata states, frequencies that are computed, and a joint matrix whose halves
    are there."""
    extra = ["blk.3.nextn.eh_proj.weight", "blk.3.attn_norm.weight", "blk.0.attn_rot_embd.weight",
             "blk.1.attn_kv_b.weight"]  # fmt: skip
    stated = {"deepseek2.block_count": 4, "deepseek2.nextn_predict_layers": 1}
    store, config = open_model(with_tensors(tmp_path / "tiny.gguf", extra, **stated))
    assert config.num_layers == 3
    assert all(why_unused(name, config, store.tensors, 1) for name in extra)


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention.temperature_scale", 0.1), ("logit_scale", 0.5), ("attention.sliding_window", 128),
     ("final_logit_softcapping", 30.0), ("interleave_moe_layer_step", 2), ("residual_scale", 0.2),
     ("attention.causal", False)],
)  # fmt: skip
def test_keys_that_change_what_is_computed_are_refused(tmp_path, key, value):
    with pytest.raises(KimiLiteError, match=f"{key} is {value}.*other values are not computed here"):
        open_model(with_tensors(tmp_path / "tiny.gguf", [], **{f"deepseek2.{key}": value}))
