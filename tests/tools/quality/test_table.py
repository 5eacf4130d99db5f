"""The table of types and encoders, on a tiny model."""

import numpy as np
import pytest

from kimi_lite.quantize.calibrate.calibration import CalibrationText
from kimi_lite.tools.quality.table import Table, print_row
from tests.tiny import write_tiny_gguf


def test_rows_of_a_type(tmp_path, capsys):
    pytest.importorskip("llama_cpp")
    rng = np.random.default_rng(0)
    model = write_tiny_gguf(tmp_path / "m.gguf", rng, num_layers=2, num_experts=4, expert_feed_forward_size=256)
    text = tmp_path / "text.txt"
    text.write_text("".join(map(chr, rng.integers(33, 127, 600))))
    calibration = CalibrationText.open(model, text, 1)
    rows = list(Table(model, tmp_path, calibration, 1).rows("tq2_0"))
    calibration.close()
    ways = [(row.encoder, row.help) for row in rows]
    assert ways == [("ggml", "-"), ("ours", "-"), ("ggml", "imatrix"), ("ours", "imatrix"), ("ours", "calibrate")]
    assert len({row.num_bytes for row in rows}) == 1
    by_way = dict(zip(ways, rows, strict=True))
    assert by_way["ours", "-"].kl_nats < by_way["ggml", "-"].kl_nats
    print_row(rows[0])
    assert capsys.readouterr().out.startswith("| TQ2_0 | 2.062 | ggml | - |")
