"""The kernels as real GPU code: every one compiles to PTX and machine code for an RTX 4090 and an H100, without a GPU.

The interpreter accepts what the compiler may not. Nothing may spill registers or want more shared memory than the GPU
has.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[3]


def test_every_kernel_compiles(tmp_path):
    triton = pytest.importorskip("triton")
    if not Path(triton.knobs.nvidia.ptxas.path).exists():
        pytest.skip("this triton has no ptxas")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "tests.native.gpu.compile_kernels"]
    result = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    for kernel in (
        "matvec",
        "dequantize",
        "gate_up",
        "down",
        "grouped",
        "q8_0_product",
        "decode",
        "merge",
        "write_latent",
        "route",
    ):
        for target in ("sm_89", "sm_90"):
            assert f"{target} {kernel}_kernel" in result.stdout, (target, kernel)
