"""Reads a model's files once, so that the first answer finds them in memory and waits for no disk. Called when a chat
starts.

Pages of a file lie on the memory node of the thread that reads them first. Where a machine has several, `runs` say
whose bytes are whose, and threads kept to those cores read them.

The map path would fault the same bytes in page by page, in the order of the first prompt, at a fraction of the disk's
speed. They come in through a mapping all the same, whole chunks at once, for so they lie in huge pages (`mapping`).
What the system holds already is not read again: a few pages of every chunk are asked for without waiting.
"""

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_lite.gguf.mapping import map_file, populate
from kimi_lite.native.cpu.placement import keep_to

CHUNK_BYTES = 8 << 20
NUM_READERS = 4  # with several memory nodes, of each
_PROBES = 4  # of a chunk


class Run(NamedTuple):
    """Bytes start .. stop of a file, which threads on these CPUs will read."""

    path: Path
    start: int
    stop: int
    cpus: Collection[int]


@dataclass(frozen=True, slots=True)
class _Chunk:
    descriptor: int
    offset: int
    num_bytes: int
    cpus: frozenset[int]  # of the threads that read it; empty: any
    mapped: np.ndarray | None  # the whole file, uint8, where reading is not divided


def warm(
    paths: Sequence[Path],
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
    num_readers: int = NUM_READERS,
    runs: Sequence[Run] = (),
) -> int:
    """Bytes that had to be read. `on_progress(bytes done, bytes in all)`; `should_stop` is asked before every chunk.
    runs: of each file in order, without overlap; what is in none of them is read by any thread."""
    with ExitStack() as opened:
        descriptors = {path: os.open(path, os.O_RDONLY) for path in paths}
        for descriptor in descriptors.values():
            opened.callback(os.close, descriptor)
            if runs and hasattr(os, "posix_fadvise"):  # what is read ahead would be the next run's, on this one's node
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        chunks = [chunk for path, descriptor in descriptors.items() for chunk in _chunks(descriptor, path, runs)]
        pools = {
            cpus: opened.enter_context(_reading_pool(cpus, num_readers))
            for cpus in dict.fromkeys(chunk.cpus for chunk in chunks)
        }
        reads = [(chunk, pools[chunk.cpus].submit(_read, chunk, should_stop)) for chunk in chunks]
        total = sum(chunk.num_bytes for chunk in chunks)
        done = num_read = 0
        for chunk, read in reads:
            done, num_read = done + chunk.num_bytes, num_read + read.result()
            on_progress(done, total)
        return num_read


def _reading_pool(cpus: frozenset[int], num_readers: int) -> ThreadPoolExecutor:
    """Threads kept to these CPUs; to none where there are none."""
    return ThreadPoolExecutor(num_readers, initializer=keep_to if cpus else None, initargs=(cpus,) if cpus else ())


def _chunks(descriptor: int, path: Path, runs: Sequence[Run]) -> list[_Chunk]:
    """All of a file in order: its runs, and what lies between them."""
    size, at, chunks = os.fstat(descriptor).st_size, 0, []
    mapped = map_file(path) if size and not runs else None
    for run in [*(run for run in runs if run.path == path), Run(path, size, size, ())]:
        for start, stop, cpus in ((at, run.start, frozenset()), (run.start, run.stop, frozenset(run.cpus))):
            chunks += [
                _Chunk(descriptor, first, min(CHUNK_BYTES, stop - first), cpus, mapped)
                for first in range(start, stop, CHUNK_BYTES)
            ]
        at = run.stop
    return chunks


def _read(chunk: _Chunk, should_stop: Callable[[], bool]) -> int:
    """Bytes read: none of a chunk in memory, none after a stop."""
    if should_stop() or _is_in_memory(chunk):
        return 0
    if chunk.mapped is not None and populate(chunk.mapped, chunk.offset, chunk.num_bytes):
        return chunk.num_bytes
    buffer = memoryview(bytearray(min(1 << 20, chunk.num_bytes)))
    stop = chunk.offset + chunk.num_bytes
    for offset in range(chunk.offset, stop, len(buffer)):
        os.preadv(chunk.descriptor, [buffer[: stop - offset]], offset)
    return chunk.num_bytes


def _is_in_memory(chunk: _Chunk) -> bool:
    """Judged by a few of its pages; False where the system cannot say."""
    step = max(chunk.num_bytes // _PROBES, 1)
    return all(is_cached(chunk.descriptor, chunk.offset + i * step) for i in range(_PROBES))


def is_cached(descriptor: int, offset: int) -> bool:
    """Whether the page cache holds this byte of the file; False where the system cannot say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except OSError:  # BlockingIOError: not there; others: a file system without the flag
        return False
