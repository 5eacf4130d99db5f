"""The GPU by NVML, the driver's own library, so that no torch is imported to ask what there is.

The peak of the memory is its clock times its width, PCIe's is the link's less what packets cost; both are bounds and
not wishes.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from kimi_lite.hardware.machine import Gpu, GpuProcess

_PCIE_LANE_BYTES_S = {
    1: 0.18e9,
    2: 0.36e9,
    3: 0.73e9,
    4: 1.4375e9,
    5: 2.875e9,
    6: 5.75e9,
}  # pinned; 16 lanes of 4.0 give 23e9
_FLOPS_RATIO = {
    "7.5": 4,
    "8.0": 16,
    "8.6": 2,
    "8.7": 2,
    "8.9": 2,
    "9.0": 15,
    "10.0": 30,
    "12.0": 2,
}  # bfloat16 to float32 peak
_TRANSFERS_A_CLOCK = 2


def probe_gpu(index: int = 0) -> Gpu | None:
    """What CUDA calls device `index`, which follows CUDA_VISIBLE_DEVICES; where CUDA does not tell, the GPU with most
    memory. None without one, without its driver, or without the nvidia-ml-py package."""
    try:
        with _nvml() as nvml:
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            if not handles:
                return None
            bus_id = _bus_id(index)
            if bus_id is not None:
                return _describe(nvml, nvml.nvmlDeviceGetHandleByPciBusId(bus_id.encode()))
            return _describe(nvml, max(handles, key=lambda handle: nvml.nvmlDeviceGetMemoryInfo(handle).total))
    except _Unavailable:
        return None


def count_gpus() -> int:
    """GPUs that CUDA would use in this process, asked of the driver itself; 0 without one."""
    driver = _libcuda()
    count = ctypes.c_int(0)
    return count.value if driver and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def _libcuda() -> Any:
    """The driver, ready to be asked; None where there is none that works."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def _bus_id(index: int) -> str | None:
    """Where on the bus CUDA's device `index` is, "00000000:65:00.0": NVML numbers GPUs in another order, and all."""
    driver, text, device = _libcuda(), ctypes.create_string_buffer(32), ctypes.c_int(0)
    if driver is None or driver.cuDeviceGet(ctypes.byref(device), index) != 0:
        return None
    return text.value.decode() if driver.cuDeviceGetPCIBusId(text, len(text), device) == 0 else None


class TorchBuild(NamedTuple):
    """What the installed torch was built for ("12.8"; empty: without CUDA), and how many GPUs it can use."""

    cuda_version: str
    num_gpus: int


def torch_build() -> TorchBuild:
    """Imports torch, which must be installed."""
    import torch

    return TorchBuild(torch.version.cuda or "", torch.cuda.device_count() if torch.cuda.is_available() else 0)


def unavailable_reason() -> str:
    """Why there is no GPU, in a sentence; empty where there is one."""
    try:
        with _nvml() as nvml:
            return "" if nvml.nvmlDeviceGetCount() else "NVIDIA's driver is here and sees no GPU"
    except _Unavailable as error:
        return str(error)


class _Unavailable(Exception):
    """NVML cannot be asked."""


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    try:
        import pynvml
    except ImportError:
        raise _Unavailable("the package nvidia-ml-py is not installed, so no GPU was looked for") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise _Unavailable(f"no NVIDIA driver ({error})") from None
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise _Unavailable(f"NVIDIA's driver answers: {error}") from None
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _describe(nvml: Any, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    width_bits = _ask(nvml, nvml.nvmlDeviceGetMemoryBusWidth, handle)
    memory_mhz = _ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM)
    lanes = _ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle)
    generation = _ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle)
    capability = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    name = _text(nvml.nvmlDeviceGetName(handle))
    return Gpu(
        name=name.removeprefix("NVIDIA ").removeprefix("GeForce "),
        vram_total_bytes=int(memory.total),
        vram_free_bytes=int(memory.free),
        vram_bytes_s=width_bits / 8 * memory_mhz * 1e6 * _TRANSFERS_A_CLOCK if width_bits and memory_mhz else None,
        pcie_bytes_s=lanes * _PCIE_LANE_BYTES_S[min(generation, 6)] if lanes and generation else None,
        driver=_text(_ask(nvml, nvml.nvmlSystemGetDriverVersion) or ""),
        flops_s=_flops_s(nvml, handle, "{}.{}".format(*capability) if capability else ""),
        compute_capability="{}.{}".format(*capability) if capability else "",
        cuda_version=_cuda_version(_ask(nvml, nvml.nvmlSystemGetCudaDriverVersion)),
        has_display=bool(_ask(nvml, nvml.nvmlDeviceGetDisplayActive, handle)),
        processes=tuple(_processes(nvml, handle)),
    )


def _flops_s(nvml: Any, handle: Any, capability: str) -> float | None:
    """Peak of bfloat16 products, from cores and clock and what this generation's tensor cores add."""
    cores = _ask(nvml, nvml.nvmlDeviceGetNumGpuCores, handle)
    clock_mhz = _ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM)
    ratio = _FLOPS_RATIO.get(capability)
    return cores * 2 * clock_mhz * 1e6 * ratio if cores and clock_mhz and ratio else None


def _processes(nvml: Any, handle: Any) -> Iterator[GpuProcess]:
    """Who holds memory, most first; drivers in containers and on Windows often do not tell."""
    running = [
        *(_ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()),
        *(_ask(nvml, nvml.nvmlDeviceGetGraphicsRunningProcesses, handle) or ()),
    ]
    sizes = {process.pid: int(process.usedGpuMemory or 0) for process in running}
    for pid, vram_bytes in sorted(sizes.items(), key=lambda item: -item[1]):
        yield GpuProcess(pid, _process_name(pid), vram_bytes)


def _process_name(pid: int) -> str:
    import psutil

    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "?"


def _ask(nvml: Any, function: Any, *arguments: object) -> Any:
    """What a GPU does not tell is None: laptops and virtual GPUs refuse some questions."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _cuda_version(number: int | None) -> str:
    """12080 is 12.8."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""
