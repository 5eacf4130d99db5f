"""What `kimi-lite doctor` looks at: processor, memory, limits, packages, caches. Each check is a function of the facts.

Facts are gathered once (`gather`), so that a test can describe a sick machine. A check says ok, warn (slower, or soon a
problem) or fail (it does not run), what it found, and in one line what to do.
"""

import os
import platform
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from kimi_lite.hardware import host
from kimi_lite.hardware.machine import Hardware
from kimi_lite.hardware.probe import probe
from kimi_lite.plan.nodes import describe_nodes
from kimi_lite.plan.view import short_folder
from kimi_lite.units import GIB, gib

Status = Literal["ok", "warn", "fail"]
_PACKAGES = (
    "numpy",
    "numba",
    "llvmlite",
    "gguf",
    "tiktoken",
    "jinja2",
    "rich",
    "typer",
    "prompt-toolkit",
    "psutil",
    "safetensors",
)
_GPU_PACKAGES = ("torch", "triton", "nvidia-ml-py")
_OLDEST_PYTHON = (3, 11)
_BUSY_SHARE = 0.5  # of the cores: with more, other programs slow a token down
_LEAST_FREE_SHARE = 0.5  # of the memory that is free on the node with most
_SLOW_RAM_BYTES_S, _SLOW_DISK_BYTES_S = 25e9, 1e9
_ISA_FEATURES = ("avx2", "avxvnni", "avx512f", "avx512vnni", "amx-int8", "neon", "dotprod", "i8mm")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. `fix` is what to do where it is not ok."""

    name: str
    status: Status
    finding: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """The machine and what is installed on it."""

    hardware: Hardware
    gpu_reason: str  # why there is no GPU; empty where there is one
    has_nvidia_device: bool  # a GPU of NVIDIA's on the bus, whether its driver works or not
    cgroup: host.CgroupLimit | None
    machine_ram_bytes: int
    swap_used_bytes: int
    swap_total_bytes: int
    huge_pages: str | None
    lockable_bytes: int | None
    balances_nodes: bool
    is_wsl: bool
    cores: host.Cores
    load_average: float | None
    isa: tuple[str, str, str]  # path, instruction, CPU that kernels are compiled for
    cpu_features: tuple[str, ...]
    packages: dict[str, str | None] = field(default_factory=dict)
    python: tuple[int, int, int] = (3, 11, 0)


def gather(path: Path | None, is_measuring: bool) -> Facts:
    """Asks the system; measuring takes about two seconds."""
    from kimi_lite.hardware.gpu import count_gpus, unavailable_reason
    from kimi_lite.native.isa import isa, target_features

    swap = psutil.swap_memory()
    features = target_features()
    return Facts(
        hardware=probe(path, is_measuring, range(max(1, count_gpus()))),
        gpu_reason=unavailable_reason(),
        has_nvidia_device=host.has_nvidia_device(),
        cgroup=host.cgroup_limit(),
        machine_ram_bytes=psutil.virtual_memory().total,
        swap_used_bytes=swap.used,
        swap_total_bytes=swap.total,
        huge_pages=host.huge_pages(),
        lockable_bytes=host.lockable_bytes(),
        balances_nodes=host.balances_nodes(),
        is_wsl=host.is_wsl(),
        cores=host.usable_cores(),
        load_average=host.load_average(),
        isa=tuple(isa()),
        cpu_features=tuple(name for name in _ISA_FEATURES if name in features),
        packages={name: _version(name) for name in (*_PACKAGES, *_GPU_PACKAGES)},
        python=sys.version_info[:3],
    )


def check_python(facts: Facts) -> Check:
    found = ".".join(map(str, facts.python))
    if facts.python[:2] < _OLDEST_PYTHON:
        return Check("python", "fail", found, "install Python 3.11 or newer and kimi-lite into it")
    return Check("python", "ok", f"{found}, {platform.system()} {platform.release()}")


def check_packages(facts: Facts) -> Check:
    missing = [name for name in _PACKAGES if not facts.packages.get(name)]
    if missing:
        return Check("packages", "fail", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    shown = ", ".join(f"{name} {facts.packages[name]}" for name in ("numpy", "numba", "llvmlite", "tiktoken"))
    return Check("packages", "ok", f"{shown}; all {len(_PACKAGES)} are there")


def check_isa(facts: Facts) -> Check:
    """Which vector instructions the kernels use."""
    name, instruction, cpu = facts.isa
    found = f"{name} ({instruction}) on {cpu}; has {', '.join(facts.cpu_features) or 'none of the usual extensions'}"
    if name == "portable" and platform.machine().lower() in ("x86_64", "amd64"):
        return Check(
            "kernels",
            "warn",
            found,
            "this CPU lacks AVX2, or a virtual machine hides it: give the guest the host's CPU",
        )
    return Check("kernels", "ok", found)


def check_cores(facts: Facts) -> Check:
    """Cores, and what keeps some of them away: CPU affinity, or a cgroup's CPU quota."""
    cores = facts.cores
    found = f"{facts.hardware.cpu_name}, {cores.num_usable} of {cores.num_machine} cores"
    if cores.reasons:
        fix = "allow more: taskset -c, docker run --cpus and --cpuset-cpus, or CPUQuota= of the systemd unit"
        return Check("cpu", "warn", f"{found}: {'; '.join(cores.reasons)}", fix)
    return Check("cpu", "ok", found)


def check_load(facts: Facts) -> Check:
    """Whether other programs take the cores."""
    load, num_cores = facts.load_average, facts.cores.num_machine
    if load is None:
        return Check("load", "ok", "unknown on this system")
    found = f"{load:.1f} threads of all programs ran in the last minute, on {num_cores} cores"
    if load > _BUSY_SHARE * num_cores:
        return Check("load", "warn", found, "end other programs (top shows them), or leave them cores with -t")
    return Check("load", "ok", found)


def check_memory(facts: Facts) -> Check:
    hardware = facts.hardware
    found = f"{gib(hardware.ram_total_bytes)}, {gib(hardware.ram_free_bytes)} free"
    if hardware.ram_bytes_s is None:
        return Check("memory", "ok", f"{found}, speed not measured")
    found += f", reads {hardware.ram_bytes_s / 1e9:.1f} GB/s ({hardware.origins.get('ram', 'given')})"
    if hardware.ram_bytes_s < _SLOW_RAM_BYTES_S:
        return Check(
            "memory",
            "warn",
            found,
            "decoding is as fast as this: a module in each channel, and XMP or EXPO in the BIOS",
        )
    return Check("memory", "ok", found)


def check_nodes(facts: Facts) -> Check:
    """Memory of several sockets, or parts of them: what each has, and what disturbs the placement of threads and
    rows."""
    hardware = facts.hardware
    if not hardware.has_nodes:
        return Check("nodes", "ok", "one, as far as this process can tell")
    found = describe_nodes(hardware)
    free = [node.free_bytes for node in hardware.nodes if node.cpus]
    if min(free) < _LEAST_FREE_SHARE * max(free):
        fix = "rows of a full node lie elsewhere: numastat -m shows what fills it"
        return Check("nodes", "warn", found, fix)
    if facts.balances_nodes:
        fix = (
            "pages are placed anyway, and watching them costs faults: echo 0 | sudo tee /proc/sys/kernel/numa_balancing"
        )
        return Check("nodes", "warn", f"{found}; the kernel balances them", fix)
    return Check("nodes", "ok", f"{found}; threads and rows are divided over them")


def check_cgroup(facts: Facts) -> Check:
    limit = facts.cgroup
    if not limit or limit.limit_bytes >= facts.machine_ram_bytes:
        return Check("limits", "ok", "no cgroup memory limit")
    found = f"{limit.file} allows {gib(limit.limit_bytes)} of {gib(facts.machine_ram_bytes)}"
    return Check(
        "limits", "warn", found, "start the container with more memory (docker run --memory), or plan with what it has"
    )


def check_swap(facts: Facts) -> Check:
    found = (
        f"{gib(facts.swap_used_bytes)} of {gib(facts.swap_total_bytes)} in use" if facts.swap_total_bytes else "none"
    )
    if facts.swap_used_bytes > GIB:
        return Check(
            "swap", "warn", found, "close programs, then sudo swapoff -a && sudo swapon -a: swapped pages stall a token"
        )
    return Check("swap", "ok", found)


def check_huge_pages(facts: Facts) -> Check:
    if facts.huge_pages is None:
        return Check("huge pages", "ok", "this system does not tell")
    if facts.huge_pages == "never":
        fix = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        return Check("huge pages", "warn", "never: more time in address translation", fix)
    return Check("huge pages", "ok", facts.huge_pages)


def check_lock(facts: Facts) -> Check:
    """Only `--load lock` needs it: pinned buffers are the driver's and do not count."""
    if facts.lockable_bytes is None:
        return Check("lock limit", "ok", "none (ulimit -l)")
    found = f"{gib(facts.lockable_bytes)} (ulimit -l); only --load lock needs more"
    return Check("lock limit", "ok", found)


def check_wsl(facts: Facts) -> Check:
    if not facts.is_wsl:
        return Check("wsl", "ok", "not WSL")
    fix = "give it memory in .wslconfig ([wsl2] memory=240GB) and keep models on the Linux side, not below /mnt"
    return Check("wsl", "warn", f"WSL2 with {gib(facts.machine_ram_bytes)}, little pinned memory", fix)


def check_disk(facts: Facts) -> Check:
    disk = facts.hardware.disk
    if disk is None:
        return Check("disk", "ok", "not looked at")
    found = f"{gib(disk.free_bytes)} free at {short_folder(disk.path)}"
    if disk.read_bytes_s is None:
        return Check("disk", "ok", f"{found}, speed not measured (no model there)")
    found += f", reads {disk.read_bytes_s / 1e9:.1f} GB/s"
    if disk.read_bytes_s < _SLOW_DISK_BYTES_S:
        minutes = 200e9 / disk.read_bytes_s / 60
        return Check(
            "disk", "warn", found, f"200 GB take {minutes:.0f} minutes to load: move the model to an NVMe disk"
        )
    return Check("disk", "ok", found)


def check_kernel_cache(facts: Facts) -> Check:
    """Compiled kernels must outlive the process, or every start compiles."""
    from kimi_lite.native.cache import kernel_cache
    from kimi_lite.native.cpu.prebuilt import num_kernels

    folder, with_program = kernel_cache(), num_kernels()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Check(
            "cache", "fail", f"{existing} cannot be written", "set KIMI_LITE_CACHE to a folder that can be written"
        )
    files = list(folder.rglob("*.nbc")) if folder.is_dir() else []
    num_bytes = sum(file.stat().st_size for file in files)
    if with_program:
        compiled = f", {len(files)} compiled here in {folder}" if files else ""
        return Check("cache", "ok", f"{with_program} kernels came with the program{compiled}")
    if not files:
        return Check(
            "cache", "ok", f"{folder}: empty, the first start compiles", "kimi-lite doctor --warm -m MODEL compiles now"
        )
    return Check("cache", "ok", f"{len(files)} compiled kernels, {gib(num_bytes)} in {folder}")


SYSTEM_CHECKS = (
    *(
        check_python,
        check_packages,
        check_cores,
        check_load,
        check_isa,
        check_memory,
        check_nodes,
        check_cgroup,
        check_swap,
        check_huge_pages,
    ),
    *(check_lock, check_wsl, check_disk, check_kernel_cache),
)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
