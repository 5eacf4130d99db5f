"""The model of decode: its two limits, where they meet, and what reaches the table."""

import json

import pytest
from typer.testing import CliRunner

from kimi_lite.errors import KimiLiteError
from kimi_lite.tools.bench.predict import Kernel, Machine, app, experts_s, kernels_of, read_report, rest_s

REPORT = {
    "tool": "kernel_bench",
    "cpu": "a CPU",
    "isa": {"name": "avx2"},
    "clock_ghz": 4.0,
    "types": {
        "TQ1_0": {"bits_per_weight": 1.6875, "cycles_per_weight": 0.3},
        "Q8_0": {"bits_per_weight": 8.5, "cycles_per_weight": 0.15},
    },
}


def test_k25s_experts_at_full_bandwidth():
    """21.14 G weights at 1.6875 bits are 4.459 GB: 13.46 tokens/s from 60 GB/s, however fast the cores."""
    kernel = Kernel(1.6875 / 8, 1e-6)
    assert 1 / experts_s(kernel, Machine(16, 4.0, 60.0)) == pytest.approx(13.455, rel=1e-3)
    assert rest_s(Kernel(1.0625, 1e-6), Machine(16, 4.0, 60.0)) == pytest.approx(11.2 / 60, rel=0.01)


def test_k25s_experts_at_infinite_bandwidth():
    """21.14 G weights of 0.3 cycles on 16 cores of 4 GHz."""
    assert experts_s(Kernel(0.2, 0.3), Machine(16, 4.0, 1e9)) == pytest.approx(21.14e9 * 0.3 / 64e9, rel=1e-3)


@pytest.mark.parametrize(("bits", "cycles", "bandwidth"), [(1.6875, 0.3, 60.0), (8.5, 0.15, 80.0), (4.5, 0.01, 25.0)])
def test_the_turn(bits, cycles, bandwidth):
    """At the turning number of cores both limits are equal; below it the cores set the time, above it memory."""
    kernel = Kernel(bits / 8, cycles)
    turn = kernel.turning_cores(Machine(1, 4.0, bandwidth))
    at_turn = Machine(turn, 4.0, bandwidth)
    assert kernel.compute_s(at_turn) == pytest.approx(kernel.memory_s(at_turn))
    fewer, more = Machine(turn / 2, 4.0, bandwidth), Machine(turn * 2, 4.0, bandwidth)
    assert not kernel.is_memory_bound(fewer) and kernel.seconds(fewer) == pytest.approx(2 * kernel.seconds(at_turn))
    assert kernel.is_memory_bound(more) and kernel.seconds(more) == pytest.approx(kernel.seconds(at_turn))


def write_report(tmp_path, text):
    (tmp_path / "bench.txt").write_text(text, encoding="utf-8")
    return tmp_path / "bench.txt"


def test_report_is_the_last_line(tmp_path):
    path = write_report(tmp_path, f"a table\n{{not this}}\n{json.dumps(REPORT)}\n")
    assert kernels_of(read_report(path)) == {"TQ1_0": Kernel(1.6875 / 8, 0.3), "Q8_0": Kernel(8.5 / 8, 0.15)}


@pytest.mark.parametrize("text", ["", "a table", '{"tool": "bench"}', "[1]"])
def test_other_files_are_refused(tmp_path, text):
    with pytest.raises(KimiLiteError, match=r"bench\.txt"):
        read_report(write_report(tmp_path, text))


def test_command_line(tmp_path):
    path = write_report(tmp_path, json.dumps(REPORT))
    done = CliRunner().invoke(app, [str(path), "--bandwidth", "60,300", "--cores", "16"])
    assert done.exit_code == 0, done.output
    assert "16 cores at 4.00 GHz, 60 GB/s" in done.output and "16 cores at 4.00 GHz, 300 GB/s" in done.output
    lines = [line.split() for line in done.output.splitlines() if line.strip().startswith("TQ1_0")]
    assert [line[7] for line in lines] == ["compute-bound"] * 2  # needs 21.3 cores for 60 GB/s
    assert [line[5] for line in lines] == ["21.3", "106.7"]
    assert [line[8] for line in lines] == [f"{1 / (21.14 * 0.3 / 64 + 0.012):.1f}"] * 2
    assert CliRunner().invoke(app, [str(path), "--bandwidth", "fast"]).exit_code == 2
