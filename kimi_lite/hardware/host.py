"""What the operating system says about this machine: memory and cores within this process's limits; disks.

Used by `hardware.probe` and by `apps.doctor`; `usable_cores()` sets how many threads start by default.
"""

import math
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from kimi_lite.hardware.machine import TILES, Cores, Disk
from kimi_lite.hardware.nodes import MemoryPolicy
from kimi_lite.native.cpu.nodes import Node, read_nodes

_NO_LIMIT_BYTES = 1 << 60  # cgroups say "none" with numbers near 2^63
_USUAL_PERIOD_US = 100_000
_MEMORY_FILES = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),  # above it the kernel slows the process down until it has freed memory
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of memory in all and free, within the cgroup's limit where there is one. Caches of files count as
    free."""
    system = psutil.virtual_memory()
    limit = cgroup_limit(root)
    if limit is None or limit.limit_bytes >= system.total:
        return system.total, system.available
    return limit.limit_bytes, max(0, min(system.available, limit.limit_bytes - limit.used_bytes))


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    limit_bytes: int
    used_bytes: int  # without caches of files, which give way
    file: Path


def cgroup_limit(root: Path = Path("/")) -> CgroupLimit | None:
    """The tightest memory limit of the cgroups that hold this process, version 2 or 1; None where there is none."""
    found = []
    for folder in _cgroup_folders(root, "memory"):
        for names in _MEMORY_FILES:
            limit, used = (_read_number(folder / name) for name in names)
            if limit is not None and limit < _NO_LIMIT_BYTES:
                reclaimable = _read_stat(folder / "memory.stat", ("inactive_file", "total_inactive_file"))
                found.append(CgroupLimit(limit, max(0, (used or 0) - reclaimable), folder / names[0]))
    return min(found, key=lambda limit: limit.limit_bytes, default=None)


@dataclass(frozen=True, slots=True)
class CpuQuota:
    """CPU time that the process may take, in cores: 1.5 is three cores half of the time."""

    num_cores: float
    file: Path


def cpu_quota(root: Path = Path("/")) -> CpuQuota | None:
    """The tightest CPU quota of the cgroups that hold this process: `cpu.max` of version 2, `cpu.cfs_quota_us` over
    `cpu.cfs_period_us` of version 1; None where there is none."""
    found = []
    for folder in _cgroup_folders(root, "cpu"):
        quota, _, period = _read_text(folder / "cpu.max").strip().partition(" ")
        if quota.isdecimal():
            found.append(CpuQuota(int(quota) / _period_us(period), folder / "cpu.max"))
        quota_us = _read_number(folder / "cpu.cfs_quota_us")  # -1, which is no number here: no quota
        if quota_us:
            period_us = _period_us(_read_text(folder / "cpu.cfs_period_us"))
            found.append(CpuQuota(quota_us / period_us, folder / "cpu.cfs_quota_us"))
    return min(found, key=lambda quota: quota.num_cores, default=None)


def _period_us(text: str) -> int:
    return int(text) if text.strip().isdecimal() and int(text) else _USUAL_PERIOD_US


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The process's own group and all groups around it, of both versions; inside a container the own group is the
    root."""
    base, folders = root / "sys/fs/cgroup", []
    tops = [base, base / "unified"]  # version 2 alone, or mounted next to version 1
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = controllers.split(",")
        if controllers and controller not in names:
            continue
        found = [base / ",".join(names), base / ",".join(reversed(names)), base / controller] if controllers else tops
        tops += found
        for top in found:
            group = top / path.lstrip("/")
            folders += [group, *(parent for parent in group.parents if parent == top or top in parent.parents)]
    return list(dict.fromkeys([*folders, *tops, base / controller]))


def usable_cores(root: Path = Path("/")) -> Cores:
    """Cores within this process's CPU affinity and its cgroups' CPU quota. Part of a core counts where it is all there
    is: a team of threads is as fast as its slowest."""
    from kimi_lite.native.cpu.placement import one_thread_per_core

    logical = psutil.cpu_count(logical=True) or os.cpu_count() or 1
    machine = psutil.cpu_count(logical=False) or logical
    allowed, physical, reasons = logical, machine, []
    if hasattr(os, "sched_getaffinity"):  # Linux
        cpus = os.sched_getaffinity(0)
        allowed = len(cpus)
        physical = min(machine, len(one_thread_per_core(cpus, root / "sys/devices/system/cpu")))
        if physical < machine:
            reasons.append(f"the CPU affinity allows {physical} of {machine} cores")
    quota = cpu_quota(root)
    if quota and quota.num_cores < allowed:
        if quota.num_cores < physical:
            reasons.append(f"the cgroup's CPU quota is {quota.num_cores:g} of {machine} cores ({quota.file})")
        allowed, physical = min(allowed, math.ceil(quota.num_cores)), min(physical, int(quota.num_cores))
    return Cores(max(1, physical), max(1, allowed), machine, tuple(reasons))


def memory_nodes(root: Path = Path("/")) -> tuple[Node, ...]:
    """The memory nodes that this process may use; () where the system does not tell."""
    return read_nodes(root=root)


def load_average() -> float | None:
    """Threads of all programs that ran or wanted to, over the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows; a container without /proc/loadavg
        return None


def disk_of(path: Path) -> Disk:
    """The disk that holds `path`, or would hold it."""
    full = path.expanduser().absolute()
    existing = next(parent for parent in (full, *full.parents) if parent.exists())
    return Disk(full, shutil.disk_usage(existing).free)


def cpu_name() -> str:
    lines = _read_text(Path("/proc/cpuinfo")).splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def clock_hz() -> float | None:
    """The fastest that a core may run, or runs now where the limit is unknown."""
    try:
        speed = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        return None
    return 1e6 * (speed.max or speed.current) if speed and (speed.max or speed.current) else None


def isa_name() -> str:
    """The kernels' path on this CPU, as `native.isa` calls it, or TILES where prompts are multiplied by them."""
    from kimi_lite.native.amx import has_amx
    from kimi_lite.native.isa import isa

    return TILES if has_amx() else isa().name


def is_wsl() -> bool:
    return "microsoft" in platform.uname().release.lower()


def is_on_windows_drive(path: Path) -> bool:
    """Whether a file of WSL2 lies on a drive of Windows, which answers many times more slowly than Linux's own disk."""
    parts = path.resolve().parts
    return is_wsl() and len(parts) > 2 and parts[1] == "mnt" and len(parts[2]) == 1


def huge_pages() -> str | None:
    """Transparent huge pages: `always`, `madvise` or `never`; None where the system has none."""
    text = _read_text(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    return text.partition("[")[2].partition("]")[0] or None


def memory_policy() -> MemoryPolicy:
    """Where pages lie that this process touches first: on the touching thread's node, unless numactl said otherwise."""
    from kimi_lite.native.cpu.pages import INTERLEAVING_POLICIES, LOCAL_POLICIES, inherited_policy

    try:
        policy = inherited_policy()
    except OSError:  # a container without the right to ask, or no Linux
        return "local"
    if policy in LOCAL_POLICIES:
        return "local"
    return "interleaved" if policy in INTERLEAVING_POLICIES else "bound"


def balances_nodes(root: Path = Path("/")) -> bool:
    """Whether the kernel moves pages between memory nodes by itself, which costs page faults all the time."""
    return bool(_read_number(root / "proc/sys/kernel/numa_balancing"))


def lockable_bytes() -> int | None:
    """`ulimit -l`: memory that this process may lock; None: no limit, or none known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_number(path: Path) -> int | None:
    text = _read_text(path).strip()
    return int(text) if text.isdecimal() else None


def _read_stat(path: Path, keys: tuple[str, ...]) -> int:
    lines = (line.split() for line in _read_text(path).splitlines())
    return max((int(parts[1]) for parts in lines if len(parts) == 2 and parts[0] in keys), default=0)


def has_nvidia_device() -> bool:
    """Whether a display or compute device of NVIDIA's is on the PCI bus."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        vendor, kind = _read_text(device / "vendor").strip(), _read_text(device / "class").strip()
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False
