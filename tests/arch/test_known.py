"""Built-in models against the published numbers, and sizes by group against the files they describe."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.arch.checkpoint import read_checkpoint_config
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import KNOWN, find_known, slice_of, unknown_model
from kimi_lite.arch.moonvit import has_tower, read_checkpoint_tower
from kimi_lite.arch.sizes import sizes_of, store_sizes
from kimi_lite.arch.tensors import tensor_shapes
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.layouts import BY_NAME
from tests.model.family import family_metadata
from tests.tiny import write_tiny_gguf

_KIMI_CONFIG = Path(__file__).parents[3] / "shared/data/kimi-tokenizer/config.json"
_FAMILY_NAMES = {
    "kimi-k2.5": "K2.5",
    "kimi-k2.6": "K2.6",
    "kimi-k2-thinking": "K2-Thinking",
    "kimi-k2": "K2-Instruct",
    "moonlight": "Moonlight",
    "kimi-vl": "Kimi-VL",
    "deepseek-v3": "DeepSeek-V3",
    "deepseek-v2-lite": "DeepSeek-V2-Lite",
}


@pytest.mark.parametrize("name", _FAMILY_NAMES)
def test_dimensions_are_those_of_a_converted_checkpoint(name):
    """llama.cpp's metadata for each published config.json, read back."""
    converted = ModelConfig.from_metadata(family_metadata(_FAMILY_NAMES[name]))
    assert replace(KNOWN[name].config, name=converted.name) == converted


def test_a_slice_differs_in_what_was_asked_for_alone():
    known = KNOWN["kimi-k2.5"].config
    sliced = slice_of(known, 1, 2, 64, 1024)
    assert (sliced.num_layers, sliced.num_dense_layers, sliced.num_experts, sliced.vocab_size) == (3, 1, 64, 1024)
    assert replace(slice_of(known, 1, 60, 384, 163_840), name=known.name) == known


@pytest.mark.parametrize("name", KNOWN)
def test_config_json_and_metadata_of_every_model_read_back(name):
    """The table is read and written in both languages: each known model comes back from its own words."""
    known = KNOWN[name].config
    metadata = {"general.architecture": "deepseek2", "general.name": known.name}
    metadata |= {key: value.value for key, value in known.metadata().items()}
    assert ModelConfig.from_metadata(metadata) == known
    again = ModelConfig.from_json(known.to_json(), known.table, known.name, "config.json", "")
    assert replace(again, rope=known.rope) == known
    assert again.rope.log_multiplier == pytest.approx(known.rope.log_multiplier)


@pytest.mark.skipif(not _KIMI_CONFIG.exists(), reason="needs ../shared/data/kimi-tokenizer/config.json")
def test_k26_is_what_its_config_json_says():
    checkpoint = read_checkpoint_config(_KIMI_CONFIG.parent)
    assert replace(checkpoint.config, name="") == replace(KNOWN["kimi-k2.6"].config, name="")
    assert 2 * read_checkpoint_tower(_KIMI_CONFIG.parent)[0].num_weights == KNOWN["kimi-k2.6"].vision_bytes


def test_models_are_found_as_people_type_them():
    assert find_known("K2.5") is find_known("kimi-k2.5") is KNOWN["kimi-k2.5"]
    assert find_known("Kimi_K2.5-GGUF") is KNOWN["kimi-k2.5"] and find_known("r1") is KNOWN["deepseek-r1"]
    assert find_known("llama") is None
    assert "Did you mean moonlight" in unknown_model("moonlite").hint
    assert (
        not has_tower({}) and not has_tower({"model_type": "kimi_k25"}) and not has_tower({"vision_config": {"a": 1}})
    )


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"types": {"_exps": "TQ2_0", "attn_output": "Q8_0"}, "hidden_size": 512, "expert_feed_forward_size": 256},
        {"is_gate_up_fused": True},
        {"is_kv_b_joined": True},
        {"num_dense_layers": 3, "num_experts": 0, "num_experts_used": 0},
    ],
    ids=str,
)
def test_sizes_are_the_bytes_of_the_file(tmp_path, variant):
    store = GGUFStore.open(write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), **variant))
    config = ModelConfig.from_metadata(store.metadata)
    sizes = store_sizes(store, config, vision_bytes=7)
    routed = {name: tensor for name, tensor in store.tensors.items() if "_exps." in name}
    assert sizes.total_bytes == store.total_bytes + 7
    assert sizes.expert_bytes == sum(tensor.num_bytes for tensor in routed.values())
    assert sizes.embedding_bytes == store.tensor("token_embd.weight").num_bytes
    assert sum(num_bytes for _, num_bytes in sizes.bytes_by_type) == store.total_bytes
    assert sizes.num_experts * sizes.slot_bytes >= sizes.expert_bytes
    assert (sizes.slot_bytes == 0) == (not routed)
    assert bool(sizes.converted_bytes) == variant.get("is_kv_b_joined", False)


def test_dense_weights_on_a_gpu_are_8_bits():
    config = KNOWN["moonlight"].config
    shapes = tensor_shapes(config, ())
    fine = sizes_of(config, ((name, shape, BY_NAME["F32"]) for name, shape in shapes.items()))
    coarse = sizes_of(
        config, ((name, shape, BY_NAME["Q8_0" if len(shape) > 1 else "F32"]) for name, shape in shapes.items())
    )
    assert fine.label == "F32 experts, F32 rest" and coarse.label == "Q8_0 experts, Q8_0 rest"
    assert fine.gpu_dense_bytes < 0.35 * fine.dense_bytes
    assert coarse.gpu_dense_bytes == coarse.dense_bytes, "what has eight bits stays as it is"
    assert 0 < coarse.shared_expert_bytes < coarse.gpu_dense_bytes
