"""tools.kernels.gpu_bench where there is nothing to measure: a sentence and a remedy. Its numbers need a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_lite.errors import KimiLiteError

pytest.importorskip("triton", reason="triton exists on Linux alone")

from kimi_lite.native.gpu import support
from kimi_lite.tools.kernels import gpu_bench


def test_the_interpreter_is_not_a_gpu():
    with pytest.raises(KimiLiteError, match="TRITON_INTERPRET is set"):
        gpu_bench.check_device()


@pytest.mark.parametrize(("missing", "says"), [("triton", "'triton', which is not installed"), ("torch", "'torch'")])
def test_what_is_missing_is_said(missing, says, monkeypatch):
    find = support.importlib.util.find_spec
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert says in support.why_unusable()
    with pytest.raises(KimiLiteError, match=r"python -m tools\.kernels "):
        gpu_bench.check_device()


def test_no_device(monkeypatch):
    monkeypatch.setattr(support, "is_interpreted", lambda: False)
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "No CUDA device is usable" in support.why_unusable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "7.5; the kernels need 8.0" in support.why_unusable()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert support.why_unusable() is None


def test_unknown_type():
    with pytest.raises(KimiLiteError, match="no type 'Q9_9'"):
        gpu_bench._known_types("q8_0,q9_9")


@pytest.mark.gpu
def test_measures():
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.kernels.gpu_bench", "--types", "q8_0,tq1_0", "--repeats", "3"]
    root = Path(__file__).parents[3]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert 0.05 < json.loads(result.stdout.splitlines()[-1])["types"]["Q8_0"]["bandwidth_share"] < 1.2
