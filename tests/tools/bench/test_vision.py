"""The vision tower's benchmark: what it counts, and a run beside llama.cpp."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from kimi_lite.model.vision.patches import Grid
from kimi_lite.tools.bench.vision import Work
from kimi_lite.tools.make.vision import K2_5_TOWER, write_tower


def test_multiply_adds_of_a_screenshot():
    """By hand: 27 layers of 15.2 M weights for 4,144 patches, a projector of 54 M for 1,036 tokens, scores and sums."""
    work = Work.of(K2_5_TOWER, Grid(1, 56, 74))
    assert work.matrices == pytest.approx(4144 * 27 * (4 * 1152**2 + 2 * 1152 * 4304) + 1036 * 54.26e6, rel=0.002)
    assert work.attention == 27 * 2 * 4144**2 * 1152


def test_beside_llama_cpp(tmp_path):
    pytest.importorskip("llama_cpp.mtmd_cpp")
    tower = replace(K2_5_TOWER, hidden=64, feed_forward=96, heads=4, layers=1, height=8, width=8, text_hidden=512)
    write_tower(tmp_path / "mmproj.gguf", tower, "f16")
    command = [sys.executable, "-m", "kimi_lite.tools.bench.vision", str(tmp_path / "mmproj.gguf")]
    command += ["--size", "100x60", "--compare", "llama.cpp", "-r", "1", "-t", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["patches"] == 8 * 6 and 0 < document["bound_s"] < document["ours_s"][0]
    assert document["theirs_s"][0] > 0 and document["difference"] < 0.01
