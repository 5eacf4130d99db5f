"""Runs test files in a pytest of their own on a CUDA device."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_MOST_WORKERS = 8  # each has half a gigabyte of the GPU for its context
_LIMIT_S = 280


def run_on_cuda(*files: Path) -> None:
    """Fails with what failed, skips where there is no GPU."""
    if os.environ.get("KIMI_LITE_TEST_DEVICE") == "cuda":
        pytest.skip("this is that process")
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["KIMI_LITE_TEST_DEVICE"] = "cuda"
    result = subprocess.run(
        command_for(*files),
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
    )
    assert result.returncode == 0, result.stdout[-20000:]


def command_for(*files: Path) -> list[str]:
    """Short reports of all failures; several workers where pytest-xdist is installed."""
    workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
    parallel = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    plain = ["-q", "--tb=short", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *plain, *parallel, *map(str, files)]
