"""Reads experts from the model's files into memory: a pool of threads, two queues, and no page cache where it can be
avoided.

A job is one expert: three runs of bytes that go to given places. Jobs are cut into pieces of a megabyte, so that all
threads work on the expert that is needed first, and a guess that turns out wrong can be dropped between two pieces.
What is needed now goes before what is guessed. `os.preadv` lets go of the GIL, so a kernel or the next Python line runs
while the disk works.

With O_DIRECT the disk writes straight into the slots: a copy less, and no second copy of the model in the page cache,
where it would push out what the budget is for. Offset, length and address must then be multiples of 4096, so a
piece reads whole blocks and the expert begins somewhere in the first one.

Where the page cache is meant to hold the model, `ShardReader` alone reads through it, on the caller's threads: what is
cached is copied without a page fault, and what is not is asked for as a whole before the first byte of it is waited
for, because the system's own read-ahead, 128 KiB at a time, keeps no disk busy.
"""

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.memory import BLOCK_BYTES, aligned_memory

_PIECE_BYTES = 1 << 20
_NOT_CACHED = {errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL}  # of a read that must not wait for the disk
Caching = Literal["direct", "dropped", "kept"]  # past the page cache; out of it after each read; in it


@dataclass(frozen=True, slots=True)
class FileRun:
    """`num_bytes` of a file from `start` on."""

    shard: Path
    start: int
    num_bytes: int

    @property
    def first_block(self) -> int:
        return self.start // BLOCK_BYTES * BLOCK_BYTES

    @property
    def target_bytes(self) -> int:
        """Whole blocks that hold the run wherever it begins in the first one: what its target must have."""
        return (-(-self.num_bytes // BLOCK_BYTES) + 1) * BLOCK_BYTES

    def checked(self, target: np.ndarray) -> np.ndarray:
        """`target`, which can take the run's blocks."""
        assert target.ctypes.data % BLOCK_BYTES == 0 and len(target) >= self.target_bytes, (
            target.ctypes.data,
            len(target),
            self,
        )
        return target

    def inside(self, target: np.ndarray) -> np.ndarray:
        """The run's bytes, uint8 (num_bytes,), in the target to which its blocks were read."""
        return target[self.start - self.first_block :][: self.num_bytes]


@dataclass(slots=True, eq=False)
class ReadJob:
    """One expert on its way. `error` or `is_cancelled`: what is in its place is nothing. Pieces: (shard, offset,
    place)."""

    pieces: deque[tuple[Path, int, np.ndarray]]
    num_left: int  # pieces that are not finished
    is_urgent: bool
    is_cancelled: bool = False
    is_started: bool = False
    error: OSError | None = None
    tag: object = None  # the caller's

    @property
    def is_done(self) -> bool:
        return self.num_left == 0


@dataclass(slots=True)
class ReadStats:
    """Since the reader was made."""

    num_bytes: int = 0  # read from the files, whole blocks counted
    busy_s: float = 0.0  # time during which at least one read was under way
    _num_busy: int = field(default=0, repr=False)
    _busy_since_s: float = field(default=0.0, repr=False)

    def begin(self) -> None:
        if self._num_busy == 0:
            self._busy_since_s = time.perf_counter()
        self._num_busy += 1

    def end(self, num_bytes: int) -> None:
        self._num_busy -= 1
        self.num_bytes += num_bytes
        if self._num_busy == 0:
            self.busy_s += time.perf_counter() - self._busy_since_s


class ShardReader:
    """The shards of a model, read at any place by any thread, which waits. `close` closes them."""

    def __init__(self, shards: Sequence[Path], caching: Caching = "kept") -> None:
        """caching: "direct" becomes "dropped" where file system or machine does not allow it (see `is_direct`
        afterwards). Raises KimiLiteError for a file that cannot be opened."""
        self._files = {path: _open(path, caching) for path in shards}
        self.is_direct = bool(self._files) and all(file.caching == "direct" for file in self._files.values())
        self.stats = ReadStats()
        self._lock = threading.Lock()

    def read(self, run: FileRun, target: np.ndarray) -> np.ndarray:
        """The run's bytes, uint8 (num_bytes,): the part of `target` that they were read to. Raises OSError.

        target: uint8, at least its `target_bytes`, on a border of BLOCK_BYTES.
        """
        self._read(run.shard, run.first_block, run.checked(target)[: run.target_bytes])
        return run.inside(target)

    def read_exactly(self, run: FileRun, target: np.ndarray) -> None:
        """The run's bytes, and no others, into `target`, uint8 (num_bytes,), through the page cache. Raises OSError."""
        assert not self.is_direct and len(target) == run.num_bytes, (self.is_direct, len(target), run)
        self._read(run.shard, run.start, target)

    def _read(self, shard: Path, offset: int, place: np.ndarray) -> None:
        with self._lock:
            self.stats.begin()
        num_bytes = 0
        try:
            num_bytes = self._read_piece(shard, offset, place)
        finally:
            with self._lock:
                self.stats.end(num_bytes)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _read_piece(self, shard: Path, offset: int, place: np.ndarray) -> int:
        """Bytes read. Raises OSError that names the file."""
        try:
            return self._files[shard].read_into(place, offset)
        except OSError as error:
            error.filename = str(shard)
            raise


class ExpertReader(ShardReader):
    """A pool of `num_readers` threads over the shards of a model; `close` ends them."""

    def __init__(self, shards: Sequence[Path], num_readers: int, is_direct: bool = True) -> None:
        """is_direct: past the page cache, where file system and machine allow (see `is_direct` afterwards)."""
        assert num_readers >= 1, num_readers
        super().__init__(shards, "direct" if is_direct else "dropped")
        self._has_work, self._has_result = threading.Condition(self._lock), threading.Condition(self._lock)
        self._urgent: deque[ReadJob] = deque()
        self._early: deque[ReadJob] = deque()
        self._finished: list[ReadJob] = []
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"kimi-lite-read-{i}", daemon=True) for i in range(num_readers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, runs: Sequence[tuple[FileRun, np.ndarray]], is_urgent: bool, tag: object = None) -> ReadJob:
        """Begin to read. Each run has its target (uint8, at least `target_bytes`, on a border of BLOCK_BYTES)."""
        pieces = deque(piece for run, target in runs for piece in self._cut(run, target))
        job = ReadJob(pieces, len(pieces), is_urgent, tag=tag)
        with self._lock:
            (self._urgent if is_urgent else self._early).append(job)
            self._has_work.notify(min(len(pieces), len(self._threads)))
        return job

    def hurry(self, job: ReadJob) -> None:
        """A guess came true: its remaining pieces go with what is needed now."""
        with self._lock:
            if not job.is_urgent and not job.is_done:
                job.is_urgent = True
                if job.pieces:
                    self._urgent.append(job)  # its place in the other queue is skipped when its turn comes

    def withdraw(self, job: ReadJob) -> bool:
        """Take back a job of which nothing has been read: its place is free at once. False where a thread was
        faster."""
        with self._lock:
            if not job.is_started:
                self._drop_pieces(job)
            return not job.is_started

    def cancel(self, job: ReadJob) -> None:
        """Read no further pieces of a job that has begun; it ends among `finished`, unless all of it had come
        already."""
        with self._lock:
            if job.is_done:
                return
            self._drop_pieces(job)
            if job.is_done:
                self._finished.append(job)

    def _drop_pieces(self, job: ReadJob) -> None:
        job.is_cancelled = True
        job.num_left -= len(job.pieces)
        job.pieces.clear()

    def finished(self, is_waiting: bool = False) -> list[ReadJob]:
        """Jobs that ended since the last call, well or not; with `is_waiting`, at least one. Of one caller only."""
        with self._lock:
            while is_waiting and not self._finished:
                self._has_result.wait()
            found, self._finished = self._finished, []
        return found

    def close(self) -> None:
        """End the threads; whatever was not read is not read. A second call does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._has_work.notify_all()
        for thread in self._threads:
            thread.join()
        super().close()

    def _cut(self, run: FileRun, target: np.ndarray) -> list[tuple[Path, int, np.ndarray]]:
        run.checked(target)
        first, end = run.first_block, run.start + run.num_bytes
        return [
            (run.shard, at, target[at - first : min(at + _PIECE_BYTES, -(-end // BLOCK_BYTES) * BLOCK_BYTES) - first])
            for at in range(first, end, _PIECE_BYTES)
        ]

    def _serve(self) -> None:
        while True:
            with self._lock:
                taken = self._take()
                while taken is None and not self._is_closed:
                    self._has_work.wait()
                    taken = self._take()
                if self._is_closed:
                    return
                job, (shard, offset, place) = taken
                self.stats.begin()
            error, num_bytes = None, 0
            try:
                num_bytes = self._read_piece(shard, offset, place)
            except OSError as caught:
                error = caught
            with self._lock:
                self.stats.end(num_bytes)
                self._finish_piece(job, error)

    def _take(self) -> tuple[ReadJob, tuple[Path, int, np.ndarray]] | None:
        for queue, is_urgent in ((self._urgent, True), (self._early, False)):
            while queue:
                job = queue[0]
                if job.pieces and job.is_urgent == is_urgent:
                    job.is_started = True
                    return job, job.pieces.popleft()
                queue.popleft()
        return None

    def _finish_piece(self, job: ReadJob, error: OSError | None) -> None:
        job.num_left -= 1
        if error is not None:
            job.error = job.error or error
            job.num_left -= len(job.pieces)
            job.pieces.clear()
        if job.is_done:
            self._finished.append(job)
            self._has_result.notify_all()


class _File:
    """One shard, open for reading at any place by any thread."""

    def __init__(self, path: Path, descriptor: int, caching: Caching) -> None:
        self.path, self.caching = path, caching
        self._descriptor = descriptor
        self._lock = None if hasattr(os, "preadv") else threading.Lock()
        self._num_bytes = os.fstat(descriptor).st_size

    def read_into(self, place: np.ndarray, offset: int) -> int:
        """Fill `place` from `offset`; only the end of the file may cut it short. Raises OSError."""
        want = min(len(place), self._num_bytes - offset)
        done = self._read_cached(memoryview(place), offset, want) if self.caching == "kept" else 0
        while done < want:
            count = self._read_some(memoryview(place)[done:], offset + done)
            if count == 0:
                raise OSError(
                    0, f"the file ends at byte {offset + done:,}, and had {self._num_bytes:,} when it was opened"
                )
            done += count
            if done < want and self.caching == "direct":
                done = done // BLOCK_BYTES * BLOCK_BYTES  # go on at a border
        if self.caching == "dropped" and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, want, os.POSIX_FADV_DONTNEED)  # the slots are the cache
        return want

    def _read_cached(self, place: memoryview, offset: int, want: int) -> int:
        """What the page cache has, up to the first byte that it lacks; from there on the disk is asked for all."""
        done = 0
        if hasattr(os, "RWF_NOWAIT"):
            try:
                done = os.preadv(self._descriptor, [place], offset, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno not in _NOT_CACHED:
                    raise
        if done < want and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset + done, want - done, os.POSIX_FADV_WILLNEED)
        return done

    def _read_some(self, place: memoryview, offset: int) -> int:
        if self._lock is None:
            return os.preadv(self._descriptor, [place], offset)
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, len(place))
        place[: len(data)] = data
        return len(data)

    def close(self) -> None:
        os.close(self._descriptor)


def _open(path: Path, caching: Caching) -> _File:
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        if caching == "direct" and hasattr(os, "O_DIRECT"):
            try:
                return _checked(_File(path, os.open(path, flags | os.O_DIRECT), caching))
            except OSError:
                pass  # tmpfs and some network file systems; the caller says so
        return _File(path, os.open(path, flags), "kept" if caching == "kept" else "dropped")
    except OSError as error:
        raise KimiLiteError(
            f"{path} cannot be read: {error.strerror}.", "Check its permissions and the disk."
        ) from error


def _checked(file: _File) -> _File:
    """Some systems open a file for direct reads and then refuse to read it."""
    try:
        file.read_into(aligned_memory(BLOCK_BYTES), 0)
    except OSError:
        file.close()
        raise
    return file


def read_failure(layer: int, expert: int, shard: Path, error: OSError) -> KimiLiteError:
    """What a read of an expert that failed means for the user. `shard`: where the error names no file."""
    where, reason = Path(error.filename or shard).name, error.strerror or str(error)
    return KimiLiteError(
        f"{where}: expert {expert} of layer {layer} could not be read: {reason}.",
        "Check the disk and its cable with: dmesg | tail. A copy of the file on another disk helps.",
    )
