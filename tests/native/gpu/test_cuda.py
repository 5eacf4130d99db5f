"""The tests of this folder again on a CUDA device, in a process whose Triton compiles instead of interpreting.

All of them run, whatever fails: a GPU is scarce.
"""

from pathlib import Path

import pytest

from tests.native.gpu.on_cuda import run_on_cuda

OF_THE_HOST = ("test_compile.py", "test_cuda_driver.py", "test_support.py")  # they need no GPU


@pytest.mark.gpu
def test_same_cases_on_cuda():
    folder = Path(__file__).parent
    run_on_cuda(*(path for path in sorted(folder.glob("test_*.py")) if path.name not in OF_THE_HOST))
