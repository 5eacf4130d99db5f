"""The device of the kernel tests: the CPU under Triton's interpreter, or CUDA (see tests/conftest.py)."""

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton exists on Linux alone")


@pytest.fixture
def device():
    return torch.device(os.environ.get("KIMI_LITE_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def _quiet_interpreter():
    """numpy, which interprets the kernels, warns of infinities that a GPU computes in silence."""
    with np.errstate(all="ignore"):
        yield
