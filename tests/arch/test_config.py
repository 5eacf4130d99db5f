"""ModelConfig for every model of the family, its costs against published sizes, and its refusals."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.arch.config import ModelConfig, RopeConfig
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from tests.model.family import FAMILY, family_metadata
from tests.tiny import TinyConfig, write_tiny_gguf


def config_of(model: str, **changes) -> ModelConfig:
    return ModelConfig.from_metadata(family_metadata(model, **changes))


def refusal(model: str = "K2.5", **changes) -> str:
    with pytest.raises(KimiLiteError) as error:
        ModelConfig.from_metadata(family_metadata(model, **changes), "kimi.gguf")
    assert error.value.hint
    assert error.value.message.startswith("kimi.gguf: ")
    return error.value.message


def test_k25_field_by_field():
    rope = RopeConfig(50000.0, "yarn", 64.0, 4096, 32.0, 1.0, 0.1)
    want = ModelConfig(
        architecture="deepseek2", name="K2.5", num_layers=61, hidden_size=7168, num_heads=64, q_lora_rank=1536,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, feed_forward_size=18432,
        num_dense_layers=1, num_experts=384, num_experts_used=8, num_shared_experts=1, expert_feed_forward_size=2048,
        expert_weights_scale=2.827, is_expert_weights_norm=True, expert_gating="sigmoid", num_expert_groups=1,
        num_expert_groups_used=1, rms_norm_eps=1e-5, vocab_size=163840, context_length=262144, rope=rope,
    )  # fmt: skip
    assert config_of("K2.5") == want
    assert (want.qk_head_dim, want.kv_latent_size, want.num_moe_layers) == (192, 576, 60)
    assert want.kv_bytes_per_token(2) == 70_272


def test_what_tells_the_models_apart():
    lite, moonlight, v3 = config_of("DeepSeek-V2-Lite"), config_of("Moonlight"), config_of("DeepSeek-V3")
    assert (lite.q_lora_rank, lite.expert_gating, lite.is_expert_weights_norm, lite.expert_weights_scale) == (
        0,
        "softmax",
        False,
        1,
    )
    assert (moonlight.q_lora_rank, moonlight.expert_gating, moonlight.rope) == (0, "sigmoid", RopeConfig(50000.0))
    assert (v3.num_expert_groups, v3.num_expert_groups_used, v3.num_dense_layers) == (8, 4, 3)
    assert config_of("Kimi-VL").rope.freq_base == 800_000
    assert config_of("K2-Instruct").rms_norm_eps == 1e-6


@pytest.mark.parametrize(
    ("model", "scale"),
    [("K2.5", 0.144679626), ("K2-Thinking", 0.144679626), ("K2-Instruct", 0.130860800), ("DeepSeek-V3", 0.135233779),
     ("DeepSeek-V2-Lite", 0.114721387), ("Moonlight", 0.0721687836), ("Kimi-VL", 0.0721687836)],
)  # fmt: skip
def test_softmax_scale(model, scale):
    assert config_of(model).softmax_scale == pytest.approx(scale, rel=1e-8)


def test_softmax_scale_without_the_multiplier_is_plain():
    config = config_of("K2.5", rope__scaling__yarn_log_multiplier=None)
    assert config.softmax_scale == pytest.approx(192**-0.5)


def test_costs_of_k25():
    """Numbers from the published tensor inventory of the checkpoint."""
    config = config_of("K2.5")
    assert config.table.num_weights(config, "attention") == config.num_layers * 101_124_096
    assert config.expert_parameters == 44_040_192
    assert config.total_parameters == 1_026_408_232_448
    assert config.routed_parameters == 60 * 384 * 44_040_192
    assert config.total_parameters == config.routed_parameters + config.other_parameters
    assert config.active_parameters == pytest.approx(31.69e9, rel=2e-4)


@pytest.mark.parametrize(
    ("model", "billions"),
    [("DeepSeek-V3", 671), ("DeepSeek-V2-Lite", 15.7), ("Moonlight", 15.96), ("K2-Instruct", 1026)],
)
def test_total_parameters_of_the_family(model, billions):
    assert config_of(model).total_parameters / 1e9 == pytest.approx(billions, rel=2e-3)


VARIANTS = [
    {}, {"q_lora_rank": 0}, {"expert_gating": "softmax", "num_shared_experts": 2}, {"is_gate_up_fused": True},
    {"is_kv_b_joined": True}, {"num_dense_layers": 3, "num_experts": 0, "num_experts_used": 0},
    {"num_shared_experts": 0},
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_written_file_gives_its_configuration_and_cost_back(tmp_path, variant):
    want = TinyConfig(**variant)
    store = GGUFStore.open(write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), **variant))
    config = ModelConfig.from_metadata(store.metadata)
    for field in dataclasses.fields(config):
        if field.name not in ("architecture", "rope"):
            assert getattr(config, field.name) == pytest.approx(getattr(want, field.name)), field.name
    for field in dataclasses.fields(config.rope):
        assert getattr(config.rope, field.name) == pytest.approx(getattr(want, f"rope_{field.name}")), field.name
    assert config.total_parameters == store.total_bytes // 4


def test_files_from_before_the_mla_tensors():
    assert config_of("K2-Instruct before MLA") == dataclasses.replace(config_of("K2.5"), name="K2-Instruct before MLA")


def test_what_a_missing_key_means():
    config = config_of(
        "K2.5", attention__q_lora_rank=None, leading_dense_block_count=None, expert_weights_scale=None,
        expert_weights_norm=None,
        expert_gating_func=None, expert_group_count=None, expert_group_used_count=None, rope__freq_base=None,
        rope__scaling__yarn_beta_fast=None, rope__scaling__yarn_beta_slow=None, attention__head_count_kv=None,
    )  # fmt: skip
    assert (config.q_lora_rank, config.num_dense_layers, config.expert_weights_scale) == (0, 0, 1.0)
    assert (config.is_expert_weights_norm, config.expert_gating) == (False, "softmax")
    assert (config.num_expert_groups, config.num_expert_groups_used) == (1, 1)
    assert (config.rope.freq_base, config.rope.beta_fast, config.rope.beta_slow) == (10_000, 32, 1)
    assert config_of("K2.5", expert_weights_scale=0.0).expert_weights_scale == 1
    assert config_of("K2.5", expert_gating_func=0).expert_gating == "softmax"


@pytest.mark.parametrize("num_blocks", [47, 48])
def test_glm_flash_is_sigmoid_without_saying_so(num_blocks):
    glm = {"block_count": num_blocks, "expert_gating_func": None}
    assert config_of("K2.5", vocab_size=154_880, **glm).expert_gating == "sigmoid"
    assert config_of("K2.5", **glm).expert_gating == "softmax"


def test_prediction_layers_are_not_layers():
    assert config_of("DeepSeek-V3", block_count=62, nextn_predict_layers=1).num_layers == 61
    assert "nextn_predict_layers is 61, and must be a whole number from 0 to 60" in refusal(nextn_predict_layers=61)


def test_vocabulary_size_from_the_tokens():
    metadata = family_metadata("K2.5", vocab_size=None) | {"tokenizer.ggml.tokens": ["a"] * 300}
    assert ModelConfig.from_metadata(metadata).vocab_size == 300
    with pytest.raises(KimiLiteError, match=r"vocab_size is 299, and must be at least the 300 entries"):
        ModelConfig.from_metadata(metadata | {"deepseek2.vocab_size": 299})
    assert "deepseek2.vocab_size is missing" in refusal(vocab_size=None)


def test_one_number_for_each_layer():
    same = {"feed_forward_length": np.full(61, 18432, np.int32), "attention__head_count": np.full(61, 64, np.uint32)}
    assert config_of("K2.5", expert_feed_forward_length=np.array([2048] * 61), **same) == config_of("K2.5")
    mixed = np.array([18432, 2048], np.int32)
    assert "feed_forward_length is [18432  2048], and must be a whole number" in refusal(feed_forward_length=mixed)
    assert "feed_forward_length is []" in refusal(feed_forward_length=np.array([], np.int32))


def test_linear_and_no_scaling():
    linear = config_of("Moonlight", rope__scaling__factor=4.0)
    assert (linear.rope.scaling, linear.rope.factor) == ("linear", 4.0)
    assert linear.softmax_scale == pytest.approx(192**-0.5)
    assert config_of("K2.5", rope__scaling__type="none").rope == RopeConfig(50000.0)
    assert config_of("Moonlight", rope__scaling__type="linear").rope == RopeConfig(50000.0)


def test_a_dense_model():
    no_experts = {f"expert_{key}": None for key in ("count", "used_count", "shared_count", "feed_forward_length")}
    dense = config_of("K2.5", leading_dense_block_count=61, **no_experts)
    assert (dense.num_moe_layers, dense.routed_parameters) == (0, 0)
    assert "num_experts is 0, and must be above 0, as 60 layers are not dense" in refusal(**no_experts)


def test_other_architectures():
    with pytest.raises(KimiLiteError, match="'qwen3moe', and 'deepseek2' is the one") as error:
        ModelConfig.from_metadata({"general.architecture": "qwen3moe"})
    assert "K2.5" in error.value.hint
    assert "Moonlight" in error.value.hint
    with pytest.raises(KimiLiteError, match=r"general\.architecture is missing"):
        ModelConfig.from_metadata({})
    with pytest.raises(KimiLiteError, match=r"general\.type is 'mmproj'"):
        ModelConfig.from_metadata({"general.architecture": "clip", "general.type": "mmproj"})


REFUSALS = [
    ({"block_count": None}, "the metadata key deepseek2.block_count is missing"),
    ({"block_count": 0}, "block_count is 0, and must be a whole number from 1 to 1,024"),
    ({"block_count": "61"}, "block_count is '61'"),
    ({"block_count": True}, "block_count is True"),
    (
        {"embedding_length": (1 << 32) - 1},
        "embedding_length is 4294967295, and must be a whole number from 1 to 1,048,576",
    ),
    ({"context_length": 0}, "context_length is 0"),
    ({"attention__layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan, and must be a number"),
    (
        {"attention__layer_norm_rms_epsilon": 1e30},
        "layer_norm_rms_epsilon is 1e+30, and must be a number from 1e-12 to 0.1",
    ),
    ({"attention__key_length_mla": None}, "key_length_mla is 0, and must be above 0, because the other"),
    ({"attention__value_length_mla": 0}, "value_length_mla is 0, and must be above 0, because the other"),
    ({"attention__key_length": 192}, "key_length is 192, and must be 576 in a file with the _mla keys"),
    ({"attention__value_length": 128}, "value_length is 128, and must be 512 in a file with the _mla keys"),
    ({"attention__head_count_kv": 64}, "head_count_kv is 64, and must be 1 in a file with the _mla keys"),
    (
        {"rope__dimension_count": 192, "attention__key_length": 704},
        "rope.dimension_count is 192, and must be even and less than",
    ),
    ({"rope__dimension_count": 63, "attention__key_length": 575}, "rope.dimension_count is 63, and must be even"),
    ({"rope__freq_base": 1.0}, "rope.freq_base is 1.0, and must be a number from 1.0001"),
    ({"rope__scaling__type": "longrope"}, "rope.scaling.type is 'longrope', and must be one of none, linear, yarn"),
    ({"rope__scaling__factor": 0.5}, "rope.scaling.factor is 0.5, and must be a number from 1 to"),
    ({"rope__scaling__factor": None}, "rope.scaling.factor is missing"),
    ({"rope__scaling__original_context_length": None}, "original_context_length is missing"),
    ({"rope__scaling__yarn_beta_fast": 0.5}, "rope.beta_fast is 0.5, and must be at least beta_slow, 1"),
    ({"rope__scaling__attn_factor": 1.5}, "rope.scaling.attn_factor is 1.5, and must be 1"),
    ({"expert_gating_func": 4}, "expert_gating_func is 4, and must be one of 1 (softmax), 2 (sigmoid)"),
    ({"expert_weights_norm": 1}, "expert_weights_norm is 1, and must be true or false"),
    ({"expert_used_count": 385}, "num_experts_used is 385, and must be at most num_experts, 384"),
    ({"expert_used_count": 0}, "expert_used_count is 0, and must be a whole number from 1"),
    ({"expert_shared_count": None}, "expert_shared_count is missing"),
    (
        {"expert_group_count": 7, "expert_group_used_count": 4},
        "num_expert_groups is 7, and must be a divisor of num_experts, 384",
    ),
    ({"expert_group_count": 384, "expert_group_used_count": 8}, "num_expert_groups is 384, and must be at most half"),
    ({"expert_group_count": 8, "expert_group_used_count": 9}, "num_expert_groups_used is 9, and must be at most"),
    ({"expert_group_count": 8, "expert_group_used_count": 0}, "num_expert_groups_used is 0, and must be above 0"),
    ({"expert_group_count": 8, "expert_group_used_count": None}, "expert_group_used_count is missing"),
    ({"expert_group_count": 96, "expert_group_used_count": 1}, "num_experts_used is 8, and must be at most 4"),
    ({"leading_dense_block_count": 62}, "leading_dense_block_count is 62, and must be a whole number from 0 to 61"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS, ids=[message[:40] for _, message in REFUSALS])
def test_what_is_wrong_is_said(changes, message):
    assert message in refusal(**changes)


def test_a_configuration_made_by_hand_is_checked_too():
    with pytest.raises(KimiLiteError, match="num_experts_used is 500"):
        dataclasses.replace(config_of("K2.5"), num_experts_used=500)
    with pytest.raises(KimiLiteError, match=r"rope\.factor is 0"):
        dataclasses.replace(config_of("K2.5"), rope=RopeConfig(10_000.0, "linear", 0.0))


@settings(max_examples=500, deadline=2000)
@given(data=st.data())
def test_any_value_under_any_key(data):
    metadata = family_metadata(data.draw(st.sampled_from(FAMILY)))
    values = st.one_of(
        st.integers(-(1 << 63), 1 << 64), st.floats(), st.booleans(), st.text(max_size=5), st.just(["a"]), st.just([]),
        st.sampled_from([0, 1, 2, 63, 64, 192, 1 << 31]), st.lists(st.integers(0, 9), max_size=3).map(np.array),
        st.lists(st.floats(), max_size=3).map(np.array),
    )  # fmt: skip
    for key in data.draw(st.lists(st.sampled_from([*metadata, "tokenizer.ggml.tokens"]), min_size=1, max_size=3)):
        metadata[key] = data.draw(values)
    try:
        config = ModelConfig.from_metadata(metadata)
    except KimiLiteError as error:
        assert error.message.isprintable(), ascii(error.message)  # noqa: PT017 - either outcome is right
        return
    assert config.total_parameters > 0
    assert np.isfinite(config.softmax_scale)
    assert config.name.isprintable()
