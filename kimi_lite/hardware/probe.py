"""This machine, found without torch: NVML for the GPU, psutil and the kernel's files for the rest.

hardware = probe("models/kimi-k2.5")
"""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from kimi_lite.hardware import host, speed
from kimi_lite.hardware.gpu import count_gpus, probe_gpu
from kimi_lite.hardware.machine import Hardware


def probe(path: str | Path | None = None, is_measuring: bool = False, gpu_indices: Sequence[int] = (0,)) -> Hardware:
    """This machine; `path` is where the model lies or would lie, `gpu_indices` CUDA's numbers of the GPUs; those that
    are not here are left out. Measuring reads memory and disk for about a second each. Without it, what was measured
    before is remembered; memory and arithmetic are looked at for 0.2 s where that has not happened today."""
    disk = host.disk_of(Path(path) if path else Path.cwd())
    total_bytes, free_bytes = host.memory()
    cores = host.usable_cores()
    here = [index for index in gpu_indices if index == 0 or index < count_gpus()]
    gpus = [gpu for index in here if (gpu := probe_gpu(index)) is not None]
    hardware = Hardware(
        cpu_name=host.cpu_name(),
        num_cores=cores.num_usable,
        isa=host.isa_name(),
        ram_total_bytes=total_bytes,
        ram_free_bytes=free_bytes,
        gpu=gpus[0] if gpus else None,
        more_gpus=tuple(gpus[1:]),
        disk=disk,
        clock_hz=host.clock_hz(),
        cores=cores,
        nodes=host.memory_nodes(),
        memory_policy=host.memory_policy(),
        origins=MappingProxyType({"vram": "computed", "pcie": "computed"}),
    )
    if is_measuring:
        return speed.measure(hardware)
    return speed.glance(hardware)
