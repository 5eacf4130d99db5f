"""What must be settled before any test module is imported: Triton decides at its import whether kernels are
interpreted.

Tests run GPU kernels in Triton's interpreter, on the CPU. KIMI_LITE_TEST_DEVICE=cuda runs the same tests on a CUDA
device (tests/native/gpu/test_cuda.py does, where there is one).
"""

import os

if os.environ.get("KIMI_LITE_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
