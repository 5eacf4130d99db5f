"""The kernels as real GPU code: what a pass launches at Kimi K2.5's sizes compiles to machine code for an RTX 4090,
without a GPU, spills nothing and asks for no more shared memory than there is.

The interpreter accepts what the compiler may not. CI compiles a sample; all of it is a command's work.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_lite.tools.kernels.compile import SAMPLE_ARCHS, SPILLS, Compiled, inexact

_ROOT = Path(__file__).parents[3]


def _run(*arguments: str, cache: Path) -> subprocess.CompletedProcess:
    """In a process of its own, because Triton must not be interpreting."""
    triton = pytest.importorskip("triton")
    if not Path(triton.knobs.nvidia.ptxas.path).exists():
        pytest.skip("this triton has no ptxas")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-W", "ignore", "-m", "kimi_lite.tools.kernels.compile", *arguments]
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_a_sample_compiles(tmp_path):
    """Every kernel there is; a kernel that no pass launches would end the command."""
    result = _run("--sample", "--out", str(tmp_path / "table.json"), "--jobs", "1", cache=tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    table = [Compiled(**row) for row in json.loads((tmp_path / "table.json").read_text())]
    assert {each.arch for each in table} == set(SAMPLE_ARCHS) and all(each.instructions > 20 for each in table)
    assert {"quantize_kernel", "gate_up_kernel", "down_kernel"} <= {each.kernel for each in table}
    grouped = [each for each in table if each.kernel == "grouped_kernel"]
    assert {each.tile.split(",")[0] for each in grouped} == {"choices 64"}  # of prompts; decoding is exact
    assert all(each.tensor_instructions for each in grouped)


def test_what_does_not_round_as_the_cpu():
    """A kernel that promises the CPU's bits may have no instruction of these."""
    good = """
    fma.rn.f32 %r1, %r2, %r3, %r4;
    @%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];
    add.rn.f32 %r1, %r2, %r3;   // mul.f32 in a remark
    cvt.rn.f32.s32 %r1, %r2;
    setp.lt.f32 %p1, %r1, %r2;
    div.rn.f32 %r1, %r2, %r3;
    fma.rn.f32x2 %rd1, %rd2, %rd3, %rd4;
    """
    assert not inexact(good)
    for bad in ("mul.f32", "add.ftz.f32", "div.full.f32", "ex2.approx.f32", "fma.rn.ftz.f32", "mul.f32x2"):
        assert inexact(f"{good}    {bad} %r1, %r2, %r3;\n") == [bad]


def test_what_is_a_problem():
    """Spills and shared memory at their limits and one above."""
    good = {"arch": 89, "kernel": "grouped_kernel", "types": ("TQ1_0",), "tile": "", "num_warps": 4}
    assert not Compiled(**good, shared_bytes=101_376).problem
    assert "wants 101,377 bytes" in Compiled(**good, shared_bytes=101_377).problem
    assert not Compiled(**good | {"arch": 90}, shared_bytes=101_377).problem
    assert "spills 8 bytes" in Compiled(**good, spilled_bytes=8).problem
    for (kernel, types), limit in SPILLS.items():
        row = good | {"kernel": kernel, "types": tuple(types.split())}
        assert not Compiled(**row, spilled_bytes=limit).problem and Compiled(**row, spilled_bytes=limit + 1).problem
    assert "is not compiled: no" in Compiled(**good, error="no").problem
