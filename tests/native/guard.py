"""Arrays between two pages that nobody may touch: a kernel that reads or writes outside of one crashes."""

import ctypes
import mmap

import numpy as np

PROT_NONE, PROT_READ = 0, 1


def at_page_end(array: np.ndarray, is_writable: bool = True) -> np.ndarray:
    """A copy whose last byte is the last before a forbidden page. Lives as long as the process."""
    num_pages = -(-array.nbytes // mmap.PAGESIZE)
    return _between(array, num_pages, num_pages * mmap.PAGESIZE - array.nbytes, is_writable)


def at_page_start(array: np.ndarray) -> np.ndarray:
    """A read-only copy whose first byte is the first after a forbidden page."""
    return _between(array, -(-array.nbytes // mmap.PAGESIZE), 0, is_writable=False)


def _between(array: np.ndarray, num_pages: int, offset: int, is_writable: bool) -> np.ndarray:
    memory = mmap.mmap(-1, (num_pages + 2) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = mmap.PAGESIZE + offset
    copy = np.frombuffer(memory, array.dtype, array.size, start).reshape(array.shape)
    copy[...] = array
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    sides = [(0, 1, PROT_NONE), (num_pages + 1, 1, PROT_NONE), *([] if is_writable else [(1, num_pages, PROT_READ)])]
    for first, count, protection in sides:
        result = protect(address + first * mmap.PAGESIZE, count * mmap.PAGESIZE, protection)
        assert result == 0, ctypes.get_errno()
    return copy
