"""Measured sensitivities: against whole models with one changed tensor, and going on where a run was killed."""

import re
from contextlib import closing

import numpy as np
import pytest

from kimi_lite.engine.scoring import OurLogits, log_softmax
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.app import Settings, run
from kimi_lite.quantize.convert import convert, open_model
from kimi_lite.quantize.recipe import harm
from kimi_lite.quantize.recipe.choose import uniform_recipe, with_overrides
from kimi_lite.quantize.recipe.harm import measure_sensitivity
from kimi_lite.quantize.recipe.sensitivity import read_sensitivity
from kimi_lite.quantize.write.writer import encode_pieces
from tests.checkpoints import make_checkpoint

TEXT = "The harbour was quiet in the morning, and 3 boats of 7 came in. " * 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Kimi in float32 and a text for it."""
    folder = tmp_path_factory.mktemp("harm")
    make_checkpoint(folder / "hf", "kimi")
    convert(folder / "hf", folder / "f32.gguf", "f32")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def table(model):
    measure_sensitivity(model / "f32.gguf", model / "text.txt", model / "whole.csv", max_chunks=1)
    return read_sensitivity(model / "whole.csv")


def log_probs(path, chunk: np.ndarray) -> np.ndarray:
    with closing(OurLogits(path)) as logits:
        return log_softmax(logits.logits(chunk)).astype(np.float64)


def chunk_of(path) -> np.ndarray:
    """The 512 tokens that were measured on."""
    with closing(OurLogits(path)) as logits:
        first = [] if logits.bos_id is None else [logits.bos_id]
        return np.array([*first, *logits.tokenizer.encode(TEXT)][:512], np.int32)


@pytest.mark.parametrize("unit", ["blk.1.ffn_down_exps", "blk.2.attn_q", "blk.0.ffn_up", "token_embd", "output"])
def test_a_unit_costs_what_a_model_with_it_costs(model, table, tmp_path, unit):
    """The same tensors in the probe's type in a file of their own, run whole."""
    found = next(each for each in table.units if any(name.startswith(unit) for name in each.tensors))
    rules = [f"^{re.escape(name)}$=q2_0" for name in found.tensors]
    convert(model / "f32.gguf", tmp_path / "one.gguf", with_overrides(uniform_recipe("f32"), rules))
    chunk = chunk_of(model / "f32.gguf")
    own, changed = log_probs(model / "f32.gguf", chunk), log_probs(tmp_path / "one.gguf", chunk)
    nats = float((np.exp(own) * (own - changed)).sum(axis=1).mean())
    assert found.kl == pytest.approx(nats, rel=0.03, abs=2e-7) and found.kl > 0
    assert found.type == "q2_0" and 0 < found.error < 0.5


def test_every_matrix_is_in_one_unit_and_layers_have_floors(model, table):
    names = [name for unit in table.units for name in unit.tensors]
    matrices = [tensor.name for tensor in open_model(model / "f32.gguf").tensors if len(tensor.shape) > 1]
    assert sorted(names) == sorted(name for name in matrices if "ffn_gate_inp" not in name)
    by_layer = {unit.tensors[0].split(".")[1]: unit.floor for unit in table.units if unit.tensors[0].startswith("blk.")}
    assert len(set(by_layer.values())) == len(by_layer) and all(floor > 0 for floor in by_layer.values())
    assert next(unit for unit in table.units if unit.tensors == ("output.weight",)).floor == 0


@pytest.mark.parametrize("layer", [0, 2])
def test_a_killed_run_goes_on_with_its_layer(model, table, tmp_path, layer):
    def stop(name, done, total):
        if name.startswith(f"layer {layer},"):
            raise KeyboardInterrupt

    arguments = (model / "f32.gguf", model / "text.txt", tmp_path / "t.csv")
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(*arguments, max_chunks=1, on_layer=stop)
    assert not (tmp_path / "t.csv").exists()
    seen = []
    measure_sensitivity(*arguments, max_chunks=1, on_layer=lambda name, *_: seen.append(name))
    assert next(name for name in seen if name.startswith("layer")).startswith(f"layer {layer},")
    assert (tmp_path / "t.csv").read_bytes() == (model / "whole.csv").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"t.csv"}


def test_another_text_starts_again(model, tmp_path, monkeypatch):
    """States of other work are not gone on with."""
    (tmp_path / "other.txt").write_text(TEXT[::-1])

    def stop(name, done, total):
        if name == "head":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model / "f32.gguf", model / "text.txt", tmp_path / "t.csv", max_chunks=1, on_layer=stop)
    encoded = []
    monkeypatch.setattr(harm, "encode_pieces", lambda *args, **more: encoded.append(1) or encode_pieces(*args, **more))
    seen = []

    def note(name, done, total):
        seen.append(name)
        if name.startswith("layer 0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model / "f32.gguf", tmp_path / "other.txt", tmp_path / "t.csv", max_chunks=1, on_layer=note)
    assert encoded and any(name.startswith("layer 0") for name in seen)


def test_slices_of_the_head_are_the_head(model, table, tmp_path, monkeypatch):
    monkeypatch.setattr(harm, "_SLICE_LOGITS", 512 * 100)
    measure_sensitivity(model / "f32.gguf", model / "text.txt", tmp_path / "t.csv", max_chunks=1)
    for ours, whole in zip(read_sensitivity(tmp_path / "t.csv").units, table.units, strict=True):
        assert ours.tensors == whole.tensors and ours.kl == pytest.approx(whole.kl, rel=0.01, abs=1e-8)


def test_what_cannot_be_measured(model, tmp_path):
    with pytest.raises(KimiLiteError, match="is a checkpoint, and a sensitivity is measured of a GGUF"):
        measure_sensitivity(model / "hf", model / "text.txt", tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("mine")
    with pytest.raises(KimiLiteError, match=r"t\.csv exists"):
        measure_sensitivity(model / "f32.gguf", model / "text.txt", tmp_path / "t.csv")
    with pytest.raises(KimiLiteError, match="is what is read here"):
        measure_sensitivity(model / "f32.gguf", model / "text.txt", model / "f32.gguf", is_overwriting=True)
    settings = Settings(
        model / "f32.gguf", tmp_path / "u.csv", "q8_0", None, (), None, "45G", False, measured_on=model / "text.txt"
    )
    with pytest.raises(KimiLiteError, match="writes a table and no model, so --recipe has no meaning"):
        run(settings, lambda *state: None, False, False)
