"""Which path a model takes: the GPU's where there is one that can, else the CPU's.

Imports torch only where a GPU's driver is found.
"""

import os
import re
import warnings

from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware.gpu import count_gpus, probe_gpu
from kimi_lite.hardware.machine import Gpu, gpu_index_of
from kimi_lite.units import counted

_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def choose_device(wanted: str | None) -> str:
    """ "cpu", "cuda", "cuda:N" or several of these with commas between. None: CUDA where it can be used, with one
    warning where a GPU is found and cannot.

    A small kernel runs on the GPU before this returns it, so that what is missing is seen before a weight is read.

    Raises KimiLiteError for a device that cannot be had.
    """
    names = named_devices(wanted)
    if wanted == "cpu" or (wanted is None and not has_nvidia_driver()):
        return "cpu"
    _let_memory_grow()
    from kimi_lite.native.gpu.support import why_unusable

    unusable = next((why for name in names if (why := why_unusable(gpu_index_of(name)))), None)
    if unusable is None:
        return wanted or "cuda"
    if wanted is not None:
        raise KimiLiteError(f"--device {wanted}: {unusable.problem}", f"{unusable.remedy} Or --device cpu.")
    reason = f"The GPU is not used, everything runs on the CPU: {unusable.problem} {unusable.remedy}"
    warnings.warn(reason, RuntimeWarning, stacklevel=2)
    return "cpu"


def named_devices(wanted: str | None) -> list[str]:
    """ "cpu" alone, or names of GPUs, each once; None: "cuda". Raises KimiLiteError for what is no device."""
    names = (wanted or "cuda").split(",")
    is_known = all(_DEVICE.fullmatch(name) for name in names)
    if not is_known or (len(names) > 1 and ("cpu" in names or len(set(map(gpu_index_of, names))) < len(names))):
        runs_on = "cuda, cuda:N, several of these as cuda:0,cuda:1, and cpu"
        raise KimiLiteError(f"--device {wanted}: kimi-lite runs on {runs_on}.", "Try --device cpu.")
    return names


def require_gpus(wanted: str | None) -> None:
    """Raises KimiLiteError where `wanted` names a GPU by a number that CUDA does not count here."""
    count = count_gpus()
    missing = [name for name in named_devices(wanted) if gpu_index_of(name) >= max(1, count)]
    if missing:
        have = f"CUDA counts {counted(count, 'GPU')} here" + (", from cuda:0 on" if count else "")
        remedy = "Try --device cuda:0" if count else "Try --device cpu"
        raise KimiLiteError(
            f"--device {wanted}: there is no {missing[0]}; {have}.", f"{remedy}, or describe a machine: --vram 24G."
        )


def _let_memory_grow() -> None:
    """Before CUDA starts: torch's blocks of VRAM grow at their end. Prompts want other sizes at every depth, and blocks
    that cannot grow end as gaps that nothing fits into."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def find_gpu(device: str) -> Gpu | None:
    """What the planner must know of the GPU; None for the CPU. NVML tells the most, torch at least how much is
    free."""
    if device == "cpu":
        return None
    if gpu := probe_gpu(gpu_index_of(device)):
        return gpu
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return Gpu(torch.cuda.get_device_name(device), total_bytes, free_bytes)


def has_nvidia_driver() -> bool:
    """Whether NVIDIA's driver is here and sees a GPU, asked of the driver itself."""
    return count_gpus() > 0
