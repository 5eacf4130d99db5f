"""Divergence against chunks of calibration: lines that are kept, the table and the picture."""

import numpy as np
import pytest

from kimi_lite.tools.quality import curve
from tests.tiny import write_tiny_gguf


def test_files_are_measured_once(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    model = write_tiny_gguf(tmp_path / "m.gguf", rng, num_layers=2, num_experts=4, expert_feed_forward_size=256)
    text, results = tmp_path / "text.txt", tmp_path / "curve.jsonl"
    text.write_text("".join(map(chr, rng.integers(33, 127, 600))))

    def measure() -> list[str]:
        curve.main(model, text, results, "tq2_0:calibrate", "1", chunks=1)
        return capsys.readouterr().out.splitlines()

    lines = measure()
    (point,) = curve.read_points(results)
    assert (point.type, point.knows, point.num_chunks) == ("tq2_0", "calibrate", 1)
    assert 0 < point.held_out < 20 and 0 < point.novel_error < point.novel
    assert lines[0] == "| experts | knows | MB | 1 chunks |"
    assert lines[2].endswith(f"| {point.held_out:.3f} / {point.novel:.3f} |")
    monkeypatch.setattr(curve, "measure", None)
    assert measure() == lines
    other = model.rename(tmp_path / "other.gguf")
    with pytest.raises(SystemExit):
        curve.main(other, text, results, "tq2_0:calibrate", "2", chunks=1)
    assert "is of m.gguf and not of other.gguf" in capsys.readouterr().err


def test_a_file_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(curve.KimiLiteError, match="names no file"):
        curve.measure(tmp_path, tmp_path, 1, "tq1_0", None, tmp_path)


def test_table_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    points = [
        curve.Point("tq1_0", "calibrate", 8, 241_000_000, 3.0, 0.1, 2.5),
        curve.Point("iq1_m", "imatrix", 24, 242_000_000, 2.0, 0.1, 1.5),
        curve.Point("tq1_0", "calibrate", 24, 241_000_000, 2.9, 0.1, 2.25),
    ]
    assert curve.table_lines(points)[2:] == [
        "| TQ1_0 | calibrate | 241.0 | 2.500 / 3.000 | 2.250 / 2.900 |",
        "| IQ1_M | imatrix | 242.0 |  | 1.500 / 2.000 |",
    ]
    curve.draw(tmp_path / "curve.svg", points)
    assert "IQ1_M, imatrix" in (tmp_path / "curve.svg").read_text()
