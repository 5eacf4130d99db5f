"""Whole conversions: every tensor against the transformers model, every metadata type, and llama.cpp's own loader."""

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.convert import convert
from tests.checkpoints import KINDS, make_checkpoint
from tests.llama import open_llama

_F32_ENDS = ("_norm.weight", "ffn_gate_inp.weight", "exp_probs_b.bias")
_DIRECT = {
    "attn_norm.weight": "input_layernorm.weight", "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight", "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight", "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight", "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight", "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight", "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_shexp.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_experts.down_proj.weight", "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}  # fmt: skip


def expected_tensors(model) -> dict[str, np.ndarray]:
    """The GGUF tensors as the format's description says, written here a second time and from transformers' own
    weights."""
    state, config, tensors = model.state_dict(), model.config, {}
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    tensors |= {f"{ours}.weight": state[f"{theirs}.weight"] for ours, theirs in names.items()}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        tensors |= {ours + name: state[theirs + source] for name, source in _DIRECT.items() if theirs + source in state}
        kv_b = state[f"{theirs}self_attn.kv_b_proj.weight"].unflatten(0, (config.num_attention_heads, -1))
        tensors[f"{ours}attn_k_b.weight"] = kv_b[:, : config.qk_nope_head_dim].transpose(1, 2)
        tensors[f"{ours}attn_v_b.weight"] = kv_b[:, config.qk_nope_head_dim :]
        if f"{theirs}mlp.experts.down_proj" in state:
            gate, up = state[f"{theirs}mlp.experts.gate_up_proj"].chunk(2, dim=1)
            experts = {"gate": gate, "up": up, "down": state[f"{theirs}mlp.experts.down_proj"]}
            tensors |= {f"{ours}ffn_{part}_exps.weight": weight for part, weight in experts.items()}
    return {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(folder, model) by kind, each made once."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = folder, make_checkpoint(folder, kind)
        return made[kind]

    return get


@pytest.mark.parametrize("type_name", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_exact(checkpoints, tmp_path, kind, type_name):
    folder, model = checkpoints(kind)
    report = convert(folder, tmp_path / "out.gguf", type_name)
    expected, found = expected_tensors(model), GGUFReader(tmp_path / "out.gguf").tensors
    assert {tensor.name for tensor in found} == expected.keys()
    for tensor in found:
        want = expected[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == want.shape, tensor.name
        is_kept = tensor.name.endswith(_F32_ENDS)
        assert tensor.tensor_type.name == ("F32" if is_kept else type_name.upper()), tensor.name
        encoded = gguf.quants.quantize(want, tensor.tensor_type)
        assert np.array_equal(tensor.data.view(np.uint8), encoded.view(np.uint8)), tensor.name
        if type_name == "f32":
            assert np.array_equal(tensor.data, want), tensor.name
    assert report.num_tensors == len(expected)
    assert report.num_weights == sum(want.size for want in expected.values())
    assert report.num_bytes == (tmp_path / "out.gguf").stat().st_size


def test_bf16_checkpoints_lose_nothing_in_bf16(checkpoints, tmp_path):
    folder, model = checkpoints("kimi")
    convert(folder, tmp_path / "out.gguf", "bf16")
    for tensor in GGUFReader(tmp_path / "out.gguf").tensors:
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(decoded, expected_tensors(model)[tensor.name]), tensor.name


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_stored_floats(tmp_path, dtype):
    model = make_checkpoint(tmp_path / "hf", "kimi", dtype=dtype, n_routed_experts=4)
    convert(tmp_path / "hf", tmp_path / "out.gguf", "f32")
    for tensor in GGUFReader(tmp_path / "out.gguf").tensors:
        assert np.array_equal(tensor.data, expected_tensors(model)[tensor.name]), tensor.name


def test_int4_experts_stay_exact_in_q4_0(checkpoints, tmp_path):
    """Q4_0 of the experts holds the checkpoint's own codes; other tensors go through ggml."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs the ggml extra")
    folder, model = checkpoints("kimi_int4")
    convert(folder, tmp_path / "out.gguf", "q4_0")
    for tensor in GGUFReader(tmp_path / "out.gguf").tensors:
        if "_exps" in tensor.name:
            assert tensor.tensor_type.name == "Q4_0"
            assert np.array_equal(
                gguf.quants.dequantize(tensor.data, tensor.tensor_type), expected_tensors(model)[tensor.name]
            )


def test_rows_that_are_not_whole_blocks_fall_back_and_say_so(checkpoints, tmp_path):
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs the ggml extra")
    folder, _ = checkpoints("kimi")
    report = convert(folder, tmp_path / "out.gguf", "q4_k")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    assert types["blk.1.ffn_down_exps.weight"] == types["token_embd.weight"] == "Q4_K"
    assert types["blk.1.attn_k_b.weight"] == types["blk.1.attn_v_b.weight"] == "Q8_0"
    assert "blk.1.attn_k_b.weight: rows of 32 are not whole blocks of 256, so Q8_0 and not Q4_K" in report.notes
    assert report.tensors_by_type.keys() == {"F32", "Q8_0", "Q4_K"}


def test_stacked_experts_are_read_too(checkpoints, tmp_path):
    """transformers' own names, for folders that were saved without going back to the published ones."""
    folder, model = checkpoints("moonlight")
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, stacked / "model.safetensors")
    for file in (
        "config.json",
        "tiktoken.model",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ):
        (stacked / file).write_bytes((folder / file).read_bytes())
    for source, out in ((folder, "a.gguf"), (stacked, "b.gguf")):
        convert(source, tmp_path / out, "f32")
    first, second = (GGUFReader(tmp_path / out).tensors for out in ("a.gguf", "b.gguf"))
    for a, b in zip(first, second, strict=True):
        assert a.name == b.name
        assert np.array_equal(a.data, b.data), a.name


@pytest.mark.parametrize("prefix", ["language_model.model.", "language_model.", "model.language_model."])
def test_prefixes_of_the_text_model(checkpoints, tmp_path, prefix):
    folder, _ = checkpoints("kimi")
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    head = weights.pop("lm_head.weight")
    weights = {prefix + name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(weights | {"language_model.lm_head.weight": head}, renamed / "model.safetensors")
    for file in ("config.json", "tiktoken.model", "tokenizer_config.json", "generation_config.json"):
        (renamed / file).write_bytes((folder / file).read_bytes())
    for source, out in ((folder, "a.gguf"), (renamed, "b.gguf")):
        convert(source, tmp_path / out, "bf16")
    first, second = (GGUFReader(tmp_path / out).tensors for out in ("a.gguf", "b.gguf"))
    assert all(a.name == b.name and np.array_equal(a.data, b.data) for a, b in zip(first, second, strict=True))


def test_tied_embeddings_are_written_twice(checkpoints, tmp_path):
    folder, _ = checkpoints("kimi")
    tied = tmp_path / "tied"
    tied.mkdir()
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, tied / "model.safetensors")
    for file in ("tiktoken.model", "tokenizer_config.json"):
        (tied / file).write_bytes((folder / file).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config))
    with pytest.raises(KimiLiteError, match=r"no lm_head\.weight"):
        convert(tied, tmp_path / "out.gguf", "f32")
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    convert(tied, tmp_path / "out.gguf", "f32")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    assert np.array_equal(tensors["output.weight"], tensors["token_embd.weight"])


def test_vision_and_prediction_layers_are_left_out_and_named(checkpoints, tmp_path):
    folder, _ = checkpoints("kimi_int4")
    index = folder / "model.safetensors.index.json"
    report = convert(folder, tmp_path / "out.gguf", "bf16")
    assert [note for note in report.notes if note.startswith("vision tower and projector left out")]
    assert index.is_file()

    extra = tmp_path / "extra"
    make_checkpoint(extra, "deepseek_v3", num_layers=3)
    config = json.loads((extra / "config.json").read_text())
    (extra / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}))
    report = convert(extra, tmp_path / "extra.gguf", "bf16")
    assert [note for note in report.notes if note.startswith("next-token-prediction layers left out")]
    assert not [tensor for tensor in GGUFReader(tmp_path / "extra.gguf").tensors if tensor.name.startswith("blk.2.")]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (
            lambda weights: weights.pop("model.layers.1.mlp.experts.5.up_proj.weight"),
            r"no model\.layers\.1\.mlp\.experts\.5\.up_proj",
        ),
        (
            lambda weights: weights.update({"model.layers.0.self_attn.sinks": torch.ones(4)}),
            "1 weights that this architecture lacks",
        ),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(255)}),
            r"model\.norm\.weight: need rows of 256",
        ),
        (lambda weights: weights.update({"lm_head.weight": torch.ones(511, 256)}), "need 512 rows by config.json"),
    ],
)
def test_weights_that_do_not_fit_config_json_are_refused_first(checkpoints, tmp_path, change, word):
    folder, _ = checkpoints("kimi")
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(KimiLiteError, match=word):
        convert(tmp_path, tmp_path / "out.gguf", "f32")
    assert not list(tmp_path.glob("out.gguf*"))


def test_progress_reaches_the_end(checkpoints, tmp_path):
    folder, _ = checkpoints("deepseek_v2")
    seen: list[tuple[str, int, int]] = []
    convert(folder, tmp_path / "out.gguf", "q8_0", lambda *state: seen.append(state))
    done = [state[1] for state in seen]
    assert done == sorted(done)
    assert seen[0][0] == "token_embd.weight"
    assert seen[-1][0] == "output.weight"
    assert seen[-1][1] == seen[-1][2]


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs the ggml extra")
@pytest.mark.parametrize("kind", ["kimi", "kimi_int4", "deepseek_v3_fp8", "moonlight", "deepseek_v2"])
def test_llama_cpp_runs_the_file_as_transformers_runs_the_folder(tmp_path, kind):
    """The whole conversion, seen by another program: tensors, kv_b split, key types, YaRN, routing."""

    small = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    lite = (
        {"num_layers": 27, **small} if kind in ("moonlight", "deepseek_v2") else {}
    )  # llama.cpp knows these by 27 layers
    model = make_checkpoint(tmp_path / "hf", kind, **lite)
    convert(tmp_path / "hf", tmp_path / "out.gguf", "f32")
    ids = np.random.default_rng(0).integers(3, 480, 40).tolist()
    llama = open_llama(tmp_path / "out.gguf", n_ctx=64, logits_all=True, n_threads=2)
    llama.eval(ids)
    theirs = torch.from_numpy(np.array(llama.scores[: len(ids)])).log_softmax(-1)
    llama.close()
    ours = model(torch.tensor(ids)[None], use_cache=False).logits[0].log_softmax(-1)
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    assert divergence < (5e-3 if lite else 1e-5), divergence  # 27 random layers amplify llama.cpp's float16 cache


def test_paths_may_be_texts_and_the_name_is_the_folders(checkpoints, tmp_path):
    folder, _ = checkpoints("deepseek_v3")
    report = convert(str(folder), str(tmp_path / "out.gguf"), "Q8_0")
    assert report.path == Path(tmp_path / "out.gguf")
    assert GGUFReader(report.path).fields["general.name"].contents() == folder.name
    assert 8.5 < report.bits_per_weight < 9.5
