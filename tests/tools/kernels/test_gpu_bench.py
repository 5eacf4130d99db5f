"""tools.kernels.gpu_bench where there is nothing to measure: a sentence and a remedy. Its numbers need a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_lite.errors import KimiLiteError

pytest.importorskip("triton", reason="triton exists on Linux alone")

from kimi_lite.native.gpu.support import Unusable
from kimi_lite.tools.kernels import gpu_bench


def test_the_interpreter_is_not_a_gpu():
    with pytest.raises(KimiLiteError, match="TRITON_INTERPRET is set"):
        gpu_bench.check_device()


def test_a_missing_gpu_is_a_sentence_and_a_remedy(monkeypatch):
    monkeypatch.setattr(gpu_bench, "why_unusable", lambda: Unusable("There is no GPU.", "Buy one."))
    with pytest.raises(KimiLiteError, match=r"(?s)There is no GPU.*Buy one.*python -m tools\.kernels "):
        gpu_bench.check_device()


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
