"""How fast memory and a disk can be read here: the kernels' own team of threads reads memory, a few threads read a
file.

A short look of about a second each. `tools.bench.roofline` measures memory more patiently with the same kernel.
"""

import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numba import cfunc

from kimi_lite.native.cpu.compiler import KERNEL
from kimi_lite.native.cpu.threads import Program, Team, next_task
from kimi_lite.native.simd import load_i32x16, load_i64, store_i32, sum_i32x16, zero_i32x16

_TASK_BYTES = 1 << 16
_BUFFER_BYTES, _PART_BYTES = 512 << 20, 4 << 20  # larger than a desktop's caches; each thread's share of a run
_LINE_BYTES = 64
_FILE_READ_BYTES, _NUM_READERS = 8 << 20, 8  # an NVMe disk needs a queue to be fast


@cfunc(KERNEL, cache=True)
def _read_kernel(args, thread, team):
    address, num_tasks, out = load_i64(args), load_i64(args + 8), load_i64(args + 16)
    a, b, c, d = zero_i32x16(), zero_i32x16(), zero_i32x16(), zero_i32x16()
    task = next_task(team)
    while task < num_tasks:
        start = address + task * _TASK_BYTES
        for at in range(start, start + _TASK_BYTES, 256):
            a, b = a + load_i32x16(at), b + load_i32x16(at + 64)
            c, d = c + load_i32x16(at + 128), d + load_i32x16(at + 192)
        task = next_task(team)
    store_i32(out + _LINE_BYTES * thread, sum_i32x16((a + b) + (c + d)))


def read_program(data: np.ndarray, sums: np.ndarray) -> Program:
    """Reads whole tasks of contiguous `data`; `sums`: a cache line for each thread, so that no read can be left out."""
    arguments = np.array([data.ctypes.data, data.nbytes // _TASK_BYTES, sums.ctypes.data], np.int64)
    return Program([(_read_kernel.address, arguments)])


def measure_ram(num_threads: int, seconds: float = 1.0) -> float:
    """Bytes/s of plain reading by all threads: the best tenth of the runs, as other programs only make it look
    slower."""
    team = Team(num_threads)
    try:
        part_bytes = _PART_BYTES * num_threads
        parts = np.ones((max(2, _BUFFER_BYTES // part_bytes), part_bytes // 4), np.int32)
        sums = np.zeros(num_threads * _LINE_BYTES, np.uint8)
        programs = [read_program(part, sums) for part in parts]
        team.run(programs[0])
        rates, start_s = [], time.perf_counter()
        while time.perf_counter() - start_s < seconds:
            program = programs[len(rates) % len(programs)]
            run_s = time.perf_counter()
            team.run(program)
            rates.append(part_bytes / (time.perf_counter() - run_s))
        return float(np.percentile(rates, 90))
    finally:
        team.close()


def measure_disk(path: Path, seconds: float = 1.0) -> float | None:
    """Bytes/s of reading pieces all over a file past the page cache; None where the system cannot read past it."""
    if not hasattr(os, "O_DIRECT") or path.stat().st_size < 2 * _FILE_READ_BYTES:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # this file system has no such reads
        return None
    try:
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            start_s = time.perf_counter()
            num_bytes = sum(
                pool.map(lambda first: _read_pieces(descriptor, path, first, start_s + seconds), range(_NUM_READERS))
            )
            return num_bytes / (time.perf_counter() - start_s)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _read_pieces(descriptor: int, path: Path, first: int, until_s: float) -> int:
    """Reads every eighth piece from `first` on until the time is over; bytes read."""
    with mmap.mmap(-1, _FILE_READ_BYTES) as page_aligned:
        num_bytes = 0
        for offset in _offsets(path.stat().st_size, first):
            if time.perf_counter() > until_s:
                break
            num_bytes += os.preadv(descriptor, [page_aligned], offset)
        return num_bytes


def _offsets(file_bytes: int, first: int) -> Iterator[int]:
    """Pieces in an order that visits the whole file before it comes back."""
    num_pieces = file_bytes // _FILE_READ_BYTES
    for turn in range(first, num_pieces, _NUM_READERS):
        yield turn * 7919 % num_pieces * _FILE_READ_BYTES
