"""The machine: what is installed, how fast memory and buses are, how long a launch and an answer take."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kimi_lite.tools.gpu_check.settings import Settings, log, tell
from kimi_lite.tools.kernels.gpu_bench import median_s

_REPEATS = 20
_LARGE_BYTES, _EXPERT_BYTES, _SMALL_BYTES = 512 << 20, 9_290_000, 500_000


def measure(settings: Settings) -> None:
    """Versions first: they are known even where the GPU does not work."""
    import torch

    from kimi_lite.native.gpu.support import compiler_problem, why_unusable

    tell("versions", _versions(torch), python=sys.version.split()[0])
    missing = compiler_problem()
    tell("compiler", missing.problem if missing else f"{shutil.which('gcc') or 'clang'}, Python.h")
    tell("host", f"{os.cpu_count()} CPUs, {_ram_gib():.0f} GiB", shm_free_gib=_free_gib("/dev/shm"))
    unusable = why_unusable()
    tell("usable", unusable.problem if unusable else "a kernel runs", is_ok=unusable is None)
    _ram_read()
    if settings.is_stand_in:
        tell("gpu", "a stand-in")
        return
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    capability = f"sm_{properties.major}{properties.minor}"
    tell("gpu", properties.name, capability=capability, processors=properties.multi_processor_count)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    tell("vram_free", free_bytes / 2**30, "GiB", total=total_bytes / 2**30)
    _bandwidths(torch)
    _latencies(torch)


def compile_kernels(settings: Settings) -> None:
    """What a carried cache lacks, for this GPU, by all cores; each compiler's refusal is a result."""
    if settings.is_stand_in:
        tell("compiled", 0, "kernels")
        return
    import torch

    major, minor = torch.cuda.get_device_capability()
    out = settings.out / "compiled.json"
    types = ["--types", ",".join(settings.types or ("TQ1_0", "Q8_0"))]
    command = [sys.executable, "-m", "kimi_lite.tools.kernels.compile", "--arch", f"{major}{minor}", "--out", str(out)]
    start_s = time.perf_counter()
    result = subprocess.run([*command, *types], stdout=sys.stderr, check=False)
    tell("compiled", result.returncode, "exit code", result.returncode == 0, s=time.perf_counter() - start_s)


def compare_launchers(settings: Settings) -> None:
    """Triton's own driver next to ours: the same numbers, and how long a launch takes."""
    from kimi_lite.native.gpu.support import compiler_problem

    missing = compiler_problem()
    if settings.is_stand_in or missing:
        tell("compared", "not: no GPU" if settings.is_stand_in else f"not: {missing.problem}")
        return
    import torch

    from kimi_lite.native.gpu import cuda_driver
    from kimi_lite.native.gpu.trial import try_a_kernel

    device = torch.device("cuda", 0)
    for name, install in (("kimi-lite's", cuda_driver.install), ("Triton's", cuda_driver.uninstall)):
        start_s = time.perf_counter()
        try:
            install()
            failure = try_a_kernel(device)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        tell(name, failure or "right", is_ok=failure is None, first_s=time.perf_counter() - start_s)


def _versions(torch) -> str:
    packages = {name: _version(name) for name in ("triton", "numba", "numpy")}
    driver = Path("/proc/driver/nvidia/version")
    words = driver.read_text().split() if driver.exists() else []
    number = next((word for word in words if word[0].isdigit() and "." in word), "none")
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, driver {number}, " + ", ".join(
        f"{name} {version}" for name, version in packages.items()
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _ram_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _free_gib(path: str) -> float:
    return shutil.disk_usage(path).free / 2**30 if os.path.exists(path) else 0.0


def _ram_read() -> None:
    from kimi_lite.hardware.bandwidth import measure_ram
    from kimi_lite.hardware.host import usable_cores

    cores = usable_cores().num_usable
    tell("ram_read", measure_ram(cores, 0.5) / 1e9, "GB/s", cores=cores)


def _bandwidths(torch) -> None:
    """Large pieces, and the pieces in which experts and rows travel."""
    large = torch.ones(_LARGE_BYTES // 4, device="cuda")
    other = torch.empty_like(large)
    tell("vram_read", _LARGE_BYTES / median_s(lambda: torch.sum(large), _REPEATS) / 1e9, "GB/s")
    tell("vram_copy", 2 * _LARGE_BYTES / median_s(lambda: other.copy_(large), _REPEATS) / 1e9, "GB/s")
    for name, num_bytes in (("large", _LARGE_BYTES), ("copy_9.3MB", _EXPERT_BYTES), ("copy_0.5MB", _SMALL_BYTES)):
        pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        part = large.view(torch.uint8)[:num_bytes]
        up_s = median_s(lambda part=part, pinned=pinned: part.copy_(pinned, non_blocking=True), _REPEATS)
        down_s = median_s(lambda part=part, pinned=pinned: pinned.copy_(part, non_blocking=True), _REPEATS)
        if name == "large":
            tell("host_to_gpu", num_bytes / up_s / 1e9, "GB/s")
            tell("gpu_to_host", num_bytes / down_s / 1e9, "GB/s")
        else:
            tell(name, up_s * 1e6, "us", down_us=down_s * 1e6)


def _latencies(torch) -> None:
    from kimi_lite.native.gpu.elementwise import swiglu

    x, out = torch.zeros((1, 64), device="cuda"), torch.zeros((1, 64), device="cuda")
    swiglu(x, x, out)
    torch.cuda.synchronize()
    tell("launch", _host_us(lambda: swiglu(x, x, out), 300), "us", how="of the host, a small kernel")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            swiglu(x, x, out)
    tell("graph_launch", _host_us(graph.replay, 100), "us", how="of the host, 20 kernels")
    tell("graph_kernel", median_s(graph.replay, _REPEATS) * 1e6 / 20, "us", how="of the GPU, a small kernel in a graph")
    tell("event_to_host", _event_us(torch, lambda: swiglu(x, x, out)), "us", how="launch, kernel, event seen")
    flag = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    source = torch.ones(1, dtype=torch.int32, device="cuda")
    tell("flag_to_host", _flag_us(torch, flag, source), "us", how="4 bytes copied, seen by polling")


def _host_us(run: Callable[[], object], count: int) -> float:
    import torch

    start_s = time.perf_counter()
    for _ in range(count):
        run()
    elapsed_s = time.perf_counter() - start_s
    torch.cuda.synchronize()
    return elapsed_s / count * 1e6


def _event_us(torch, run: Callable[[], object]) -> float:
    times, event = [], torch.cuda.Event()
    for _ in range(200):
        start_s = time.perf_counter()
        run()
        event.record()
        while not event.query():
            pass
        times.append(time.perf_counter() - start_s)
    return float(np.median(times)) * 1e6


def _flag_us(torch, flag, source) -> float:
    times, seen = [], flag.numpy()
    for _ in range(200):
        seen[0] = 0
        start_s = time.perf_counter()
        flag.copy_(source, non_blocking=True)
        while not seen[0] and time.perf_counter() - start_s < 1:
            pass
        times.append(time.perf_counter() - start_s)
    torch.cuda.synchronize()
    log(f"flag: {min(times) * 1e6:.1f} to {max(times) * 1e6:.1f} us")
    return float(np.median(times)) * 1e6
