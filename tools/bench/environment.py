"""What a measurement must say about where it was made: CPU, code path, memory, packages, the model file."""

import hashlib
import os
import platform
import struct
import subprocess
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import psutil

from kimi_lite import __version__
from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.header import read_header
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.gpu import probe_gpu
from kimi_lite.hardware.host import cpu_name
from kimi_lite.native.isa import isa

_PACKAGES = ("numpy", "numba", "llvmlite", "torch", "triton", "llama-cpp-python", "ik-llama-cpp-python")
_DMI_CONFIGURED_SPEED = 0x20  # SMBIOS 3.x, 7.18: memory device, configured speed in MT/s


def describe_environment(num_threads: int) -> dict:
    """JSON-ready. What the system does not tell is null."""
    return {
        "kimi_lite": __version__,
        "commit": _git_commit(),
        "cpu": cpu_name(),
        "isa": isa()._asdict(),
        "cores": psutil.cpu_count(logical=False),
        "threads": num_threads,
        "memory_bytes": psutil.virtual_memory().total,
        "memory_mt_s": _memory_mt_s(),
        "gpu": _gpu(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _gpu() -> dict | None:
    gpu = probe_gpu()
    return gpu and {"name": gpu.name, "driver": gpu.driver, "vram_bytes": gpu.vram_total_bytes}


def describe_model(store: GGUFStore, config: ModelConfig) -> dict:
    """JSON-ready: which file exactly. The header's hash covers every name, shape, type and setting, and costs no
    reading."""
    types = Counter[str]()
    for tensor in store.tensors.values():
        types[tensor.layout.name] += tensor.num_bytes
    data = np.memmap(store.path, np.uint8, mode="r")
    header_bytes = min(
        (tensor.start for tensor in read_header(store.path, memoryview(data)).tensors), default=len(data)
    )
    return {
        "name": config.name,
        "file": store.path.name,
        "file_bytes": sum(shard.stat().st_size for shard in store.shards),
        "header_sha256": hashlib.sha256(data[:header_bytes]).hexdigest(),
        "total_parameters": config.total_parameters,
        "active_parameters": config.active_parameters,
        "bytes_by_type": dict(types.most_common()),
    }


def drop_page_cache(paths: tuple[Path, ...]) -> bool:
    """Asks the system to forget the files' pages, so that they come from the disk again; False where it cannot be
    asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Of the checkout this runs from, with a "+" when files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _memory_mt_s() -> int | None:
    """The slowest module's transfers/s in millions, where the firmware's tables may be read (as root, mostly)."""
    speeds = []
    for entry in Path("/sys/firmware/dmi/entries").glob("17-*/raw"):
        try:
            raw = entry.read_bytes()
        except OSError:
            return None
        if len(raw) >= _DMI_CONFIGURED_SPEED + 2:
            speeds.append(struct.unpack_from("<H", raw, _DMI_CONFIGURED_SPEED)[0])
    return min((speed for speed in speeds if speed), default=None)
