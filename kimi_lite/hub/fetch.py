"""Files of a repository into the hub's cache: several at a time, each from where an earlier run ended, compared with
its checksum, and under its own name only when it is whole.

The hub's own library begins a file anew after an interruption (huggingface_hub 2.4 deletes what it has) and compares
sizes alone; a shard of Kimi has 45 GB, so this goes on where it was and reads what it has against the checksum.
"""

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import HUGE_PAGE_BYTES, write_huge
from kimi_lite.hub.cache import CachedRepository, hub_cache
from kimi_lite.hub.client import Hub, Patience, Repository, Unavailable
from kimi_lite.hub.quants import RemoteFile
from kimi_lite.units import gib, gib_apart

NUM_STREAMS = 4  # files at a time
_COPY_BYTES = 1 << 20
_SPARE_BYTES = 64 << 20  # left on the disk for others
_FULL = (errno.ENOSPC, errno.EDQUOT)

OnProgress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all)


class Missing(NamedTuple):
    """What is still to be fetched, and how many bytes of it are not here yet."""

    files: tuple[RemoteFile, ...]
    num_bytes: int


def missing(repository: Repository, files: Sequence[RemoteFile]) -> Missing:
    cached = CachedRepository.of(repository.name.repository)
    left = tuple(file for file in files if not cached.has(repository.commit, file))
    return Missing(left, sum(max(0, file.num_bytes - _size(cached.unfinished(file))) for file in left))


def fetch(hub: Hub, repository: Repository, files: Sequence[RemoteFile], on_progress: OnProgress) -> list[Path]:
    """The files under their names in the cache. Raises KimiLiteError: before anything is fetched where the disk is too
    small, and where the hub refuses or a checksum is wrong twice. Interrupted in any way, it goes on when repeated."""
    cached = CachedRepository.of(repository.name.repository)
    left = missing(repository, files)
    _check_space(left.num_bytes)
    progress = _Progress(on_progress, [file.num_bytes for file in left.files])
    stop = threading.Event()
    try:
        with ThreadPoolExecutor(NUM_STREAMS, thread_name_prefix="fetch") as pool:
            jobs = [pool.submit(_Transfer(hub, repository, cached, file, progress, stop).run) for file in left.files]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
            finally:  # also for Ctrl-C: what was fetched so far stays
                stop.set()
                for job in jobs:
                    job.cancel()
    finally:
        fetched = {file.etag for file in left.files if cached.blob(file).is_file()}
        if fetched:
            with suppress(OSError):  # on a full disk that is said already
                cached.set_fetched_by_us(cached.fetched_by_us | fetched)
    failed = [error for job in jobs if not job.cancelled() and (error := job.exception())]
    for error in sorted(failed, key=lambda error: isinstance(error, _Stopped)):
        raise error
    try:
        cached.set_commit(repository.name.revision, repository.commit)
        return [cached.link(repository.commit, file) for file in files]
    except OSError as error:
        raise _not_written(repository.name.repository, cached, error) from error


class _Progress:
    """Bytes of all files together."""

    def __init__(self, report: OnProgress, sizes: Sequence[int]) -> None:
        self._report, self._lock = report, threading.Lock()
        self._done, self._total, self._what = 0, sum(sizes), f"fetching {len(sizes)} file{'s' * (len(sizes) != 1)}"

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            self._report(self._what, self._done, self._total)


class _Stopped(Exception):
    """Another file failed, or the user has had enough."""


class _Transfer:
    """One file on its way."""

    def __init__(
        self,
        hub: Hub,
        repository: Repository,
        cached: CachedRepository,
        file: RemoteFile,
        progress: _Progress,
        stop: threading.Event,
    ) -> None:
        self._hub, self._repository, self._cached, self._file = hub, repository, cached, file
        self._progress, self._stop = progress, stop

    def run(self) -> None:
        """Raises KimiLiteError, and _Stopped."""
        path = self._cached.unfinished(self._file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._cached.lock(self._file), self._file):
                if not self._cached.has(
                    self._repository.commit, self._file
                ):  # else another program fetched it meanwhile
                    self._fetch_checked(path)
                    path.replace(self._cached.blob(self._file))
        except OSError as error:
            raise self._disk_error(error) from error

    def _fetch_checked(self, path: Path) -> None:
        """Where the checksum is wrong, once more from the beginning."""
        found = ""
        for _ in range(2):
            found = self._fetch(path)
            if found == self._file.etag:
                return
            self._progress.add(-self._file.num_bytes)
            path.unlink()
        raise KimiLiteError(
            f"{self._file.path} was fetched twice and is not what its publisher uploaded: need the checksum "
            f"{self._file.etag}, have {found}.",
            f"Something on the way changes it: a mirror, a proxy, this disk. HF_ENDPOINT is {self._hub.endpoint}.",
        )

    def _fetch(self, path: Path) -> str:
        """Fetches what is missing, however often the connection breaks; returns the checksum of the whole."""
        patience = Patience(self._pause)
        with path.open("ab+", HUGE_PAGE_BYTES) as out:
            if out.tell() > self._file.num_bytes:  # of nothing that this file begins with
                out.truncate(0)
            digest = self._digest_of(out)
            while (at := out.tell()) < self._file.num_bytes:
                try:
                    digest = self._receive(out, digest)
                except Unavailable as failure:
                    if out.tell() > at:
                        patience.reset()
                    patience.wait(failure, self._file.path)
            out.flush()
            os.fsync(out.fileno())
        return digest.hexdigest()

    def _digest_of(self, out: BinaryIO) -> "hashlib._Hash":
        """Of what an earlier run left; the file stands at its end."""
        digest = self._new_digest()
        out.seek(0)
        while piece := out.read(_COPY_BYTES):
            self._go_on()
            digest.update(piece)
            self._progress.add(len(piece))
        return digest

    def _new_digest(self) -> "hashlib._Hash":
        """SHA-256, or for a small file Git's SHA-1, which begins with a header of the size."""
        if len(self._file.etag) == 64:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self._file.num_bytes}\0".encode(), usedforsecurity=False)

    def _receive(self, out: BinaryIO, digest: "hashlib._Hash") -> "hashlib._Hash":
        """One answer of the hub, to its end or to where it breaks. Raises Unavailable where it is short."""
        with self._hub.stream(self._repository, self._file, out.tell()) as answer:
            if answer.status_code == 200 and out.tell():  # the whole, though a part was asked for
                self._progress.add(-out.tell())
                out.truncate(0)
                out.seek(0)
                digest = self._new_digest()
            for piece in answer.iter_bytes():  # as they come: pieces of a size would be lost in part
                self._go_on()
                piece = piece[: self._file.num_bytes - out.tell()]  # more than there should be is not kept
                write_huge(out, piece)
                digest.update(piece)
                self._progress.add(len(piece))
        if out.tell() < self._file.num_bytes:
            raise Unavailable(f"the answer ended at byte {out.tell():,} of {self._file.num_bytes:,}")
        return digest

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _pause(self, seconds: float) -> None:
        self._stop.wait(seconds)
        self._go_on()

    def _disk_error(self, error: OSError) -> KimiLiteError:
        if error.errno in _FULL:
            left = self._file.num_bytes - _size(self._cached.unfinished(self._file))
            return _disk_is_full(left, f"The disk became full while {self._file.path} was fetched")
        return _not_written(self._file.path, self._cached, error)


def _not_written(what: str, cached: CachedRepository, error: OSError) -> KimiLiteError:
    return KimiLiteError(
        f"{what} cannot be written to {cached.folder}: {error.strerror or error}.",
        "Repeat the command when that is put right: it goes on where it was. HF_HOME names another place.",
    )


def _check_space(num_bytes: int) -> None:
    """Raises KimiLiteError where the cache's disk has less free."""
    if num_bytes and num_bytes + _SPARE_BYTES > _free_bytes():
        raise _disk_is_full(num_bytes + _SPARE_BYTES, "The disk is too small for the download")


def _disk_is_full(need_bytes: int, what: str) -> KimiLiteError:
    need, have = gib_apart(need_bytes, _free_bytes())
    if need_bytes < 0.1 * (1 << 30):
        need, have = gib(need_bytes), gib(_free_bytes())
    return KimiLiteError(
        f"{what}: need {need}, have {have} at {hub_cache()}.",
        "Make space and repeat the command: it goes on where it was. `kimi-lite models` shows what is here, `kimi-lite "
        "models --rm NAME` deletes; HF_HOME names a folder on another disk.",
    )


def _free_bytes() -> int:
    folder = hub_cache()
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(existing).free


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextmanager
def _locked(path: Path, file: RemoteFile) -> Iterator[None]:
    """No other program that keeps to the hub's cache fetches the same file meanwhile."""
    from filelock import FileLock, Timeout  # which huggingface_hub brings

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise KimiLiteError(
            f"{file.path} is being fetched by another program.", "Wait until that is done, or end it."
        ) from None
    try:
        yield
    finally:
        lock.release()
