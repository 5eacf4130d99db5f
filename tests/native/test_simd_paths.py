"""Every type on the paths that this machine would not choose, each in a process of its own, in guarded memory.

A first run compiles all kernels for each path (about a minute of one core), later ones find them in the cache.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from native.isa import AVX2, PORTABLE, isa, target_features

ROOT = Path(__file__).parents[2]
# haswell, because LLVM gives some later names VNNI instructions whatever the features say
AVX2_TARGET = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.1,+sse4.2,+ssse3,+popcnt,+lzcnt",
}
PORTABLE_TARGET = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}
NEEDS_PAGES = pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX's")


def run(code: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *code], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=280
    )


def check(path: str, environment: dict[str, str]) -> None:
    result = run(["-m", "tests.native.path_check", path], environment)
    assert result.returncode == 0 and result.stdout.endswith("all equal\n"), f"{result.stdout}\n{result.stderr[-2000:]}"


@NEEDS_PAGES
def test_a_read_behind_guarded_memory_ends_the_process():
    """Otherwise the other tests here would prove nothing."""
    lines = "import ctypes, numpy; from tests.native.guard import {0}; a = {0}(numpy.zeros(3, numpy.uint8)); print(a.sum())"
    for name, offset in (("at_page_end", 3), ("at_page_start", -1)):
        code = f"{lines.format(name)}; ctypes.string_at(a.ctypes.data + {offset}, 1); print('survived')"
        result = run(["-c", code], {})
        assert result.returncode != 0 and result.stdout == "0\n", (result.stdout, result.stderr)


@NEEDS_PAGES
def test_this_machines_path():
    check(isa().name, {})


@NEEDS_PAGES
@pytest.mark.skipif("avx2" not in target_features(), reason="this CPU has no AVX2")
def test_avx2():
    check(AVX2, AVX2_TARGET)


@NEEDS_PAGES
def test_portable():
    is_x86 = isa().name != PORTABLE
    check(PORTABLE, PORTABLE_TARGET if is_x86 else {})
