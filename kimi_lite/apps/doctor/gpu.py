"""The doctor's checks of the GPU: driver, generation, free memory and who holds it, torch and Triton, and whether a
small kernel runs.

torch is imported only where there is a GPU that it could use.
"""

import platform
from collections.abc import Iterator

from kimi_lite.apps.doctor.system import Check, Facts
from kimi_lite.hardware.gpu import torch_build
from kimi_lite.hardware.machine import Gpu
from kimi_lite.native.gpu.support import (
    OLDEST_CAPABILITY,
    compiler_problem,
    driver_problem,
    needs_compiler,
    why_unusable,
)
from kimi_lite.units import GIB, gib

_BUSY_BYTES = 1.5 * GIB  # more than a desktop's windows


def gpu_checks(facts: Facts) -> Iterator[Check]:
    """One line where there is no GPU, else one for each thing that they need."""
    gpus = facts.hardware.gpus
    if not gpus:
        yield _no_gpu(facts)
        return
    for gpu in gpus:
        yield check_gpu(gpu)
        yield check_free_memory(gpu)
    checks = [check_torch(facts, gpus[0]), check_triton(facts)]
    yield from checks
    if all(check.status == "ok" for check in checks):
        yield check_kernel()


def _no_gpu(facts: Facts) -> Check:
    found = f"none that can be used: {facts.gpu_reason}"
    if platform.system() == "Windows":
        return Check("gpu", "warn", found, "GPUs are used in Linux: run kimi-lite inside WSL2")
    if facts.packages.get("nvidia-ml-py") is None:
        return Check("gpu", "warn", found, "pip install nvidia-ml-py, if there is an NVIDIA GPU")
    if facts.has_nvidia_device:
        return Check(
            "gpu",
            "fail",
            found,
            "a GPU of NVIDIA's is on the bus: install its driver (or pass the GPU into the container)",
        )
    return Check("gpu", "warn", found, "everything runs on the CPU; a GPU of 24 GiB reads prompts many times faster")


def check_gpu(gpu: Gpu) -> Check:
    speeds = [
        f"{gpu.vram_bytes_s / 1e9:.0f} GB/s" if gpu.vram_bytes_s else "",
        f"driver {gpu.driver}" if gpu.driver else "",
    ]
    pcie = f"PCIe {gpu.pcie_bytes_s / 1e9:.0f} GB/s" if gpu.pcie_bytes_s else ""
    generation = f"sm_{gpu.compute_capability.replace('.', '')}" if gpu.compute_capability else ""
    found = ", ".join(part for part in (f"{gpu.name}, {gib(gpu.vram_total_bytes)}", generation, *speeds, pcie) if part)
    if gpu.compute_capability and tuple(map(int, gpu.compute_capability.split("."))) < OLDEST_CAPABILITY:
        return Check("gpu", "fail", found, "kernels need sm_80 or newer (bfloat16 tensor cores): --device cpu")
    return Check("gpu", "ok", found)


def check_free_memory(gpu: Gpu) -> Check:
    used_bytes = gpu.vram_total_bytes - gpu.vram_free_bytes
    found = f"{gib(gpu.vram_free_bytes)} of {gib(gpu.vram_total_bytes)} free"
    if used_bytes < _BUSY_BYTES:
        return Check("vram", "ok", found)
    holders = ", ".join(f"{p.name} (pid {p.pid}) {gib(p.vram_bytes)}" for p in gpu.processes[:3])
    fix = f"end what holds it: {holders}" if holders else "another program holds the rest; nvidia-smi shows it"
    return Check("vram", "warn", found, fix)


def check_torch(facts: Facts, gpu: Gpu) -> Check:
    """Whether torch can use the GPU, and if not, why."""
    found = facts.packages.get("torch")
    if found is None:
        return Check("torch", "fail", "not installed", "pip install torch")
    if "+cpu" in found:
        return Check(
            "torch",
            "fail",
            f"{found} is a build without CUDA",
            "pip install --force-reinstall torch, without the CPU index",
        )
    build = torch_build()
    built_for = build.cuda_version or "none"
    if build.num_gpus:
        return Check("torch", "ok", f"{found} for CUDA {built_for}, sees {build.num_gpus} GPU(s)")
    finding = f"{found} for CUDA {built_for} cannot use the GPU"
    if problem := driver_problem(build.cuda_version, gpu.cuda_version, gpu.driver):
        return Check("torch", "fail", f"{finding}: {problem.problem}", problem.remedy)
    fix = f"the driver serves CUDA {gpu.cuda_version or '?'}: update it; CUDA_VISIBLE_DEVICES may hide the GPU"
    return Check("torch", "fail", finding, fix)


def check_triton(facts: Facts) -> Check:
    found = facts.packages.get("triton")
    if found is None:
        return Check("triton", "fail", "not installed: the GPU's kernels are written in it", "pip install triton")
    if needs_compiler(found) and (missing := compiler_problem()):
        return Check("triton", "fail", f"{found}: {missing.problem}", missing.remedy)
    return Check("triton", "ok", found if needs_compiler(found) else f"{found}, needs no C compiler")


def check_kernel() -> Check:
    """A small kernel, compiled and run on the GPU that would be used."""
    unusable = why_unusable()
    if unusable is None:
        return Check("gpu kernel", "ok", "a small one runs on the GPU")
    return Check("gpu kernel", "fail", unusable.problem, unusable.remedy)
