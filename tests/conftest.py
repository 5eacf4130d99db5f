"""What must be decided before any test module is imported: Triton decides at its import whether kernels are
interpreted. And what all tests share.

Tests run GPU kernels in Triton's interpreter, on the CPU. KIMI_LITE_TEST_DEVICE=cuda runs the same tests on a CUDA
device (tests/native/gpu/test_cuda.py does, where there is one).
"""

import os
import sys
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, whatever else the machine has to do; --hypothesis-profile default tries others.
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

# Hundreds of children import the program: its sources are compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

for name in ("COLUMNS", "LINES"):  # a worker of pytest-xdist has them; they hide what a terminal's size is
    os.environ.pop(name, None)

if os.environ.get("KIMI_LITE_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
else:  # kernels are launched as the program launches them
    from kimi_lite.native.gpu.support import why_unusable

    if unusable := why_unusable():
        raise RuntimeError(" ".join(unusable))


@pytest.fixture(autouse=True, scope="session")
def _clients() -> None:
    """Every `httpx.get` makes a client, and every client reads all certificates, for a plain http:// URL too: 25 ms of
    CPU for each of thousands of requests. And it waits for 5 s, which is little on a busy machine."""
    from httpx import _config
    from httpx._transports import default

    default.create_ssl_context = cache(default.create_ssl_context)
    patience = _config.DEFAULT_TIMEOUT_CONFIG
    patience.connect = patience.read = patience.write = patience.pool = 120.0
