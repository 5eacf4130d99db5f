"""The device of the kernel tests: the CPU under Triton's interpreter, or CUDA (see tests/conftest.py)."""

import importlib.util
import os

import numpy as np
import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]  # triton exists on Linux alone


@pytest.fixture
def device():
    import torch

    return torch.device(os.environ.get("KIMI_LITE_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True, scope="session")
def _fused():
    """The interpreter's multiply-add rounds twice; a GPU's once."""
    if HAS_TRITON:
        from tests.native.gpu.fused import fuse

        fuse()


@pytest.fixture(autouse=True)
def _quiet_interpreter():
    """numpy, which interprets the kernels, warns of infinities that a GPU computes in silence."""
    with np.errstate(all="ignore"):
        yield
