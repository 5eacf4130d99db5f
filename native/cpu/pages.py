"""Pages of memory on several nodes: put there by first touch, and asked of the kernel afterwards.

Linux gives a page that is touched for the first time memory of the node on which the touching thread runs, as long as
that node has any. So what threads of one node will read is touched by threads that are kept to its cores: that needs
no right that a container may lack, and no policy of a range of addresses, of which a process may have 65,530 (`mbind`
makes one for each part of each expert). Where a node is full the kernel takes another; `locate` says where pages came
to lie, and `inherited_policy` whether who started this process (`numactl --interleave=all`) decides instead.

    spans = Spans.repeated(address, period, count, [(0, middle, 0), (middle, period, 1)])  # of slots: halves
    touch(spans, groups)
    locate(addresses)  # the node of each page; OSError where the system forbids the question
"""

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kimi_lite.native.cpu.nodes import ThreadGroup
from kimi_lite.native.cpu.placement import keep_to

PAGE_BYTES, HUGE_PAGE_BYTES = 4096, 2 << 20
LOCAL_POLICIES, INTERLEAVING_POLICIES = (0, 4), (3, 6)  # MPOL_DEFAULT, MPOL_LOCAL; MPOL_(WEIGHTED_)INTERLEAVE
_GET_POLICY = {"x86_64": 239, "aarch64": 236, "riscv64": 236}  # Linux: numbers of system calls
_MOVE_PAGES = {"x86_64": 279, "aarch64": 239, "riscv64": 239}
_PAGES_AT_ONCE = 1 << 16
_TOUCHING_THREADS = 16  # of each node, at most: one core clears 0.5 GB/s of small pages (tools/LOG.md)

SystemCall = Callable[..., int]


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Bytes from `starts[i]` to the next start, or to `stop`, are read by threads of group `owners[i]`."""

    starts: np.ndarray  # int64 (n,), ascending: addresses, or offsets
    owners: np.ndarray  # int64 (n,)
    stop: int

    @classmethod
    def repeated(cls, base: int, period: int, count: int, parts: Sequence[tuple[int, int, int]]) -> "Spans":
        """`count` times the same parts (start, stop, owner), ascending, within `period` bytes from `base` on. Bytes
        between two parts go with the first of them."""
        assert parts and parts[0][0] >= 0 and parts[-1][1] <= period, (parts, period)
        starts = np.array([0, *(start for start, _, _ in parts[1:])], np.int64)
        places = base + period * np.arange(count, dtype=np.int64)[:, None] + starts  # (count, parts)
        owners = np.broadcast_to(np.array([owner for _, _, owner in parts], np.int64), places.shape)
        return cls(places.reshape(-1), owners.reshape(-1), base + period * count)

    def owners_at(self, addresses: np.ndarray) -> np.ndarray:
        """int64 (n,): whose bytes these are; those before the first start are its owner's."""
        return self.owners[np.maximum(np.searchsorted(self.starts, addresses, side="right") - 1, 0)]

    def owners_of_pages(self, first: int, num_pages: int, page_bytes: int) -> np.ndarray:
        """int64 (num_pages,), from the page at `first` on: whose byte is in the middle of each."""
        return self.owners_at(first + page_bytes // 2 + page_bytes * np.arange(num_pages, dtype=np.int64))


def strange_share(spans: Spans, page_bytes: int) -> float:
    """Share of the bytes that are on a page of another group's, with pages of this size."""
    first = int(spans.starts[0]) // page_bytes * page_bytes
    num_small = -(-(spans.stop - first) // PAGE_BYTES)
    own = spans.owners_of_pages(first, num_small, PAGE_BYTES)
    of_page = spans.owners_of_pages(first, -(-num_small * PAGE_BYTES // page_bytes), page_bytes)
    return float(np.mean(own != np.repeat(of_page, page_bytes // PAGE_BYTES)[:num_small]))


def page_runs(spans: Spans, page_bytes: int) -> list[tuple[int, int, int]]:
    """(start, stop, owner) of neighbouring pages of one owner each, over all of the spans. The first and the last page
    reach no further than the spans do."""
    begin = int(spans.starts[0])
    first, runs = begin // page_bytes * page_bytes, []
    for chunk in range(first, spans.stop, page_bytes * _PAGES_AT_ONCE):
        num_pages = min(_PAGES_AT_ONCE, -(-(spans.stop - chunk) // page_bytes))
        owners = spans.owners_of_pages(chunk, num_pages, page_bytes)
        borders = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), num_pages]
        for page, end in pairwise(borders):
            start, stop = chunk + page * page_bytes, chunk + end * page_bytes
            runs.append((max(begin, start), min(spans.stop, stop), int(owners[page])))
    return runs


def touch(
    spans: Spans,
    groups: Sequence[ThreadGroup],
    page_bytes: int = PAGE_BYTES,
    clear: Callable[[int, int], object] = lambda start, num_bytes: ctypes.memset(start, 0, num_bytes),
    keep: Callable[[Collection[int]], None] = keep_to,
) -> None:
    """Clears memory that nothing has touched yet: each page by a thread on the cores of its owner's group."""
    runs = page_runs(spans, page_bytes)
    with ExitStack() as opened:
        done = []
        for number, group in enumerate(groups):
            num_threads = min(_TOUCHING_THREADS, group.num_threads)
            pool = ThreadPoolExecutor(num_threads, initializer=keep, initargs=(group.cpus,))
            opened.enter_context(pool)
            done += [pool.submit(clear, start, stop - start) for start, stop, owner in runs if owner == number]
        for each in done:
            each.result()


def system_call(number: int, *arguments: int) -> int:
    """What the kernel answers; OSError where it refuses, or this system has no such calls."""
    library = ctypes.CDLL(None, use_errno=True)
    result = library.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def inherited_policy(call: SystemCall = system_call) -> int:
    """The calling thread's policy for new pages (MPOL_DEFAULT is 0). OSError where the system does not tell."""
    mode = ctypes.c_int(0)
    call(_number(_GET_POLICY), ctypes.addressof(mode), 0, 0, 0, 0)
    return mode.value


def locate(addresses: np.ndarray, call: SystemCall = system_call) -> np.ndarray:
    """int32 (n,): the node of the page at each address (int64), or a negative number for one that has no memory yet.
    OSError where the system does not tell."""
    pages = np.ascontiguousarray(addresses, np.int64) // PAGE_BYTES * PAGE_BYTES
    status = np.full(len(pages), -1, np.int32)
    call(_number(_MOVE_PAGES), 0, len(pages), pages.ctypes.data, 0, status.ctypes.data, 0)
    return status


def _number(numbers: dict[str, int]) -> int:
    number = numbers.get(platform.machine())
    if sys.platform != "linux" or number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return number
