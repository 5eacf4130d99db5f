"""How fast memory is read, int8 products are summed and a disk is read here: the kernels' own team of threads for the
first two, a few reading threads for the file.

`tools.bench.roofline` measures memory more patiently with the same kernel.
"""

import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import numpy as np
import psutil
from numba import types
from numba.extending import intrinsic

from kimi_lite.native.amx import (
    TILE_BYTES,
    TILE_ROWS,
    Shape,
    emit_product,
    emit_store,
    emit_zero,
    has_amx,
    release_tiles,
    shapes,
)
from kimi_lite.native.cpu.compiler import kernel
from kimi_lite.native.cpu.nodes import ThreadGroup
from kimi_lite.native.cpu.pages import Spans, touch
from kimi_lite.native.cpu.placement import place_threads
from kimi_lite.native.cpu.program import Op, Program
from kimi_lite.native.cpu.threads import Team, next_tasks
from kimi_lite.native.simd import load_i8x64, load_i32x16, load_i64, store_i32, sum_i32x16, zero_i32x16
from kimi_lite.native.simd_dot import dot_u8x64

_TASK_BYTES, _BAND_TASKS = 1 << 16, 8  # a thread takes at most so many at once
BUFFER_BYTES = 512 << 20  # larger than a desktop's caches
_LEAST_SHARE, _MOST_SHARE = 4 << 20, 16 << 20  # each thread's of a run: 4 MB read 0.75 to 0.9 x as fast (tools/LOG.md)
_FREE_SHARE = 0.25  # of the free memory: the most that the buffer takes
_ROUNDS, _MACS_A_ROUND = 20_000, 12 * 64  # of the loop that only multiplies: 0.1 to 1 ms
_LINE_BYTES = 64
_FILE_READ_BYTES, _NUM_READERS = 8 << 20, 8  # an NVMe disk needs a queue to be fast


@kernel
def _read_kernel(args, thread, team):
    """Each thread reads its own part of the tasks in order, as decoding reads matrices, before it helps others."""
    address, num_tasks, out = load_i64(args), load_i64(args + 8), load_i64(args + 16)
    a, b, c, d = zero_i32x16(), zero_i32x16(), zero_i32x16(), zero_i32x16()
    first, count = next_tasks(team, thread, num_tasks, _BAND_TASKS)
    while count > 0:
        start = address + first * _TASK_BYTES
        for at in range(start, start + count * _TASK_BYTES, 256):
            a, b = a + load_i32x16(at), b + load_i32x16(at + 64)
            c, d = c + load_i32x16(at + 128), d + load_i32x16(at + 192)
        first, count = next_tasks(team, thread, num_tasks, _BAND_TASKS)
    store_i32(out + _LINE_BYTES * thread, sum_i32x16((a + b) + (c + d)))


def run_bytes(num_threads: int, buffer_bytes: int = BUFFER_BYTES) -> int:
    """Of a run of reading: so many that its beginning and end count little, so few that some run is undisturbed."""
    share = max(_LEAST_SHARE, min(_MOST_SHARE, buffer_bytes // (4 * num_threads)))
    return num_threads * (share // _TASK_BYTES * _TASK_BYTES)


def parts_to_read(num_parts: int, part_bytes: int, groups: Sequence[ThreadGroup] = ()) -> np.ndarray:
    """int32 (num_parts, part_bytes / 4), with memory behind every page: where it is on several nodes, each thread's
    share of each part on its own."""
    if not groups:
        return np.ones((num_parts, part_bytes // 4), np.int32)
    parts, num_threads = np.empty((num_parts, part_bytes // 4), np.int32), groups[-1].stop
    shares = [
        (part_bytes * group.first // num_threads, part_bytes * group.stop // num_threads, number)
        for number, group in enumerate(groups)
    ]
    touch(Spans.repeated(parts.ctypes.data, part_bytes, num_parts, shares), groups)
    return parts


def read_program(data: np.ndarray, sums: np.ndarray) -> Program:
    """Reads whole tasks of contiguous `data`; `sums`: a cache line for each thread, so that no read can be left out."""
    return Program([Op.of(_read_kernel, data, data.nbytes // _TASK_BYTES, sums)])


@kernel
def _multiply_kernel(args, thread, team):
    """Twelve sums of int8 products that wait for nothing but themselves: the dot-product instruction at its peak."""
    codes, inputs, num_rounds, out = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
    w0, w1, w2, w3 = load_i8x64(codes), load_i8x64(codes + 64), load_i8x64(codes + 128), load_i8x64(codes + 192)
    a0, a1, a2, a3 = zero_i32x16(), zero_i32x16(), zero_i32x16(), zero_i32x16()
    b0, b1, b2, b3 = zero_i32x16(), zero_i32x16(), zero_i32x16(), zero_i32x16()
    c0, c1, c2, c3 = zero_i32x16(), zero_i32x16(), zero_i32x16(), zero_i32x16()
    for number in range(num_rounds):
        at = inputs + 192 * (number & 7)  # other inputs each time, or a compiler multiplies only once
        x, y, z = load_i8x64(at), load_i8x64(at + 64), load_i8x64(at + 128)
        a0, a1, a2, a3 = dot_u8x64(a0, w0, x), dot_u8x64(a1, w1, x), dot_u8x64(a2, w2, x), dot_u8x64(a3, w3, x)
        b0, b1, b2, b3 = dot_u8x64(b0, w0, y), dot_u8x64(b1, w1, y), dot_u8x64(b2, w2, y), dot_u8x64(b3, w3, y)
        c0, c1, c2, c3 = dot_u8x64(c0, w0, z), dot_u8x64(c1, w1, z), dot_u8x64(c2, w2, z), dot_u8x64(c3, w3, z)
    a, b, c = (a0 + a1) + (a2 + a3), (b0 + b1) + (b2 + b3), (c0 + c1) + (c2 + c3)
    store_i32(out + _LINE_BYTES * thread, sum_i32x16(a + b + c))


_whole_tiles = shapes(*[Shape()] * 8)


@intrinsic
def _clear_sums(typingctx):
    def codegen(context, builder, sig, args):
        for tile in range(8):
            emit_zero(builder, tile)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _multiply_tiles(typingctx):
    """Four sums, each of two tiles' products, one after the other."""

    def codegen(context, builder, sig, args):
        for total in range(4):
            emit_product(builder, total, 4 + total // 2, 6 + total % 2, is_signed=False)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _store_sum(typingctx, out):
    def codegen(context, builder, sig, args):
        emit_store(builder, 0, args[0], TILE_BYTES)
        return context.get_dummy_value()

    return types.void(out), codegen


@kernel
def _tiles_kernel(args, thread, team):
    """Sums of products of matrix tiles that wait for nothing but themselves: their peak."""
    num_rounds, out = load_i64(args), load_i64(args + 8)
    _whole_tiles()
    _clear_sums()
    for _ in range(num_rounds):
        _multiply_tiles()
    _store_sum(out)
    release_tiles()


def _peak_program(with_tiles: bool) -> tuple[Program, float]:
    """What multiplies fastest here, and how many int8 products it makes."""
    if with_tiles and has_amx():
        out = np.zeros(TILE_ROWS * TILE_BYTES, np.uint8)
        return Program([Op.of(_tiles_kernel, _ROUNDS, out)]), _ROUNDS * 4.0 * TILE_ROWS * TILE_BYTES * TILE_ROWS
    codes, inputs, sums = np.ones(256, np.uint8), np.ones(8 * 192, np.int8), np.zeros(_LINE_BYTES, np.uint8)
    return Program([Op.of(_multiply_kernel, codes, inputs, _ROUNDS, sums)]), _ROUNDS * _MACS_A_ROUND


def measure_macs(num_cores: int, seconds: float = 0.1, with_tiles: bool = True) -> float:
    """Int8 multiply-accumulates/s of so many cores at the peak of matrix tiles, where there are any and `with_tiles`
    says so, else of the dot product: the best tenth of one core's runs, times the cores; where other programs run, all
    cores are seldom undisturbed at once."""
    team = Team(1)
    try:
        program, num_products = _peak_program(with_tiles)
        rates = _rates(lambda: team.run(program), num_products, seconds)
        return num_cores * float(np.percentile(rates, 90))
    finally:
        team.close()


def _rates(run: Callable[[], None], amount: float, seconds: float) -> list[float]:
    """Amounts/s of one run after another until the time is over."""
    run()  # threads are awake, memory is there
    rates, start_s = [], time.perf_counter()
    while not rates or time.perf_counter() - start_s < seconds:
        run_s = time.perf_counter()
        run()
        rates.append(amount / (time.perf_counter() - run_s))
    return rates


def measure_ram(num_threads: int, seconds: float = 1.0, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Bytes/s of plain reading by all threads: the best tenth of the runs, as other programs only make it look
    slower. Where memory is on several nodes each thread reads what lies on its own."""
    groups = place_threads(num_threads)
    team = Team(num_threads, groups)
    try:
        buffer_bytes = min(buffer_bytes, int(_FREE_SHARE * psutil.virtual_memory().available))
        part_bytes = run_bytes(num_threads, buffer_bytes)
        num_parts, sums = max(2, buffer_bytes // part_bytes), np.zeros(num_threads * _LINE_BYTES, np.uint8)
        programs = cycle([read_program(part, sums) for part in parts_to_read(num_parts, part_bytes, groups)])
        return float(np.percentile(_rates(lambda: team.run(next(programs)), part_bytes, seconds), 90))
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
