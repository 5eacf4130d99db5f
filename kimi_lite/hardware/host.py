"""What the operating system says about this machine: memory and its limits, cores, disks. No policy; used by
`hardware.probe` and by `apps.doctor`.
"""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from kimi_lite.hardware.probe import Disk

_NO_LIMIT_BYTES = 1 << 60  # control groups say "none" with numbers near 2^63


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of memory in all and free, within the control group's limit where there is one. Caches of files count as
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
    """The tightest memory limit of the control groups that hold this process, version 2 or 1; None where there is
    none."""
    found = []
    for folder in _cgroup_folders(root):
        for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit, used = (_read_number(folder / name) for name in names)
            if limit is not None and limit < _NO_LIMIT_BYTES:
                reclaimable = _read_stat(folder / "memory.stat", ("inactive_file", "total_inactive_file"))
                found.append(CgroupLimit(limit, max(0, (used or 0) - reclaimable), folder / names[0]))
    return min(found, key=lambda limit: limit.limit_bytes, default=None)


def _cgroup_folders(root: Path) -> list[Path]:
    """The process's own group and all groups around it, of both versions; inside a container the own group is the
    root."""
    base, folders = root / "sys/fs/cgroup", []
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top = base / "memory" if controllers else base
        group = top / path.lstrip("/")
        folders += [group, *(parent for parent in group.parents if parent == top or top in parent.parents)]
    return list(dict.fromkeys([*folders, base, base / "memory"]))


def disk_of(path: Path) -> Disk:
    """The disk that holds `path`, or would hold it."""
    full = path.expanduser().absolute()
    existing = next(parent for parent in (full, *full.parents) if parent.exists())
    return Disk(full, shutil.disk_usage(existing).free)


def physical_cores() -> int:
    """Cores that this process may use, without their second hardware threads."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


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
    """The kernels' path on this CPU, as `native.isa` calls it."""
    from kimi_lite.native.isa import isa

    return isa().name


def is_wsl() -> bool:
    return "microsoft" in platform.uname().release.lower()


def huge_pages() -> str | None:
    """Transparent huge pages: `always`, `madvise` or `never`; None where the system has none."""
    text = _read_text(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    return text.partition("[")[2].partition("]")[0] or None


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
