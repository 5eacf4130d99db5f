"""Reads a model's files once, so that the first answer finds them in memory and waits for no disk. Called when a chat
starts.

The map path would fault the same bytes in page by page, in the order of the first prompt, at a fraction of the disk's
speed. What the system holds already is not read again: a few pages of every chunk are asked for without waiting.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 8 << 20
NUM_READERS = 4
_PROBES = 4  # of a chunk
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Chunk:
    descriptor: int
    offset: int
    num_bytes: int


def warm(
    paths: Sequence[Path],
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
    num_readers: int = NUM_READERS,
) -> int:
    """Bytes that had to be read. `on_progress(bytes done, bytes in all)`; `should_stop` is asked before every chunk."""
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        chunks = [chunk for descriptor in descriptors for chunk in _chunks(descriptor)]
        total = sum(chunk.num_bytes for chunk in chunks)
        done = num_read = 0
        with ThreadPoolExecutor(num_readers) as pool:
            for chunk, chunk_read in zip(chunks, pool.map(lambda one: _read(one, should_stop), chunks), strict=True):
                done, num_read = done + chunk.num_bytes, num_read + chunk_read
                on_progress(done, total)
        return num_read
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _chunks(descriptor: int) -> list[_Chunk]:
    size = os.fstat(descriptor).st_size
    return [_Chunk(descriptor, start, min(CHUNK_BYTES, size - start)) for start in range(0, size, CHUNK_BYTES)]


def _read(chunk: _Chunk, should_stop: Callable[[], bool]) -> int:
    """Bytes read: none of a chunk in memory, none after a stop."""
    if should_stop() or _is_in_memory(chunk):
        return 0
    buffer = bytearray(1 << 20)
    for offset in range(chunk.offset, chunk.offset + chunk.num_bytes, len(buffer)):
        os.preadv(chunk.descriptor, [buffer], offset)
    return chunk.num_bytes


def _is_in_memory(chunk: _Chunk) -> bool:
    """Judged by a few of its pages; False where the system cannot say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    page = bytearray(_PAGE_BYTES)
    step = max(chunk.num_bytes // _PROBES, 1)
    try:
        return all(
            os.preadv(chunk.descriptor, [page], chunk.offset + i * step, os.RWF_NOWAIT) > 0 for i in range(_PROBES)
        )
    except OSError:  # BlockingIOError: not there; others: a file system without the flag
        return False
