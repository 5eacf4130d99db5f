"""Which path a model takes: the GPU's where there is one that can, else the CPU's.

Imports torch only where a GPU's driver is found.
"""

import ctypes
import sys
import warnings

from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware.gpu import probe_gpu
from kimi_lite.hardware.machine import Gpu


def choose_device(wanted: str | None) -> str:
    """ "cpu", "cuda" or "cuda:N". None: CUDA where it can be used, with one warning where a GPU is found and cannot.

    Raises KimiLiteError for a device that cannot be had.
    """
    if wanted is not None and wanted != "cpu" and wanted.split(":")[0] != "cuda":
        raise KimiLiteError(f"--device {wanted}: kimi-lite runs on cuda and cpu.", "Try --device cpu.")
    if wanted == "cpu" or (wanted is None and not has_nvidia_driver()):
        return "cpu"
    from kimi_lite.native.gpu.support import why_unusable

    reason = why_unusable()
    if reason is None:
        return wanted or "cuda"
    if wanted is not None:
        raise KimiLiteError(f"--device {wanted}: {reason}", "Try --device cpu, or install what is missing.")
    warnings.warn(f"The GPU is not used, everything runs on the CPU: {reason}", RuntimeWarning, stacklevel=2)
    return "cpu"


def find_gpu(device: str) -> Gpu | None:
    """What the planner must know of the GPU; None for the CPU. NVML tells the most, torch at least how much is
    free."""
    if device == "cpu":
        return None
    if gpu := probe_gpu():
        return gpu
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return Gpu(torch.cuda.get_device_name(device), total_bytes, free_bytes)


def has_nvidia_driver() -> bool:
    """Whether NVIDIA's driver is here and sees a GPU, asked of the driver itself."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
