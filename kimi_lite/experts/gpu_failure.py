"""What can go wrong on a GPU, in sentences: its memory ends, it reports an error, or it does not answer any more.

    with told("in a pass over 512 tokens", "Allow fewer experts there: --gpu-experts."):
        ...torch and Triton...

Errors come late: what a kernel did wrong is reported by whatever is asked of the GPU next, on whichever thread. So
every way into the hybrid path (loading, a pass, an image) is inside one `told`, and nothing below it interprets errors.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kimi_lite.errors import Broken, MemoryEnded
from kimi_lite.units import gib

_OF_THE_GPU = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "Triton Error [CUDA]", "cudaError")
_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation")
_RESTART = "Start kimi-lite again; if it comes back, look for the driver's word with: dmesg | grep -i nvrm"


class GpuMemoryEnded(MemoryEnded):
    """Of a GPU, or what is pinned for it."""


class GpuBroken(Broken):
    """Nothing works on this GPU: CUDA keeps the error."""

    @classmethod
    def silent(cls, limit_s: float) -> "GpuBroken":
        """It does not answer."""
        return cls(f"The GPU has not answered for {limit_s:.0f} seconds.", _RESTART)


@contextmanager
def told(doing: str, remedy: str) -> Iterator[None]:
    """Raises GpuMemoryEnded or GpuBroken in the place of torch's and Triton's errors, as far as they are the GPU's.

    doing: "while ...", "in ...". remedy: where its memory ended.
    """
    try:
        yield
    except RuntimeError as error:  # torch's errors are such, Triton's too
        if isinstance(error, torch.OutOfMemoryError) or _names(error, _OF_MEMORY):
            raise GpuMemoryEnded(f"The GPU ran out of memory {doing}: {_first_line(error)}", remedy) from error
        if isinstance(error, torch.AcceleratorError) or _names(error, _OF_THE_GPU):
            raise GpuBroken(f"The GPU reported an error {doing}: {_first_line(error)}", _RESTART) from error
        raise


def no_pinned_memory(error: RuntimeError, num_bytes: int) -> GpuMemoryEnded | None:
    """What `error` says of pinning memory of the host, if that is what it is about."""
    if not _names(error, _OF_MEMORY):
        return None
    problem = f"The system gives no pinned memory for {gib(num_bytes)}: {_first_line(error)}"
    return GpuMemoryEnded(
        problem, "Free RAM (on WSL2 raise memory= in .wslconfig and run wsl --shutdown), or say --device cpu."
    )


def _names(error: RuntimeError, words: tuple[str, ...]) -> bool:
    return any(word in str(error) for word in words)


def _first_line(error: RuntimeError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
