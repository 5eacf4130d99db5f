"""The timeline: every operation once, in order, with the model's answers unchanged and nothing left behind."""

import json
import time
from itertools import pairwise

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.gguf.store import GGUFStore
from kimi_lite.tools.bench import bench, command
from kimi_lite.tools.bench.roofline import Bandwidth
from kimi_lite.tools.trace.trace import Span, Tracer, between_tokens_ns, stage_table, write_chrome_trace
from tests.model.runner import Runner
from tests.tiny import write_tiny_gguf


@pytest.fixture
def runner(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    with Runner(path, num_threads=2) as runner:
        yield runner


def test_every_operation_once_and_logits_unchanged(runner):
    ids = np.arange(40) % 300
    decode, prompt = runner.prefill(ids[:1]), runner.prefill(ids)
    plain = [program.ops for program, _ in runner.transformer.programs]
    tracer = Tracer(runner.transformer)
    with tracer.attached():
        start_ns = time.perf_counter_ns()
        assert np.array_equal(runner.prefill(ids[:1]), decode)
        elapsed_ns = time.perf_counter_ns() - start_ns
        first = tracer.spans()
        assert np.array_equal(runner.prefill(ids), prompt)
    spans = tracer.spans()
    whole, head = (stages for _, stages in runner.transformer.programs[-2:])
    expected = [tuple(stage) for stage in whole + head]
    assert [(span.part, span.stage) for span in first] == expected
    assert [(span.part, span.stage) for span in spans[len(first) :]] == expected  # prompts run layer by layer
    assert all(span.duration_ns >= 0 for span in spans)
    assert all(a.stop_ns <= b.start_ns for a, b in pairwise(spans))
    assert 0 < sum(span.duration_ns for span in first) <= elapsed_ns
    assert {"experts", "dense ffn", "choose experts", "attn_q_b", "attend", "output"} <= {span.stage for span in spans}
    assert all(program.ops is ops for (program, _), ops in zip(runner.transformer.programs, plain, strict=True))
    runner.prefill(ids)
    assert len(tracer.spans()) == len(spans)


def test_a_full_notebook_takes_no_more(runner):
    tracer = Tracer(runner.transformer, capacity=10)
    with tracer.attached():
        runner.prefill(np.arange(3))
    assert len(tracer.spans()) == 9  # the last note has no end


def test_chrome_trace_and_table(tmp_path):
    spans = [
        Span("layer 0", "experts", 1000, 5000),
        Span("layer 0", "output", 5000, 6000),
        Span("layer 1", "experts", 6000, 8000),
        Span("layer 1", "experts", 10_000, 11_000),
    ]
    write_chrome_trace(tmp_path / "trace.json", spans)
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    layers = [(e["name"], e["ts"], e["dur"]) for e in events if e["cat"] == "layer"]
    assert layers == [("layer 0", 0, 5), ("layer 1", 5, 2), ("layer 1", 9, 1)]
    assert [(e["name"], e["cat"], e["ts"]) for e in events][:2] == [("experts", "layer 0", 0), ("output", "layer 0", 4)]
    assert between_tokens_ns(spans) == 2000
    table = stage_table(spans, num_tokens=1)
    assert "experts" in table[2] and "70.0%" in table[2] and "between operations" in table[3] and "20.0%" in table[3]


def test_bench_traces(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure_bandwidth", lambda team: Bandwidth(20.0, False, 0.0))
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    flags = ["-m", path, "-p", "0", "-n", "4", "-d", "0,100", "-r", "1", "-t", "1", "--trace", tmp_path / "out.json"]
    done = CliRunner().invoke(command.app, [*map(str, flags)])
    assert done.exit_code == 0, done.output
    assert "tg8 @ d100" in done.stdout and "| experts" in done.stdout
    names = [e["name"] for e in json.loads((tmp_path / "out.json").read_text())["traceEvents"]]
    assert names.count("output") == 9 + 1  # eight tokens, the first, and the prefix's last one
    assert GGUFStore.open(path).tensors
