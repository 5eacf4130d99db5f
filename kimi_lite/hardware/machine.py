"""A machine as the planner sees it: cores, memory, GPU and disk, with the speeds that are known of them.

`hardware.probe` finds this one. One that is not here can be described by its sizes (`described`), so that a plan comes
before a purchase.
"""

import re
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from kimi_lite.hardware.nodes import MemoryPolicy, described_nodes, with_memory
from kimi_lite.native.cpu.nodes import Node
from kimi_lite.units import GIB

Origin = Literal["measured", "given", "computed", "assumed"]

# What a desktop of 2025 really delivers, for machines whose speeds are not measured: dual-channel DDR5, RTX 4090, PCIe
# 4.0, NVMe, and the clock that 16 cores keep with vector code.
TYPICAL_RAM_BYTES_S, TYPICAL_VRAM_BYTES_S = 80e9, 920e9
TYPICAL_PCIE_BYTES_S, TYPICAL_DISK_BYTES_S = 23e9, 6e9
TYPICAL_GPU_FLOPS_S = 165e12  # bfloat16 products summed in float32
TYPICAL_CORES, TYPICAL_CLOCK_HZ = 16, 4.5e9
# A socket of a server: eight channels of DDR5-4800, two thirds of their 307 GB/s; cores and the clock that they keep.
SOCKET_RAM_BYTES_S, SOCKET_CORES, SOCKET_CLOCK_HZ = 200e9, 32, 2.8e9

CUDA_BYTES = 512 << 20  # of VRAM: CUDA's context and libraries, which a process takes and torch does not count

# int8 multiply-accumulates (MACs) a cycle of one core, where none was measured. AVX-512: one 64-byte vpdpbusd (Zen 4,
# Intel's client cores), two on the CPUs below. AVX-VNNI: two of 32 bytes. AVX2: vpmaddubsw, vpmaddwd on two ports. AMX:
# 16 x 64 x 16 in 16 cycles.
TILES = "amx-int8"
_MACS_A_CYCLE = {TILES: 1024, "avx512-vnni": 64, "avx-vnni": 64, "avx2": 32, "portable": 16}
_TYPICAL_MACS_A_CYCLE = 64
_TWO_UNITS = re.compile(r"Xeon|EPYC 9\d\d5|Ryzen \w+ 9\d{3}")  # two 64-byte vpdpbusd a cycle: server cores, Zen 5


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory of the GPU."""

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
    has_display: bool = False  # a desktop draws with it, and takes more of its memory now and then
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True, slots=True)
class Disk:
    """Where the model lies, or would lie."""

    path: Path
    free_bytes: int
    read_bytes_s: float | None = None


@dataclass(frozen=True, slots=True)
class Cores:
    """What this process may compute with."""

    num_usable: int  # cores, without their second hardware threads: how many threads start by default
    most_threads: int  # hardware threads; more threads than these only wait for each other
    num_machine: int  # cores of the whole machine
    reasons: tuple[str, ...] = ()  # why not all of the machine's, in words

    def choose_threads(self, asked: int | None) -> tuple[int, str]:
        """Threads to start, and the warning that is due where they are fewer than asked for (else empty)."""
        if asked is None:
            return self.num_usable, ""
        if asked <= self.most_threads:
            return asked, ""
        why = f"; {'; '.join(self.reasons)}" if self.reasons else ""
        cores = f"{self.most_threads} hardware thread{'s' if self.most_threads > 1 else ''}"
        return self.most_threads, f"-t {asked} starts {self.most_threads}: this process can use {cores}{why}."


@dataclass(frozen=True, slots=True)
class Hardware:
    """`ram_total_bytes` is what this process may use: the machine's, or its cgroup's limit. Unknown speeds are None."""

    cpu_name: str
    num_cores: int  # that this process may use, without their second hardware threads
    isa: str  # of native.isa, or TILES; empty where not known
    ram_total_bytes: int
    ram_free_bytes: int
    ram_bytes_s: float | None = None
    gpu: Gpu | None = None
    disk: Disk | None = None
    clock_hz: float | None = None
    cpu_macs_s: float | None = None  # int8 multiply-accumulates of all cores together, at their peak
    cores: Cores | None = None  # what limits threads; None: nothing known does
    is_described: bool = False  # another machine than this one
    has_assumed_cpu: bool = False  # no CPU that was looked at
    origins: MappingProxyType[str, Origin] = field(
        default_factory=lambda: MappingProxyType({})
    )  # of the speeds: ram, disk, vram, pcie, cpu
    more_gpus: tuple[Gpu, ...] = ()  # that share the model's layers with `gpu`
    nodes: tuple[Node, ...] = ()  # of memory, where the system tells them; `ram_bytes_s` is of all together
    memory_policy: MemoryPolicy = "local"  # of pages that this process touches first

    @property
    def has_nodes(self) -> bool:
        """Whether several memory nodes have cores that this process may use, and memory."""
        return sum(bool(node.cpus) and bool(node.total_bytes) for node in self.nodes) > 1

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """All that are used, the first layers' first."""
        return (self.gpu, *self.more_gpus) if self.gpu else ()

    def assume_macs_s(self) -> float:
        """Int8 multiply-accumulates of all cores from what is known of such CPUs and their clock."""
        macs = _MACS_A_CYCLE.get(self.isa, _TYPICAL_MACS_A_CYCLE)
        if self.isa == "avx512-vnni" and _TWO_UNITS.search(self.cpu_name):
            macs *= 2
        return self.num_cores * macs * (self.clock_hz or TYPICAL_CLOCK_HZ)

    def with_speeds(self, origin: Origin, **per_s: float) -> "Hardware":
        """The same machine with these speeds known: ram, disk, vram, pcie (bytes/s), cpu (int8 MACs/s)."""
        result = replace(self, origins=MappingProxyType(dict(self.origins) | dict.fromkeys(per_s, origin)))
        known = {
            field: per_s[place] for place, field in (("ram", "ram_bytes_s"), ("cpu", "cpu_macs_s")) if place in per_s
        }
        result = replace(result, **known)
        if "disk" in per_s:
            disk = result.disk or Disk(Path.cwd(), 0)
            result = replace(result, disk=replace(disk, read_bytes_s=per_s["disk"]))
        if result.gpu:
            known = {f"{place}_bytes_s": per_s[place] for place in ("vram", "pcie") if place in per_s}
            first, *others = (replace(gpu, **known) for gpu in result.gpus)
            result = replace(result, gpu=first, more_gpus=tuple(others))
        return result


def described(
    hardware: Hardware,
    ram_bytes: int | None = None,
    vram_bytes: int | tuple[int, ...] | None = None,
    num_cores: int | None = None,
    num_sockets: int | None = None,
) -> Hardware:
    """`hardware`, or another machine where more is named than it has. Limits below what is there describe no other
    machine. 0 bytes of VRAM: no GPU; several sizes: so many GPUs. num_sockets: of a server, with `num_cores` in all.

    More RAM alone is this machine with more modules: its CPU and its speeds stay. A GPU that is not here, or a number
    of cores, is a machine with an assumed CPU, whatever its memory: the CPU never changes with the RAM.
    """
    if vram_bytes == 0:
        hardware = replace(hardware, gpu=None, more_gpus=())
    sizes = vram_bytes if isinstance(vram_bytes, tuple) else (vram_bytes,) * max(1, len(hardware.gpus))
    gpus = [_described_gpu(gpu, size) for gpu, size in zip_longest(hardware.gpus, sizes)][: len(sizes)]
    has_other_gpu = any(gpu is not here for gpu, here in zip_longest(gpus, hardware.gpus[: len(sizes)]))
    if has_other_gpu or len(gpus) < len(hardware.gpus):
        hardware = replace(hardware, gpu=gpus[0], more_gpus=tuple(gpus[1:]))
    if num_sockets:
        hardware = _with_assumed_server(hardware, num_cores or num_sockets * SOCKET_CORES, num_sockets)
    elif has_other_gpu or num_cores:
        hardware = _with_assumed_cpu(hardware, num_cores or TYPICAL_CORES)
    if ram_bytes is not None and (ram_bytes > hardware.ram_total_bytes or hardware.has_assumed_cpu):
        added_bytes = ram_bytes - hardware.ram_total_bytes
        free_bytes = free_of(ram_bytes)
        if not hardware.has_assumed_cpu:
            free_bytes = max(free_bytes, hardware.ram_free_bytes + added_bytes)
        hardware = replace(hardware, ram_total_bytes=ram_bytes, ram_free_bytes=free_bytes, is_described=True)
        if hardware.nodes:
            hardware = replace(hardware, nodes=with_memory(hardware.nodes, ram_bytes, free_bytes))
    return hardware


def _described_gpu(gpu: Gpu | None, size_bytes: int | None) -> Gpu | None:
    """The GPU, or another where more memory is named than it has."""
    if not size_bytes or (gpu is not None and size_bytes <= gpu.vram_total_bytes):
        return gpu
    return Gpu("GPU (assumed: like an RTX 4090)", size_bytes, int(size_bytes * 0.97))


def _with_assumed_cpu(hardware: Hardware, num_cores: int) -> Hardware:
    """A desktop whose speeds are unknown; its memory is as large as this machine's where no other is named."""
    return replace(
        hardware,
        cpu_name=f"{num_cores}-core desktop (assumed)",
        num_cores=num_cores,
        isa="",
        ram_free_bytes=free_of(hardware.ram_total_bytes),
        ram_bytes_s=None,
        clock_hz=None,
        cpu_macs_s=None,
        cores=None,
        disk=None,
        nodes=(),
        memory_policy="local",
        is_described=True,
        has_assumed_cpu=True,
        origins=MappingProxyType(
            {place: hardware.origins[place] for place in ("vram", "pcie") if place in hardware.origins}
        ),
    )


def _with_assumed_server(hardware: Hardware, num_cores: int, num_sockets: int) -> Hardware:
    """One whose sockets have memory of their own; speeds are those of such sockets."""
    server = _with_assumed_cpu(hardware, num_cores)
    sockets = f"{num_sockets} sockets" if num_sockets > 1 else "one socket"
    return replace(
        server,
        cpu_name=f"server of {sockets}, {num_cores} cores (assumed)",
        clock_hz=SOCKET_CLOCK_HZ,
        ram_bytes_s=num_sockets * SOCKET_RAM_BYTES_S,
        origins=MappingProxyType({**server.origins, "ram": "assumed"}),
        nodes=described_nodes(num_sockets, num_cores, server.ram_total_bytes, server.ram_free_bytes),
    )


def free_of(ram_total_bytes: int) -> int:
    """What system, firmware and a quiet desktop leave of installed memory: 243.8 of 256 GiB, 13.4 of 16."""
    return max(0, int(ram_total_bytes * 0.96) - 2 * GIB)


def gpu_index_of(device: str | None) -> int:
    """CUDA's number: 1 of "cuda:1", 0 of "cuda" and where no device is named."""
    number = (device or "").partition(":")[2]
    return int(number) if number.isdecimal() else 0
