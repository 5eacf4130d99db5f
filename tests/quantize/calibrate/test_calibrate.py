"""`--calibrate`: the text through the source model, one layer ahead of the encoder; and the whole command around it."""

import json
import re
import resource

import numpy as np
import pytest

from kimi_lite.arch.tensors import tensor_shapes
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.app import Settings, run
from kimi_lite.quantize.calibrate.calibration import Calibration, CalibrationText
from kimi_lite.quantize.codecs.feedback import Curvature
from kimi_lite.quantize.convert import convert
from kimi_lite.quantize.recipe.choose import find_recipe, uniform_recipe
from kimi_lite.quantize.source.names import file_order
from kimi_lite.text.tokenizer import Tokenizer
from tests.checkpoints import make_checkpoint
from tests.model.runner import Runner, mean_divergence
from tests.tiny import write_tiny_gguf

SIZES = {"expert_feed_forward_size": 256, "num_experts": 4, "num_layers": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(a tiny F32 model, a text of two chunks for it)"""
    folder = tmp_path_factory.mktemp("source")
    text = folder / "text.txt"
    text.write_text("".join(map(chr, np.random.default_rng(3).integers(33, 127, 1100))))
    return write_tiny_gguf(folder / "source.gguf", np.random.default_rng(0), **SIZES), text


def settings(source, dst, **changed) -> Settings:
    defaults = {
        "recipe": "tq1_0", "type_name": None, "tensor_types": (), "imatrix": None, "split_size": "45G",
        "is_overwriting": False, "calibrate": source[1], "calibrate_chunks": 2,
    }  # fmt: skip
    return Settings(source[0], dst, **defaults | changed)


def quiet(name: str, done: int, total: int) -> None:
    pass


def test_the_models_words_change_less(source, tmp_path):
    logits = {}
    with Runner(source[0]) as runner:
        letters = "".join(map(chr, np.random.default_rng(4).integers(33, 127, 200)))
        ids = np.array(Tokenizer.from_metadata(runner.store.metadata).encode(letters), np.int32)
        want = runner.prefill(ids)
    run(settings(source, tmp_path / "calibrated.gguf"), quiet, False, False)
    run(settings(source, tmp_path / "plain.gguf", calibrate=None), quiet, False, False)
    for name in ("calibrated", "plain"):
        with Runner(tmp_path / f"{name}.gguf") as runner:
            logits[name] = mean_divergence(runner.prefill(ids), want)
    assert logits["calibrated"] < 0.8 * logits["plain"]
    sizes = [(tmp_path / f"{name}.gguf").stat().st_size for name in ("calibrated", "plain")]
    assert sizes[0] == sizes[1]


def test_curvatures_are_those_of_the_inputs(source):
    """Gate and up share X^T X of all tokens, down has one for each expert, heads their own."""
    text = CalibrationText.open(*source, 2)
    names = ["blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight", "output.weight"]
    seen: dict[str, list] = {}
    for _ in text.walk.layers(text.chunks, lambda inputs: seen.setdefault(inputs.weights[0], []).append(_copy(inputs))):
        pass
    statistics = text.start(names)
    shapes = tensor_shapes(text.walk.config)

    def curvature(name: str, matrix: int) -> Curvature:
        shape = shapes[name]
        rows = np.zeros((np.prod(shape[:-1]), shape[-1]), np.float32)
        return statistics.coding(name, BY_NAME["TQ1_0"], matrix, shape, lambda start, stop: rows[start:stop]).curvature

    gate, up = (curvature(name, 3) for name in names[:2])
    assert gate is up and gate.hessian.shape == (256, 256)
    rows = np.concatenate([values for values, _ in seen["blk.1.ffn_gate_exps.weight"]])
    assert _is_like(gate.hessian, rows)
    for expert in range(4):
        rows = np.concatenate(
            [v[starts[expert] : starts[expert + 1]] for v, starts in seen["blk.1.ffn_down_exps.weight"]]
        )
        assert _is_like(curvature(names[2], expert).hessian, rows)
    assert _is_like(curvature("output.weight", 0).hessian, np.concatenate([v for v, _ in seen["output.weight"]]))
    text.close()


def _copy(inputs):
    return inputs.values.copy(), inputs.starts


def _is_like(hessian: np.ndarray, rows: np.ndarray) -> bool:
    """Whether the parts outside the diagonal, which is damped, are X^T X up to a factor."""
    gram = rows.T.astype(np.float64) @ rows
    np.fill_diagonal(gram, 0)
    have = hessian.astype(np.float64) - np.diag(np.diag(hessian))
    return np.vdot(have, gram) > 0.99999 * np.linalg.norm(have) * np.linalg.norm(gram)


def test_killed_and_repeated_is_the_same(source, tmp_path):
    def stop_at_down(name: str, done: int, total: int) -> None:
        if "blk.1.ffn_down_exps" in name:
            raise KeyboardInterrupt

    recipe = find_recipe("tq2_0")
    whole = _convert(source, tmp_path / "whole.gguf", recipe)
    with pytest.raises(KeyboardInterrupt):
        _convert(source, tmp_path / "again.gguf", recipe, stop_at_down)
    assert _convert(source, tmp_path / "again.gguf", recipe).read_bytes() == whole.read_bytes()
    names = list(GGUFStore.open(whole).tensors)
    assert names == sorted(names, key=file_order)


def _convert(source, dst, recipe, on_progress=quiet):
    text = CalibrationText.open(*source, 1)
    try:
        return convert(source[0], dst, recipe, on_progress, calibration=text).path
    finally:
        text.close()


def test_types_that_need_a_matrix_need_none_with_a_text(source, tmp_path):
    pytest.importorskip("llama_cpp")
    assert run(settings(source, tmp_path / "a.gguf", recipe="iq2_xxs"), quiet, True, False)
    run(settings(source, tmp_path / "a.gguf", recipe="iq2_xxs", calibrate_chunks=1), quiet, False, False)
    with pytest.raises(KimiLiteError, match="needs an importance matrix"):
        run(settings(source, tmp_path / "b.gguf", recipe="iq2_xxs", calibrate=None), quiet, False, False)


def test_every_matrix_can_take_part(source, tmp_path):
    """One type for all: attention, heads, dense layer, shared expert and output, where rows are whole blocks."""
    report = convert(source[0], tmp_path / "all.gguf", uniform_recipe("q2_0"))
    text = CalibrationText.open(*source, 1)
    calibrated = convert(source[0], tmp_path / "fed.gguf", uniform_recipe("q2_0"), calibration=text)
    text.close()
    assert calibrated.tensors_by_type == report.tensors_by_type
    plain, fed = GGUFStore.open(report.path), GGUFStore.open(calibrated.path)
    changed = {name for name in plain.tensors if (plain.tensor(name).data != fed.tensor(name).data).any()}
    assert {
        "output.weight",
        "blk.0.attn_output.weight",
        "blk.0.ffn_down.weight",
        "blk.1.ffn_gate_shexp.weight",
    } <= changed
    assert "token_embd.weight" not in changed


def test_what_cannot_be_run_is_refused(source, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(KimiLiteError, match="one chunk of 512 needs"):
        run(settings(source, tmp_path / "a.gguf", calibrate=short), quiet, False, False)
    with pytest.raises(KimiLiteError, match="There is no file"):
        run(settings(source, tmp_path / "a.gguf", calibrate=tmp_path / "missing.txt"), quiet, False, False)


def test_memory_is_limited_or_refused(source, tmp_path):
    lines = run(settings(source, tmp_path / "a.gguf", max_ram="2G", calibrate_chunks=1), quiet, False, False)
    (peak,) = (float(match[1]) for line in lines if (match := re.match(r"peak memory ([\d.]+) GiB", line)))
    assert 0.02 < peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    with pytest.raises(KimiLiteError, match=r"--max-ram is 0\.1 GiB; this conversion needs 0\.\d+ GiB") as caught:
        run(settings(source, tmp_path / "b.gguf", max_ram="100M"), quiet, False, False)
    assert "--chunks" in caught.value.hint
    run(settings(source, tmp_path / "c.gguf", calibrate_chunks=1), quiet, False, False)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


@pytest.fixture
def short_comparison(monkeypatch):
    monkeypatch.setattr("kimi_lite.quantize.check.comparison._NUM_CHUNKS", 1)


def test_verify_measures_what_the_words_lose(source, tmp_path, short_comparison):
    lines = run(settings(source, tmp_path / "a.gguf", calibrate=None), quiet, False, True)
    assert lines[-2].startswith("verified ") and "all checksums equal" in lines[-2]
    assert (
        lines[-1].startswith("compared with the source, on 255 tokens of prose: perplexity ")
        and "KL divergence" in lines[-1]
    )
    log = [json.loads(line) for line in (tmp_path / "a.quantize.jsonl").read_text().splitlines()]
    assert all(0.1 < entry["error"] < 0.9 for entry in log[1:] if entry["type"] == "TQ1_0")


def test_verify_converts_a_small_checkpoint_to_compare(tmp_path, short_comparison):
    make_checkpoint(tmp_path / "model", "kimi_int4", num_layers=2)
    lines = run(settings((tmp_path / "model", None), tmp_path / "a.gguf"), quiet, False, True)
    assert "KL divergence" in lines[-1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("kimi-lite-verify-")]


def test_the_running_layer_is_all_that_is_kept(source):
    text = CalibrationText.open(*source, 1)
    names = ["blk.0.ffn_down.weight", "blk.1.ffn_down_exps.weight"]
    statistics: Calibration = text.start(names)
    zeros = np.zeros((256, 256), np.float32)
    for name, shape in zip(names, ((256, 128), (4, 256, 256)), strict=True):
        statistics.coding(name, BY_NAME["Q2_0"], 0, shape, lambda start, stop: zeros[start:stop, : shape[-1]])  # noqa: B023
        assert [*statistics._current.shared, *statistics._current.pieces] == [name]
    text.close()
