"""Locks memory, so that nothing is paged out while another program is hungry."""

import ctypes
import os
import sys
from collections.abc import Sequence

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.units import gib


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
