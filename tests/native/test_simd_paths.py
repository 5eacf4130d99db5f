"""Every type on the paths that this machine would not choose, each in a process of its own, in guarded memory.

A first run compiles the kernels for each path (about 40 seconds of a core each, side by side); later ones find them in
the cache. Which types stand for others, `path_check` says; its --all leaves none out.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_lite.native.isa import AVX2, PORTABLE, isa, target_features

ROOT = Path(__file__).parents[2]
IS_X86 = isa().name != PORTABLE
TARGETS = {
    # haswell, because LLVM gives some later names VNNI instructions whatever the features say
    AVX2: {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.1,+sse4.2,+ssse3,+popcnt,+lzcnt",
    },
    PORTABLE: {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"} if IS_X86 else {},
}
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="forbidden pages are made with mprotect, which is POSIX's"),
    pytest.mark.timeout(900),  # a cold cache on a busy machine
]


def start(code: list[str], environment: dict[str, str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *code], env={**os.environ, **environment}, cwd=ROOT, **pipes)


@pytest.fixture(scope="module")
def checks() -> Iterator[dict[str, subprocess.Popen]]:
    """The processes of the other paths, started at once."""
    names = [name for name in TARGETS if name != AVX2 or "avx2" in target_features()]
    processes = {name: start(["-m", "tests.native.path_check", name], TARGETS[name]) for name in names}
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


def expect_equal(process: subprocess.Popen) -> None:
    out, err = process.communicate()
    assert process.returncode == 0 and out.endswith("all equal\n"), f"{out}\n{err[-2000:]}"


@pytest.mark.parametrize(("name", "offset"), [("at_page_end", 3), ("at_page_start", -1)])
def test_a_read_outside_guarded_memory_ends_the_process(name, offset):
    """Otherwise the other tests here would prove little."""
    code = f"""
import ctypes, numpy
from tests.native.guard import {name}
array = {name}(numpy.zeros(3, numpy.uint8))
print(array.sum(), flush=True)
ctypes.string_at(array.ctypes.data + {offset}, 1)
print("survived")
"""
    process = start(["-c", code], {})
    out, _ = process.communicate()
    assert process.returncode != 0 and out == "0\n", out


@pytest.mark.skipif("avx2" not in target_features(), reason="this CPU has no AVX2")
def test_avx2(checks):
    expect_equal(checks[AVX2])


def test_portable(checks):
    expect_equal(checks[PORTABLE])


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_every_type(name):
    if name == AVX2 and "avx2" not in target_features():
        pytest.skip("this CPU has no AVX2")
    expect_equal(start(["-m", "tests.native.path_check", name, "--all"], TARGETS[name]))


def test_the_path_of_this_machine():
    expect_equal(start(["-m", "tests.native.path_check", isa().name], {}))
