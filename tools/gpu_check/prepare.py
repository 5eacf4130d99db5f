"""What a bare machine needs and cannot fetch: kernels compiled for its GPU by its Triton, and wheels of small packages.

Triton finds compiled kernels by its own version, ptxas and the source alone, so that a folder made here is found there.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

_LARGE = {"torch", "numpy", "numba", "llvmlite", "triton", "scipy"}  # a machine with a GPU has them, or nothing helps
_ALSO = ("nvidia-ml-py",)


def prepare(folder: Path, triton: str, arch: str, python: str, types: str) -> int:
    """Fills FOLDER/triton-cache and FOLDER/wheels; 0, or the exit code of what failed."""
    cache = folder / "triton-cache"
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "kimi_lite.tools.kernels.compile", "--arch", arch]
    command += ["--triton", triton] if triton else []
    command += ["--types", types] if types else []
    compiled = subprocess.run(command, env={**os.environ, "TRITON_CACHE_DIR": str(cache)}, check=False)
    fetched = subprocess.run(_fetching(folder / "wheels", python), check=False)
    size_mb = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    print(f"{folder}: {size_mb:.0f} MB. Carry it with the checkout: python -m tools.gpu_check --carried DIR")
    return compiled.returncode or fetched.returncode


def small_packages() -> list[str]:
    """What kimi-lite needs besides torch, numpy and numba, as pyproject.toml has it."""
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    names = [re.match(r"[\w-]+", each).group() for each in tomllib.loads(text)["project"]["dependencies"]]
    return [name for name in names if name not in _LARGE] + [name for name in _ALSO if name not in names]


def _fetching(wheels: Path, python: str) -> list[str]:
    platforms = [f"--platform={name}" for name in ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "any")]
    plain = ["pip", "download", "--quiet", "--only-binary=:all:", f"--python-version={python}"]
    return [sys.executable, "-m", *plain, *platforms, "--dest", str(wheels), *small_packages()]
