"""An architecture in one file: this one.

A table with its own key prefix, config.json words, tensor names in GGUF and in checkpoints and no shared expert is
registered here; a tiny random checkpoint of it is converted, planned, measured and run, and says the same tokens as the
same weights under deepseek2.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kimi_lite.arch import architecture as registry
from kimi_lite.arch.architecture import Architecture, register
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.deepseek2 import DEEPSEEK2
from kimi_lite.arch.known import K2_5
from kimi_lite.arch.tensors import open_model
from kimi_lite.engine.loader import load
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.options import Options
from kimi_lite.plan.subject import find_subject
from kimi_lite.quantize.calibrate.imatrix import read_imatrix
from kimi_lite.quantize.calibrate.statistics import collect_importance
from kimi_lite.quantize.convert import convert
from kimi_lite.quantize.recipe.choose import find_recipe, with_overrides
from kimi_lite.quantize.source.names import list_sources
from tests.checkpoint_tokenizers import write_kimi_tokenizer

_IN_FILES = {"attn_output": "self_out", "ffn_gate_inp": "router", "output_norm": "final_norm", "attn_k_b": "keys_up"}
_IN_CHECKPOINTS = {"self_attn": "mla", "mlp.gate.": "moe.route.", "mlp.experts": "moe.ffn", "lm_head": "unembed"}
_JSON = {"hidden_size": "d_model", "num_hidden_layers": "depth", "n_routed_experts": "num_experts"}


def _renamed(text: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        text = text.replace(ours, theirs)
    return text


LORIS = Architecture(
    name="loris",
    family="Loris",
    attention="mla",
    fields=tuple(replace(field, json=_JSON.get(field.json, field.json)) for field in DEEPSEEK2.fields),
    rows=tuple(
        replace(row, file=_renamed(row.name, _IN_FILES), weight=_renamed(row.weight, _IN_CHECKPOINTS), stacked=None)
        for row in DEEPSEEK2.rows
        if row.part != "shared"
    ),
    model_types={"loris_moe": {"scoring_func": "sigmoid", "norm_topk_prob": True, "n_shared_experts": 0}},
)
TINY = replace(
    K2_5, name="", num_layers=3, hidden_size=256, num_heads=4, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=64, feed_forward_size=256, num_experts=8, num_experts_used=2, num_shared_experts=0,
    expert_feed_forward_size=256, vocab_size=600, context_length=2048,
)  # fmt: skip
MODEL_TYPES = {"loris": "loris_moe", "deepseek2": "kimi_k2"}
CORPUS = "The heron waits, and the river goes on. " * 60


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    register(LORIS)
    yield
    registry.forget_tables()


def write_checkpoint(folder: Path, config: ModelConfig) -> Path:
    """The same numbers whatever the architecture: drawn tensor after tensor, in the order of the deepseek2 table."""
    folder.mkdir()
    rng, weights = np.random.default_rng(0), {}
    biases = {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(config.num_layers)}
    shapes: dict[str, tuple[int, ...]] = {}
    for source in list_sources(replace(config, architecture="deepseek2"), biases):
        for part in source.parts:
            rows = max(part.stop, shapes.get(part.weight, (0,))[0])
            row = source.shape[-2] if part.is_transposed else source.shape[-1]
            shapes[part.weight] = (rows, row) if len(source.shape) > 1 else source.shape
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
        weights[name] = 1 + values if "norm" in name else values
    if config.architecture == "loris":
        weights = {_renamed(name, _IN_CHECKPOINTS): values for name, values in weights.items()}
    save_file(weights, folder / "model.safetensors")
    write_kimi_tokenizer(folder, config.vocab_size)
    (folder / "config.json").write_text(json.dumps(config.to_json() | {"model_type": MODEL_TYPES[config.architecture]}))
    return folder


@pytest.fixture
def checkpoints(tmp_path) -> dict[str, Path]:
    return {name: write_checkpoint(tmp_path / name, replace(TINY, architecture=name)) for name in MODEL_TYPES}


def answer(path: Path) -> list[int]:
    engine = load(path, Options(context_length=128, num_threads=2, kv_dtype="f32"))
    request = Request("a", tuple(range(40)), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    return [token.id for token in engine.generate([request]) if token.id is not None]


def test_it_is_converted_planned_and_run(checkpoints, tmp_path):
    files = {}
    for name, folder in checkpoints.items():
        files[name] = convert(folder, tmp_path / f"{name}.gguf", "f32").path
    plain = GGUFStore.open(files["loris"])
    assert plain.metadata["general.architecture"] == "loris"
    assert plain.metadata["loris.embedding_length"] == 256 and "deepseek2.embedding_length" not in plain.metadata
    assert "blk.1.self_out.weight" in plain.tensors and "final_norm.weight" in plain.tensors
    assert not [name for name in plain.tensors if "attn_output" in name or "shexp" in name]
    ids = {name: answer(path) for name, path in files.items()}
    assert ids["loris"] == ids["deepseek2"] and len(ids["loris"]) == 8

    subject, before = find_subject(str(files["loris"])), find_subject(str(checkpoints["loris"]))
    assert before.config.architecture == subject.config.architecture == "loris"
    sizes, others = subject.sizes, find_subject(str(files["deepseek2"])).sizes
    assert sizes.total_bytes == others.total_bytes and sizes.expert_bytes == others.expert_bytes > 0
    assert before.sizes_in("f32").total_bytes == sizes.total_bytes
    assert subject.config.total_parameters * 4 == sizes.total_bytes


def test_recipes_exceptions_and_importance_use_its_names(checkpoints, tmp_path):
    full = convert(checkpoints["loris"], tmp_path / "f32.gguf", "f32").path
    (tmp_path / "text.txt").write_text(CORPUS)
    collect_importance(full, tmp_path / "text.txt", tmp_path / "i.gguf", max_chunks=2, chunk_tokens=64)
    importance = read_imatrix(tmp_path / "i.gguf")
    assert "blk.1.self_out.weight" in importance.vectors
    recipe = with_overrides(find_recipe("tq1_0"), [r"self_out=tq2_0"])
    report = convert(full, tmp_path / "small.gguf", recipe, importance=importance)
    types = {name: view.layout.name for name, view in GGUFStore.open(report.path).tensors.items()}
    assert types["blk.1.ffn_up_exps.weight"] == "TQ1_0" and types["blk.1.router.weight"] == "F32"
    assert types["blk.1.self_out.weight"] == "TQ2_0" and types["blk.1.attn_q_a.weight"] == "Q8_0"
    assert not [note for note in report.notes if "has nothing for" in note and "exps" in note]
    assert len(answer(report.path)) == 8


def test_what_its_table_lacks_is_refused(checkpoints, tmp_path):
    weights = load_file(checkpoints["loris"] / "model.safetensors")
    weights["model.layers.1.mlp.shared_experts.up_proj.weight"] = np.zeros((256, 256), np.float32)
    save_file(weights, checkpoints["loris"] / "model.safetensors")
    with pytest.raises(KimiLiteError, match=r"1 weights that this architecture lacks: .*shared_experts"):
        convert(checkpoints["loris"], tmp_path / "out.gguf", "f32")
    with pytest.raises(KimiLiteError, match=r"Kimi K2.*; Loris"):
        open_model(_foreign(tmp_path / "foreign.gguf"))


def _foreign(path: Path) -> Path:
    from kimi_lite.gguf.metadata import text
    from kimi_lite.native.layouts import BY_NAME
    from kimi_lite.quantize.write.writer import Tensor, write_gguf

    rows = np.zeros((1, 32), np.float32)
    write_gguf(path, {"general.architecture": text("heron")}, [
        Tensor("a", (1, 32), BY_NAME["F32"], lambda: lambda start, stop: rows[start:stop])
    ])  # fmt: skip
    return path
