"""The timeline of the hybrid path: sums of intervals, and a whole trace with a CPU device standing in as the GPU."""

import json

import numpy as np
import pytest

from kimi_lite.engine import loader
from kimi_lite.errors import KimiLiteError
from kimi_lite.model.hybrid import load
from kimi_lite.options import Options
from kimi_lite.tools.trace.gpu import CPU_EXPERTS, common, shares_of, table, trace, united
from tests.model.hybrid.stand_in import GPU, StandInKernels
from tests.tiny import write_tiny_gguf


def test_intervals():
    assert united([(5, 7), (0, 2), (1, 3), (7, 8)]) == [(0, 3), (5, 8)]
    assert common([(0, 3), (5, 8)], [(2, 6), (7, 9)]) == [(2, 3), (5, 6), (7, 8)]
    assert common([], [(0, 1)]) == []


def test_shares():
    """Two steps of 10 ms: what happens between them does not count."""
    shares = shares_of(
        [(0, 10_000), (20_000, 30_000)], [(0, 4_000), (12_000, 26_000)], [(2_000, 9_000), (25_000, 27_000)]
    )
    assert shares == (20, 10, 9, 3)
    assert shares.neither_ms == pytest.approx(4)
    assert table(shares, 2)[-1].split("|")[2].strip() == "2.000"


@pytest.fixture
def path(tmp_path):
    return write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))


def test_trace(path, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "choose_device", lambda wanted: "cpu:0")
    monkeypatch.setattr(loader, "find_gpu", lambda device: GPU)
    monkeypatch.setattr(load, "TritonKernels", StandInKernels)
    with loader.load(path, Options(context_length=256, num_threads=1, num_gpu_experts=0)) as engine:
        shares = trace(engine, 4, tmp_path / "trace.json")
        assert 0 < shares.cpu_ms < shares.whole_ms and shares.gpu_ms == 0
        assert "forward" not in vars(engine.model), "the spans are gone again"
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event.get("name") == CPU_EXPERTS for event in events) == 4 * 2, "two layers route"


def test_nothing_to_trace_on_the_cpu_path(path):
    with (
        loader.load(path, Options(context_length=256, device="cpu")) as engine,
        pytest.raises(KimiLiteError, match="no GPU"),
    ):
        trace(engine, 1, None)
