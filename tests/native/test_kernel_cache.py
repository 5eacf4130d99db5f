"""Compiled kernels are found again while the sources stay as they are, and only then."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROBE = (
    "from kimi_lite.native.cpu.matrix import rows_kernel; k = rows_kernel('Q8_0'); "
    "print(k.compiled.cache_hits, k.address != 0)"
)


def cache_hits(package: Path, cache: Path) -> int:
    environment = {**os.environ, "KIMI_LITE_CACHE": str(cache), "PYTHONPATH": str(package)}
    environment.pop("NUMBA_CACHE_DIR", None)
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True, cwd=package
    )
    return int(run.stdout.split()[0])


def test_an_edit_anywhere_compiles_anew(tmp_path):
    package, cache = tmp_path / "package", tmp_path / "cache"
    native = package / "kimi_lite" / "native"
    shutil.copytree(ROOT / "native", native, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "kimi_lite" / "__init__.py", native.parent)
    assert cache_hits(package, cache) == 0
    assert cache_hits(package, cache) == 1
    edited = native / "cpu" / "types" / "blocks_of_32.py"
    original = edited.read_text()
    edited.write_text(original + "\n# edited\n")
    assert cache_hits(package, cache) == 0
    edited.write_text(original)
    assert cache_hits(package, cache) == 1  # going back finds the old code
    assert len(os.listdir(cache / "kernels")) == 2
