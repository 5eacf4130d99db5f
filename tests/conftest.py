"""What must be decided before any test module is imported: Triton decides at its import whether kernels are
interpreted. And what all tests share.

Tests run GPU kernels in Triton's interpreter, on the CPU. KIMI_LITE_TEST_DEVICE=cuda runs the same tests on a CUDA
device (tests/native/gpu/test_cuda.py does, where there is one).
"""

import os
import sys
from functools import cache
from pathlib import Path

import pytest
import typer.testing
from hypothesis import HealthCheck, settings

# The same examples in every run, whatever else the machine has to do; --hypothesis-profile default tries others.
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

# Hundreds of children import the program: its sources are compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

for name in ("COLUMNS", "LINES"):  # a worker of pytest-xdist has them; they hide what a terminal's size is
    os.environ.pop(name, None)

typer.testing._get_command = cache(typer.testing._get_command)  # a command line is made once, not for every call

if os.environ.get("KIMI_LITE_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
else:  # kernels are launched as the program launches them
    from kimi_lite.native.gpu.support import why_unusable

    if unusable := why_unusable():
        raise RuntimeError(" ".join(unusable))


# Files that take longest, the longest first. A worker that gets one of them last keeps the other one waiting.
LONGEST = (
    "native/test_simd_paths.py",
    "model/hybrid/test_lazy.py",
    "tools/gpu_check/test_gpu_check.py",
    "model/hybrid/test_identical.py",
    "native/test_attention.py",
    "engine/test_batching.py",
    "apps/test_encodings.py",
    "native/test_rows.py",
    "test_readme.py",
    "apps/test_hostile_terminal.py",
    "model/hybrid/test_several_gpus.py",
    "experts/test_ram.py",
    "apps/test_run.py",
    "apps/server/test_connections.py",
    "quantize/test_convert.py",
    "model/vision/test_tower.py",
    "apps/test_plan.py",
    "native/gpu/test_compile.py",
    "native/gpu/test_cuda_driver.py",
    "native/gpu/test_turns.py",
    "quantize/calibrate/test_calibrate.py",
    "quantize/recipe/test_harm.py",
    "tools/kernels/test_kernel_bench.py",
    "model/hybrid/test_failures.py",
    "model/hybrid/test_rounded.py",
    "native/test_panels.py",
    "apps/tools/test_python.py",
    "apps/chat/test_sessions.py",
    "native/test_kernel_cache.py",
    "test_options.py",
    "text/test_template.py",
    "model/cpu/test_tiers.py",
    "tools/make/test_skeleton.py",
    "model/hybrid/test_hybrid.py",
    "model/hybrid/test_decode.py",
    "model/hybrid/test_streamed.py",
    "quantize/calibrate/test_imatrix.py",
    "model/hybrid/test_weights.py",
    "apps/server/test_endings.py",
    "tools/bench/test_bench.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker of pytest-xdist, which gives out files in this order (--no-loadscope-reorder)."""
    if hasattr(config, "workerinput"):
        here = Path(__file__).parent
        order = {here / name: number for number, name in enumerate(LONGEST)}
        assert all(path.is_file() for path in order), [path for path in order if not path.is_file()]
        items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(autouse=True, scope="session")
def _clients() -> None:
    """Every `httpx.get` makes a client, and every client reads all certificates, for a plain http:// URL too: 25 ms of
    CPU for each of thousands of requests. And it waits for 5 s, which is little on a busy machine."""
    from httpx import _config
    from httpx._transports import default

    default.create_ssl_context = cache(default.create_ssl_context)
    patience = _config.DEFAULT_TIMEOUT_CONFIG
    patience.connect = patience.read = patience.write = patience.pool = 120.0
