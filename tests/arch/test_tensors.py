"""The shapes that a configuration asks for are those of a file that was written for it, and others are refused."""

import dataclasses

import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.tensors import check_tensors, tensor_shapes
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from tests.arch.test_config import VARIANTS
from tests.model.family import FAMILY, family_metadata
from tests.tiny import write_tiny_gguf


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
