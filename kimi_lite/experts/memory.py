"""Memory for slots in RAM: on a border that the disk can write to, and locked where the user asks for it."""

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.units import gib

BLOCK_BYTES = 4096  # what O_DIRECT asks for; more than most disks need
RING_BYTES = 16 << 20  # of a prompt stream's pinned pieces, where MIN_PIECES take no more: what a CPU's cache holds
MIN_PIECES = 4
NUM_STAGINGS = 4  # pinned buffers of an expert each, for those on their way to slots in VRAM
_HUGE_BYTES = 1 << 22  # from here on huge pages are worth asking for


def aligned_memory(num_bytes: int, has_small_pages: bool = False) -> np.ndarray:
    """uint8 zeros on a page's border, in huge pages where the system grants them; they take memory once written.
    has_small_pages: never in huge ones.

    The process's own: shared mappings, which are Python's default, get no huge pages as Linux is usually set."""
    size = max(num_bytes, BLOCK_BYTES)
    own = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    memory = mmap.mmap(-1, size, **own)
    if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= _HUGE_BYTES:
        memory.madvise(mmap.MADV_NOHUGEPAGE if has_small_pages else mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def lock_memory(arrays: Sequence[np.ndarray]) -> None:
    """`mlock` of whole pages around each array, which also brings them in. Raises KimiLiteError with need and limit."""
    num_bytes = sum(array.nbytes for array in arrays)
    if sys.platform == "win32":
        raise KimiLiteError("Memory cannot be locked on Windows yet.", "Leave out --load lock: try --load read.")
    library = ctypes.CDLL(None, use_errno=True)
    for array in arrays:
        if array.nbytes and library.mlock(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)):
            raise _refusal(num_bytes, ctypes.get_errno())


def _refusal(num_bytes: int, error: int) -> KimiLiteError:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    have = "no limit is set" if limit == resource.RLIM_INFINITY else f"a process may lock {gib(limit)}"
    return KimiLiteError(
        f"{gib(num_bytes)} are to be locked in RAM; {have}: {os.strerror(error)}.",
        "Raise it with `ulimit -l unlimited` (limits.conf: memlock), or leave out --load lock: --load read is as fast.",
    )
