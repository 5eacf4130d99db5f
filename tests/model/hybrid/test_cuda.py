"""The tests of the hybrid path again on a CUDA device, in a process whose Triton compiles instead of interpreting.

All of them run, whatever fails: a GPU is scarce. `test_rounded.py` shows that a GPU's roundings do not make them fail.
"""

from pathlib import Path

import pytest

from tests.native.gpu.on_cuda import run_on_cuda


@pytest.mark.gpu
def test_same_cases_on_cuda():
    run_on_cuda(Path(__file__).parent / "test_hybrid.py")
