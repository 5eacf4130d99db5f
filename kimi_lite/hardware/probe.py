"""The machine as the planner sees it: cores, memory, GPU and disk, with the speeds that are known of them.

    hardware = probe("models/kimi-k2.5")

Found without torch: NVML for the GPU, psutil and the kernel's files for the rest. A machine that is not this one can
be described by its sizes (`described`), so that a plan comes before a purchase.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from kimi_lite.units import GIB

Origin = Literal["measured", "given", "computed", "assumed"]

# What a desk of 2025 really delivers, for machines whose speeds nobody measured: dual-channel DDR5, RTX 4090, PCIe 4.0,
# NVMe.
TYPICAL_RAM_BYTES_S, TYPICAL_VRAM_BYTES_S = 80e9, 920e9
TYPICAL_PCIE_BYTES_S, TYPICAL_DISK_BYTES_S = 23e9, 6e9
TYPICAL_GPU_FLOPS_S = 165e12  # bfloat16 products summed in float32
TYPICAL_CORES, TYPICAL_CLOCK_HZ = 16, 5e9


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """Somebody who holds memory of the GPU."""

    pid: int
    name: str
    vram_bytes: int


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    vram_total_bytes: int
    vram_free_bytes: int
    vram_bytes_s: float | None = None  # the memory's peak
    pcie_bytes_s: float | None = None  # from pinned memory to the GPU
    driver: str = ""
    flops_s: float | None = None  # bfloat16 peak
    compute_capability: str = ""  # "8.9"
    cuda_version: str = ""  # the newest that the driver can serve
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True, slots=True)
class Disk:
    """Where the model lies, or would lie."""

    path: Path
    free_bytes: int
    read_bytes_s: float | None = None


@dataclass(frozen=True, slots=True)
class Hardware:
    """`ram_total_bytes` is what this process may use: the machine's, or its control group's limit. Unknown speeds are
    None."""

    cpu_name: str
    num_cores: int  # physical ones that this process may use
    isa: str  # of native.isa; empty where nobody asked
    ram_total_bytes: int
    ram_free_bytes: int
    ram_bytes_s: float | None = None
    gpu: Gpu | None = None
    disk: Disk | None = None
    clock_hz: float | None = None
    is_described: bool = False  # another machine than this one
    origins: MappingProxyType[str, Origin] = field(
        default_factory=lambda: MappingProxyType({})
    )  # of the speeds: ram, disk, ...

    def with_speeds(self, origin: Origin, **bytes_s: float) -> "Hardware":
        """The same machine with these speeds known: ram, disk, vram, pcie."""
        result = replace(self, origins=MappingProxyType(dict(self.origins) | dict.fromkeys(bytes_s, origin)))
        if "ram" in bytes_s:
            result = replace(result, ram_bytes_s=bytes_s["ram"])
        if "disk" in bytes_s and result.disk:
            result = replace(result, disk=replace(result.disk, read_bytes_s=bytes_s["disk"]))
        if result.gpu:
            known = {f"{place}_bytes_s": bytes_s[place] for place in ("vram", "pcie") if place in bytes_s}
            result = replace(result, gpu=replace(result.gpu, **known))
        return result


def probe(path: str | Path | None = None, is_measuring: bool = False) -> Hardware:
    """This machine; `path` is where the model lies or would lie. Measuring reads memory and disk for about a second
    each; without it, what an earlier measurement found is remembered."""
    from kimi_lite.hardware import gpu as hardware_gpu
    from kimi_lite.hardware import host
    from kimi_lite.hardware import speed as hardware_speed

    disk = host.disk_of(Path(path) if path else Path.cwd())
    total_bytes, free_bytes = host.memory()
    hardware = Hardware(
        cpu_name=host.cpu_name(),
        num_cores=host.usable_cores().num_usable,
        isa=host.isa_name(),
        ram_total_bytes=total_bytes,
        ram_free_bytes=free_bytes,
        gpu=hardware_gpu.probe_gpu(),
        disk=disk,
        clock_hz=host.clock_hz(),
        origins=MappingProxyType({"vram": "computed", "pcie": "computed"}),
    )
    if is_measuring:
        return hardware_speed.measure(hardware)
    return hardware_speed.recall(hardware)


def described(hardware: Hardware, ram_bytes: int | None, vram_bytes: int | None) -> Hardware:
    """`hardware`, or another machine where more memory is named than it has: then its speeds are unknown. 0 GiB of VRAM
    is no GPU. Limits below what is there do not describe another machine."""
    gpu = hardware.gpu
    if vram_bytes == 0:
        hardware, gpu = replace(hardware, gpu=None), None
    is_other_gpu = bool(vram_bytes) and (gpu is None or vram_bytes > gpu.vram_total_bytes)
    is_other_board = ram_bytes is not None and ram_bytes > hardware.ram_total_bytes
    if is_other_gpu:
        gpu = Gpu("a GPU", vram_bytes, int(vram_bytes * 0.97))  # driver and display take some
        hardware = replace(hardware, gpu=gpu, is_described=True)
    if is_other_board:
        hardware = replace(
            hardware,
            cpu_name="a desktop CPU",
            num_cores=TYPICAL_CORES,
            isa="",
            ram_total_bytes=ram_bytes,
            ram_free_bytes=free_of(ram_bytes),
            ram_bytes_s=None,
            clock_hz=None,
            disk=None,
            is_described=True,
        )
    return hardware


def free_of(ram_total_bytes: int) -> int:
    """What system, firmware and a quiet desktop leave of installed memory: 243.8 of 256 GiB, 13.4 of 16."""
    return max(0, int(ram_total_bytes * 0.96) - 2 * GIB)
