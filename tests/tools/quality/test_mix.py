"""Mixes against one type: equal sizes, lines that are kept, the table and the picture."""

import pytest

from kimi_lite.quantize.convert import convert, open_model
from kimi_lite.quantize.recipe import budget
from kimi_lite.quantize.recipe.sensitivity import Sensitivity, Unit
from kimi_lite.tools.quality import mix
from tests.checkpoints import make_checkpoint


@pytest.fixture
def mixes(tmp_path, monkeypatch):
    """Of a small model, whose files are not run: a divergence that only counts how often one is asked for."""
    monkeypatch.setattr(budget, "_EXPERT_TYPES", ("TQ1_0", "TQ2_0", "Q2_0", "Q8_0"))
    monkeypatch.setattr(budget, "_REST_TYPES", ("Q2_0", "Q8_0"))
    make_checkpoint(tmp_path / "hf", "kimi")
    model = convert(tmp_path / "hf", tmp_path / "bf16.gguf", "bf16").path
    names = [tensor.name for tensor in open_model(model).tensors if len(tensor.shape) > 1]
    table = Sensitivity("a test", tuple(Unit((name,), "q2_0", 0.12, 0.0, 0.1) for name in names if "inp" not in name))
    asked = []
    monkeypatch.setattr(mix.Mixes, "_diverge", lambda self, path: (len(asked) + 1.0, asked.append(path) or 0.1))
    return mix.Mixes(model, table, None, tmp_path / "mix.jsonl", 1), tmp_path / "mix.jsonl", asked


def test_mixes_are_no_larger_and_nothing_is_measured_twice(mixes, tmp_path):
    made, results, asked = mixes
    rows = made.rows("q2_0", {})
    assert [row.kind for row in rows] == [mix.UNIFORM, mix.EXPERTS, mix.ALL] and len(asked) == 3
    assert all(0.8 * rows[0].num_bytes < row.num_bytes <= rows[0].num_bytes for row in rows)
    assert rows[0].predicted_nats is None and rows[1].predicted_nats > 0 and rows[2].predicted_nats > 0
    assert mix.read_rows(results) == rows
    assert made.rows("q2_0", {(row.type, row.kind): row for row in rows}) == rows and len(asked) == 3
    lines = mix.table_lines(rows)
    assert len(lines) == 3 and lines[2].startswith("| Q2_0 |") and "1.000 ± 0.100 | 2.000 ± 0.100 | 3.000" in lines[2]
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "bf16.gguf", "bf16.quantize.jsonl", "mix.jsonl"}


def test_the_picture_has_a_curve_for_each_kind(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the tools extra")
    rows = [
        mix.Row(name, kind, int(size * 1e6), size / 100, 0.0, None)
        for name, size in (("tq1_0", 241), ("q2_k", 261))
        for kind in (mix.UNIFORM, mix.EXPERTS, mix.ALL)
    ]
    mix.draw(tmp_path / "mix.svg", rows)
    drawn = (tmp_path / "mix.svg").read_text()
    assert all(label in drawn for label in ("one type", "experts mixed", "all mixed", "TQ1_0", "Q2_K"))
