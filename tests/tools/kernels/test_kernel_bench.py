"""kernel_bench measures what it says: the same bytes, the same products, and a table and JSON at the end."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.native.cpu.threads import Team
from kimi_lite.native.layouts import BY_NAME, LAYOUTS
from kimi_lite.native.types.random_blocks import random_rows
from kimi_lite.tools.bench.measure import measure
from kimi_lite.tools.bench.workloads import CLOCK_CYCLES, Bench, clock_program
from kimi_lite.tools.kernels import kernel_bench
from kimi_lite.tools.kernels.ggml_cpu import describe_ggml, find_vec_dot
from tests.native.types.test_random_blocks import decode

K = 512
has_ggml = "not installed" not in describe_ggml()


@pytest.fixture(scope="module")
def team():
    team = Team(2)
    yield team
    team.close()


@pytest.mark.skipif(not has_ggml, reason="needs the ggml extra")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_llama_cpps_products_through_their_address(team, layout):
    """85 rows: a task of 64 and a part of one."""
    bench = Bench(team, K)
    vec_dot = find_vec_dot(layout, bench.x.values[0])
    if vec_dot is None:
        assert layout.name == "Q2_0" or layout.is_ik or layout.is_own  # the packaged ggml is older, or not llama.cpp's
        return
    data = random_rows(layout, 85, K, 1.0, np.random.default_rng(0))
    out = np.full(86, np.nan, np.float32)
    team.run(bench.ggml(vec_dot, data, out))
    weights = decode(layout, data).reshape(85, K)
    expected = weights @ bench.x.values[0].astype(np.float64)
    assert np.linalg.norm(out[:85] - expected) < 0.015 * np.linalg.norm(expected)  # activations are int8 there
    assert np.isnan(out[85])


def test_reading_touches_every_byte(team):
    data = np.random.default_rng(0).integers(-1000, 1000, (1 << 20) // 4, np.int32)
    bench = Bench(team, 256)
    team.run(bench.read(data))
    assert bench.sums.sum() == data.sum()


def test_clock_is_a_plausible_frequency():
    seconds = measure(Team(1), {"clock": [clock_program()]}, 5).seconds["clock"]
    assert 0.5 < CLOCK_CYCLES / seconds.min() / 1e9 < 8


def test_disagreement_is_an_error(team):
    class Nothing:
        def run(self, program):
            pass

    good, bad = np.ones(8, np.float32), np.full(8, 1.05, np.float32)
    kernel_bench._check_agreement(Nothing(), "Q8_0", (None, good), (None, good * 1.001))
    with pytest.raises(AssertionError, match="Q8_0: our products differ"):
        kernel_bench._check_agreement(Nothing(), "Q8_0", (None, bad), (None, good))


def test_avx2_runs_in_a_process_of_its_own(monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command, env: calls.append((command, env)) or 7)
    done = CliRunner().invoke(
        kernel_bench.app, ["--target", "avx2", "--types", "q8_0", "--threads", "3", "--repeats", "4", "--prefill"]
    )
    ((command, env),) = calls
    assert done.exit_code == 7
    assert command[1:] == ["-m", "tools.kernels", "--types", "q8_0", "--threads", "3", "--repeats", "4", "--prefill"]
    assert env["NUMBA_CPU_NAME"] == "haswell" and "avx512" not in env["NUMBA_CPU_FEATURES"] and "PATH" in env
    assert CliRunner().invoke(kernel_bench.app, ["--target", "riscv"]).exit_code == 2
    assert CliRunner().invoke(kernel_bench.app, ["--types", "q9_9"]).exit_code == 2


def test_whole_run():
    """A short one: the numbers of a line belong together, and lines fit 100 columns."""
    command = [
        sys.executable,
        "-m",
        "tools.kernels",
        "--types",
        "q8_0,F32",
        "--threads",
        "2",
        "--repeats",
        "2",
        "--prefill",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    report = json.loads(last)
    assert report["tool"] == "kernel_bench" and report["threads"] == 2 and report["read_gb_s"] > 0
    assert list(report["types"]) == list(report["prefill"]) == ["Q8_0", "F32"]
    for name, result in report["types"].items():
        assert any(line.startswith(name) for line in lines)
        assert result["gb_s"] == pytest.approx(result["gweights_s"] * result["bits_per_weight"] / 8)
        low, high = result["ratio"][1:] if has_ggml else (1, 1)
        assert 0 < low <= high
        core_weights_a_cycle = result["core_gweights_s"] / report["clock_ghz"]
        assert result["cycles_per_weight"] * core_weights_a_cycle == pytest.approx(1, rel=0.9)
    assert set(report["prefill"]["Q8_0"]["gmac_s"]) == {"128", "512"}


def test_few_tokens_go_through_rows_and_through_a_panel(monkeypatch):
    """Both kernels run for every number of tokens: 256 tokens' rows take longer than 4's on any machine."""
    monkeypatch.setattr(kernel_bench, "_FEW_TOKENS", (4, 256))
    result = CliRunner().invoke(kernel_bench.app, ["--types", "q8_0", "--few-tokens", "--repeats", "3"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    (few_ratio, four), (ratio, many) = (report["few_tokens"]["Q8_0"][count] for count in ("4", "256"))
    assert few_ratio > 0 and ratio > 0 and many > 2 * four > 0


def test_a_bench_says_how_many_tokens_were_generated(team):
    """As many results, whichever kernels make them."""
    bench, layout = Bench(team, K, 5), BY_NAME["Q8_0"]
    data = random_rows(layout, 32, K, 1.0, np.random.default_rng(0))
    rows, panel = np.zeros((5, 32), np.float32), np.zeros((5, 32), np.float32)
    for out, num_generated in ((rows, 5), (panel, 0)):
        bench.set_tokens(5, num_generated)
        team.run(bench.ours(layout, data, out))
    assert np.allclose(rows, panel, rtol=1e-4, atol=1e-4) and rows.all()
