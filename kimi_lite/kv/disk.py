"""Cached prefixes on disk: pages of the latent cache that outlive the process, so that a long prompt costs its prefill
once.

    ~/.cache/kimi-lite/prefixes/<model key>/<hash of the page before>-<hash of the page, or "tail">.page

A page's hash is of the keys of all positions up to its end (`kv.chain`: token ids, and what an image's placeholders
stand for); the last page of a sequence, mostly not a whole one, is a "tail", of which the newest is kept. The model
key is made of the files' headers, sizes and dates and of whatever else changes the numbers. Pages are written in the
background while a prompt is computed, and found by `KVCache.open`. A file is complete or absent (written under another
name, then renamed), and its checksum covers its name, so any number of processes may share the folder and a damaged
file is never believed. When the folder is larger than it may be, the pages that were longest of no use are deleted,
ends of prefixes before their beginnings.

| "KLPAGE3\\n" | blake2b-128 of all that follows | the keys: `kv.chain.pack` | uint8 (layers, 64, row bytes) |
"""

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from uuid import uuid4

import numpy as np

from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.chain import PACKED_BYTES, Key, Link, chain_hash, num_common, pack, unpack
from kimi_lite.native.latent_rows import PAGE_TOKENS

DEFAULT_MAX_BYTES = 8 * 1024**3
MIN_TOKENS = 256  # prefixes shorter than this are computed faster than they are worth a file
_MAGIC = b"KLPAGE3\n"
_DIGEST_BYTES = 16
_MAX_SIBLINGS = 256  # pages after the same page that are looked at
_HEAD_BYTES = 1 << 20  # of each shard, for the model key
_QUEUED_PAGES = 16  # computing waits while more are to be written
_READERS = 4
_KEPT = (".page", ".features")  # `media.features` keeps what images are next to the pages
_STALE_S = 3600.0  # what a process that died left half-written


def model_key(store: GGUFStore, *details: object) -> str:
    """The same only for the same files: their first MiB, sizes and dates, and `details` such as the cache's dtype."""
    digest = blake2b(repr((_MAGIC, details)).encode(), digest_size=16)
    for path in store.shards:
        status = path.stat()
        digest.update(repr((status.st_size, status.st_mtime_ns)).encode())
        with path.open("rb") as file:
            digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()


class PrefixStore:
    """The pages of one model in `folder`. `page_shape`: (layers, 64, row bytes)."""

    def __init__(
        self,
        folder: Path,
        model_key: str,
        page_shape: tuple[int, int, int],
        max_bytes: int = DEFAULT_MAX_BYTES,
        min_tokens: int = MIN_TOKENS,
    ) -> None:
        self.folder, self.max_bytes, self.min_tokens = folder, max_bytes, min_tokens
        self.num_saved = self.num_found = 0
        self._own = folder / model_key
        self._shape = page_shape
        self._file_bytes = len(_MAGIC) + _DIGEST_BYTES + PACKED_BYTES + math.prod(page_shape)
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(_QUEUED_PAGES)
        self._writer: threading.Thread | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._unpruned_bytes = (
            max_bytes  # written since the folder was last looked through; the first page makes it due
        )
        self._is_failed = self._has_warned = False

    def offer(self, link: Link, index: int, read: Callable[[], np.ndarray]) -> None:
        """Save a page unless a file has it. `read` gives its content, at once.

        index: its place in its prefix, of which only so much is saved as the folder may hold: an end alone is of no
        use.
        """
        if self._is_failed or (index + 1) * self._file_bytes > self.max_bytes or self._has(link):
            return
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, name="kimi-lite-prefixes", daemon=True)
            self._writer.start()
        self._queue.put(partial(self._write_page, link, read()))

    def touch(self, links: Sequence[Link]) -> None:
        """This prefix was of use just now, when what was offered of it is written."""
        if self._writer is not None:
            self._queue.put(partial(self._touch, links))

    def read(self, links: Sequence[Link]) -> Iterator[np.ndarray]:
        """The contents of these pages, in order, up to the first that no whole file has. Reads ahead."""
        found = []
        try:
            if not links or not self._path(links[0]).exists():
                return
            self._readers = self._readers or ThreadPoolExecutor(_READERS, "kimi-lite-prefixes")
            for first in range(0, len(links), 2 * _READERS):
                group = links[first : first + 2 * _READERS]
                for link, content in zip(group, list(self._readers.map(self._read_page, group)), strict=True):
                    if content is None:
                        return
                    found.append(link)
                    yield content
        finally:
            self.num_found += len(found)
            self._touch(found)

    def read_like(self, parent: bytes, wanted: Sequence[Key], least: int) -> tuple[Link, np.ndarray] | None:
        """The page after `parent` that begins most like `wanted` and shares more than `least` keys with it, and its
        content."""
        siblings = islice(self._own.glob(f"{parent.hex()}-*.page"), _MAX_SIBLINGS)
        matches = [(num_common(keys, wanted), keys) for path in siblings if (keys := _read_keys(path))]
        num_rows, keys = max(matches, default=(0, ()), key=lambda match: match[0])
        if num_rows <= least:
            return None
        link = Link(parent, keys, chain_hash(parent, keys))
        content = self._read_page(link)
        if content is None:
            return None
        self.num_found += 1
        self._touch([link])
        return link, content

    def counters(self) -> dict[str, float]:
        return {"prefix_pages_found": self.num_found, "prefix_pages_saved": self.num_saved}

    def flush(self) -> None:
        """Wait until everything offered is on disk."""
        if self._writer is not None:
            self._queue.put(None)
            self._writer.join()
            self._writer = None

    def close(self) -> None:
        """Finish writing, bring the folder down to its size, end the threads. A second call does nothing."""
        has_written = self._writer is not None
        self.flush()
        if has_written:
            prune(self.folder, self.max_bytes)
        if self._readers is not None:
            self._readers.shutdown()
            self._readers = None

    def _path(self, link: Link) -> Path:
        return self._own / f"{link.parent.hex()}-{link.hash.hex() if len(link.keys) == PAGE_TOKENS else 'tail'}.page"

    def _has(self, link: Link) -> bool:
        """Whether the page, or one whose beginning it is, has the file that it would get."""
        path = self._path(link)
        if len(link.keys) == PAGE_TOKENS:
            return path.exists()
        return num_common(_read_keys(path), link.keys) == len(link.keys)

    def _write_all(self) -> None:
        """The writer's thread, until it is given None; after a failure (it warned of it) it only empties the queue."""
        while (work := self._queue.get()) is not None:
            if self._is_failed:
                continue
            try:
                work()
                self._prune_when_due()
            except OSError as error:
                self._is_failed = True
                self._warn(f"Prefixes are no longer saved to {self.folder}: {error.strerror or error}.")

    def _write_page(self, link: Link, content: np.ndarray) -> None:
        path = self._path(link)
        if self._has(link):
            return
        self._own.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial_path = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")
        data, keys = memoryview(content.reshape(-1)), pack(link.keys)
        try:
            with open(partial_path, "xb", opener=partial(os.open, mode=0o600)) as file:
                file.write(_MAGIC + _digest(path, keys, data) + keys)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial_path.replace(path)
        except BaseException:
            partial_path.unlink(missing_ok=True)
            raise
        self.num_saved += 1
        self._unpruned_bytes += self._file_bytes

    def _read_page(self, link: Link) -> np.ndarray | None:
        """uint8 `page_shape`, or None where there is no file, or one that is not to be believed."""
        path, keys = self._path(link), pack(link.keys)
        content = np.empty(self._shape, np.uint8)
        try:
            with path.open("rb") as file:
                head = file.read(self._file_bytes - content.nbytes)
                data = memoryview(content.reshape(-1))
                is_whole = file.readinto(data) == len(data) and not file.read(1)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"The saved prefix {path} cannot be read ({error.strerror or error}); it is computed again.")
            return None
        if len(link.keys) < PAGE_TOKENS and head[-PACKED_BYTES:] != keys:
            return None  # another process put its tail there since we looked
        if not is_whole or head != _MAGIC + _digest(path, keys, data) + keys:
            self._warn(f"The saved prefix {path} is damaged; it is deleted and computed again.")
            with suppress(OSError):  # the folder may be only to be read
                path.unlink()
            return None
        return content

    def _touch(self, links: Sequence[Link]) -> None:
        """Date these files now: the later in its prefix, the older, so that it is deleted first."""
        now_ns = time.time_ns()
        for index, link in enumerate(links):
            try:
                os.utime(self._path(link), ns=(now_ns - 1000 * index,) * 2)
            except OSError:  # deleted by another process, or a folder that is only to be read
                return

    def _prune_when_due(self) -> None:
        if self._unpruned_bytes > self.max_bytes // 8:
            prune(self.folder, self.max_bytes)
            self._unpruned_bytes = 0

    def _warn(self, message: str) -> None:
        """The first thing that went wrong; the rest would be more of it."""
        if not self._has_warned:
            self._has_warned = True
            logging.getLogger(__name__).warning("%s", message)


def prune(folder: Path, max_bytes: int) -> None:
    """Delete what was longest of no use, of any model, pages and images' features, until the folder is as small as it
    must be."""
    files, total_bytes = [], 0
    for path in folder.glob("*/*.*"):
        try:
            status = path.stat()
            if path.suffix == ".partial" and time.time() - status.st_mtime > _STALE_S:
                path.unlink(missing_ok=True)
            elif path.suffix in _KEPT:
                files.append((status.st_mtime_ns, status.st_size, path))
                total_bytes += status.st_size
        except FileNotFoundError:  # another process prunes too
            continue
    for _, num_bytes, path in sorted(files):
        if total_bytes <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total_bytes -= num_bytes


def _digest(path: Path, keys: bytes, data: memoryview) -> bytes:
    """Of a page's file; the name counts, so that a file in another's place is not believed."""
    digest = blake2b(keys, digest_size=_DIGEST_BYTES, key=blake2b(path.name.encode()).digest())
    digest.update(data)
    return digest.digest()


def _read_keys(path: Path) -> tuple[Key, ...]:
    """The keys that a page's file says it holds; none where there is no such file. They are not checked yet."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_MAGIC) + _DIGEST_BYTES + PACKED_BYTES)
    except OSError:
        return ()
    return unpack(head[len(_MAGIC) + _DIGEST_BYTES :])
