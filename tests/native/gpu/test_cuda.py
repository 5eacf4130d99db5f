"""The tests of this folder again on a CUDA device, in a process whose Triton compiles instead of interpreting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.gpu
def test_same_cases_on_cuda():
    if os.environ.get("KIMI_LITE_TEST_DEVICE") == "cuda":
        pytest.skip("this is that process")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")
    folder = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["KIMI_LITE_TEST_DEVICE"] = "cuda"
    command = [sys.executable, "-m", "pytest", "-x", "--ignore", str(folder / "test_compile.py"), str(folder)]
    result = subprocess.run(
        command, cwd=folder.parents[2], env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout[-5000:]
