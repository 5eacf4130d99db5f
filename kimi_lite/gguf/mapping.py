"""Files mapped into memory, in huge pages where Linux has any for them.

A page of 2 MB takes one entry of the core's address tables where 512 of 4 KB do not fit, and the hardware prefetches
across it without a stop: dense weights are read 1.2 to 1.9 x as fast (tools/LOG.md). Linux keeps a file in pages of the
size in which it first came into memory. Huge ones come where a mapping that asks for them is read (measured on ext4
under Linux 6.18), or where 2 MB are written at once (`files.write_huge`); what `read` brought in stays small until it
is evicted, as on file systems without large pages, which do not mind being asked.
"""

import ctypes
import mmap
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from kimi_lite.native.cpu.nodes import compute_nodes, read_nodes

_MADV_POPULATE_READ = 22  # from Linux 5.14 on


def map_file(path: Path) -> np.ndarray:
    """uint8, read only: the bytes of a file that is not empty, mapped. Raises OSError.

    Small pages are asked for where memory is on several nodes: there the rows of a matrix, which are smaller than huge
    pages, each lie on the node of their threads."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE") and len(compute_nodes(read_nodes())) < 2:
        with suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)


@cache
def _madvise():
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def populate(mapped: np.ndarray, start: int, num_bytes: int) -> bool:
    """Brings bytes of what `map_file` returned into memory, `start` on a page's border; False where the system cannot,
    or failed to read them: then `read` works, or tells why not."""
    if sys.platform != "linux":
        return False
    return _madvise()(mapped.ctypes.data + start, num_bytes, _MADV_POPULATE_READ) == 0
