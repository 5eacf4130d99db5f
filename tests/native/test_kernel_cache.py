"""Compiled kernels are found again while the sources stay as they are, and only then; nothing happens at import, and no
state that a process uses is deleted."""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_lite.native import cache as cache_module

ROOT = Path(__file__).parents[2]
PROBE = (
    "from kimi_lite.native.cpu.matrix import rows_kernel; k = rows_kernel('Q8_0').compiled; "
    "print(k.cache_hits, k.address != 0)"
)
IMPORTS = """
import os, pkgutil, numba
import kimi_lite.native.cpu as cpu
names = [each.name for each in pkgutil.walk_packages(cpu.__path__, cpu.__name__ + ".")]
for name in names:
    __import__(name)
print(len(names), os.path.exists(os.environ["KIMI_LITE_CACHE"]), numba.core.config.CACHE_DIR or "none")
"""


def run_python(code: str, package: Path, cache: Path) -> list[str]:
    environment = {**os.environ, "KIMI_LITE_CACHE": str(cache), "PYTHONPATH": str(package)}
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=package
    )
    return done.stdout.split()


def test_an_edit_anywhere_compiles_anew(tmp_path):
    package, cache = tmp_path / "package", tmp_path / "cache"
    native = package / "kimi_lite" / "native"
    shutil.copytree(ROOT / "native", native, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__", "files", "errors"):
        shutil.copy(ROOT / "kimi_lite" / f"{name}.py", package / "kimi_lite")

    def cache_hits() -> int:
        return int(run_python(PROBE, package, cache)[0])

    assert cache_hits() == 0
    assert cache_hits() == 1
    edited = native / "simd_bytes.py"
    original = edited.read_text()
    edited.write_text(original + "\n# edited\n")
    assert cache_hits() == 0
    edited.write_text(original)
    assert cache_hits() == 1  # going back finds the old code
    assert len(os.listdir(cache / "kernels")) == 2


def test_importing_kernels_does_nothing(tmp_path):
    num_modules, has_cache, cache_dir = run_python(IMPORTS, ROOT, tmp_path / "cache")
    assert int(num_modules) > 15
    assert (has_cache, cache_dir) == ("False", "none")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_old_states_go_but_for_those_in_use(tmp_path):
    states = tmp_path / "kernels"
    for age in range(9):
        (states / f"state{age}").mkdir(parents=True)
        os.utime(states / f"state{age}", (1e9 - age, 1e9 - age))
    held = cache_module._lock(states / "state7", is_shared=True)
    os.utime(states / "state7", (1e9 - 7, 1e9 - 7))
    cache_module._delete_old_states(states)
    assert sorted(os.listdir(states)) == ["state0", "state1", "state2", "state3", "state7"]
    os.close(held)
    cache_module._delete_old_states(states)
    assert sorted(os.listdir(states)) == ["state0", "state1", "state2", "state3"]


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    """Kernels are then compiled for this process alone, and that is said."""
    from numba.core import config

    monkeypatch.setattr(config, "CACHE_DIR", "")
    (tmp_path / "file").touch()
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept in .*: Not a directory"):
        cache_module.use_kernel_cache.__wrapped__()
    assert Path(config.CACHE_DIR).is_dir()
    assert _compiled()(4) == 17


def _compiled():
    """A small function, compiled or found on disk."""
    from numba import njit

    def square_and_one(x):
        return x * x + 1

    return njit("int64(int64)", cache=True)(square_and_one)


@pytest.fixture
def numba_folder(tmp_path, monkeypatch) -> Path:
    from numba.core import config

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    cache_module.use_kernel_cache.__wrapped__()
    return tmp_path


def _emptied(data: bytes) -> bytes:
    return b""


def _halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _zeroed(data: bytes) -> bytes:
    return bytes(len(data))


def _flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x55]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("damage", [_emptied, _halved, _zeroed, _flipped, None])
def test_damaged_files_are_compiled_anew(numba_folder, damage):
    assert _compiled()(4) == 17
    [path] = (path for path in numba_folder.rglob("*") if path.is_file() and path.name != "in-use")
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    assert _compiled()(4) == 17
    again = _compiled()
    assert again(4) == 17
    assert sum(again.stats.cache_hits.values()) == 1  # and kept again


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["(int64) -> int64", "(int64, int64) -> none"]),
            st.sampled_from([("x86_64", "haswell", "+avx2"), ("x86_64", "znver4", "+avx512f"), ("x86_64", "", "")]),
            st.sampled_from([("code", "Q4_K"), ("code", "Q8_0"), ("other", "Q8_0")]),
        ),
        min_size=2,
        unique=True,
    )
)
def test_processes_that_compile_at_once_never_read_what_another_meant(numba_folder, keys):
    """Of one function, each process for a CPU or a type of its own: they begin with the same empty folder."""
    from numba.core import caching

    folder = Path(tempfile.mkdtemp(dir=numba_folder))
    files = [caching.IndexDataCacheFile(str(folder), "dot.rows-145.py311", (1.0, 2)) for _ in keys]
    assert [file.load(key) for file, key in zip(files, keys, strict=True)] == [None] * len(keys)
    with ThreadPoolExecutor(len(keys)) as pool:
        list(pool.map(lambda file, key: file.save(key, {"code for": key}), files, keys))
    assert [files[0].load(key) for key in keys] == [{"code for": key} for key in keys]
    first, *others = sorted(folder.iterdir())
    for other in others:  # nor where a file has another's name
        shutil.copy(first, other)
    assert sum(files[0].load(key) is not None for key in keys) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_a_full_disk_costs_compiling_and_nothing_else(numba_folder):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        with pytest.warns(UserWarning, match="cannot be kept in .*: File too large"):
            assert _compiled()(4) == 17
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [*numba_folder.rglob("*.tmp.*")]
