"""A whole conversion onto disk: shards written in order under `.partial` names, every finished tensor in a journal, all
renamed at the end. Killed at any moment and started again with the same settings, it goes on behind the last tensor
that is safe, and the files are byte for byte those of an undisturbed run: encoders are deterministic, pieces are cut by
shape alone.
"""

import glob
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kimi_lite import __version__
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import HUGE_PAGE_BYTES, write_huge
from kimi_lite.gguf.metadata import Value
from kimi_lite.hardware.host import usable_cores
from kimi_lite.quantize.source.files import FileState
from kimi_lite.quantize.source.model import RowReader
from kimi_lite.quantize.write.journal import Entry, Journal
from kimi_lite.quantize.write.sharding import Shard, shard_metadata
from kimi_lite.quantize.write.writer import (
    ALIGNMENT,
    HEADER_BYTES,
    OnProgress,
    Tensor,
    check_folder,
    check_replaceable,
    check_space,
    encode_pieces,
    make_header,
    padded_bytes,
    write_header,
)

SYNC_BYTES = (
    64 << 20
)  # a tensor is journalled when so much lies behind the last one that is: a kill costs a second of work


@dataclass(frozen=True, slots=True)
class Job:
    """What to write where. `origin` names the source's files and their state: another origin cannot be continued."""

    path: Path  # NAME.gguf, also where the shards have numbered names
    shards: tuple[Shard, ...]
    metadata: Mapping[str, Value]
    origin: str
    is_overwriting: bool = False
    sources: tuple[FileState, ...] = ()  # what is read; it must not change meanwhile
    max_ahead: int | None = None  # pieces in memory at a time; None: two a core
    sync_bytes: int = SYNC_BYTES

    @property
    def log_path(self) -> Path:
        return log_path(self.path)

    @property
    def journal_path(self) -> Path:
        return self.log_path.with_name(f"{self.log_path.name}.partial")

    @property
    def outputs(self) -> list[Path]:
        """Every file that is written, also for a while."""
        shards = [path for shard in self.shards for path in (shard.path, shard.partial)]
        return [*shards, self.path, self.log_path, self.journal_path]

    def check_sources(self) -> None:
        """Raises KimiLiteError where a source file is not what it was when the work began."""
        for source in self.sources:
            source.check()

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    def written(self) -> dict[str, Callable[[], RowReader]]:
        """By tensor: opens the reader of its encoded rows, uint8 (rows, row_bytes), once they are written."""
        readers = {}
        for number, shard in enumerate(self.shards):
            start = len(make_header(shard_metadata(self.metadata, self.shards, number), shard.tensors))
            for tensor in shard.tensors:
                readers[tensor.name] = partial(_open_written, shard, tensor, start)
                start += padded_bytes(tensor)
        return readers

    def fingerprint(self) -> str:
        """Changes with anything that changes a byte of the result."""
        digest = hashlib.sha256(repr((__version__, self.origin, sorted(self.metadata.items()))).encode())
        for shard in self.shards:
            digest.update(shard.path.name.encode())
            for tensor in shard.tensors:
                digest.update(repr((tensor.name, tensor.shape, tensor.layout.name)).encode())
                digest.update(b"" if tensor.importance is None else tensor.importance.tobytes())
        return digest.hexdigest()


def _open_written(shard: Shard, tensor: Tensor, start: int) -> RowReader:
    """`start`: of the tensor in the shard's file."""
    path = shard.partial if shard.partial.exists() else shard.path
    row_bytes = tensor.layout.row_bytes(tensor.shape[-1])

    def read_rows(first: int, last: int) -> np.ndarray:
        rows = np.fromfile(path, np.uint8, (last - first) * row_bytes, offset=start + first * row_bytes)
        assert rows.size == (last - first) * row_bytes, (path, tensor.name, rows.size)
        return rows.reshape(-1, row_bytes)

    return read_rows


def log_path(path: Path) -> Path:
    """The log next to `NAME.gguf` or its shards: NAME.quantize.jsonl."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}.quantize.jsonl")


def run_job(job: Job, on_progress: OnProgress | None = None) -> list[Entry]:
    """Writes what is not yet written and renames all; returns the log. Raises KimiLiteError, before any work where
    outputs exist, their folder cannot be written, or the disk is too small."""
    check_folder(job.path)
    if not job.journal_path.exists():  # nothing to go on with: an output that is there is someone's finished work
        _check_outputs(job, num_finished=0)
    journal = Journal.open(job.journal_path, job.fingerprint(), job.is_overwriting)
    try:
        if not journal.entries:
            _remove_abandoned(job)
        _check_outputs(job, len(journal.entries))
        _write_shards(job, journal, on_progress or (lambda name, done, total: None))
        job.check_sources()
        for shard in job.shards:
            if shard.partial.exists():
                shard.partial.replace(shard.path)
        journal.finish(job.log_path)
    except OSError as error:
        raise KimiLiteError(
            f"Writing {job.path} failed: {error.strerror or error}.",
            "Fix that and repeat the command: it goes on after the last finished tensor.",
        ) from error
    finally:
        if not journal.entries:
            journal.discard()
        journal.close()
    return journal.entries


def _remove_abandoned(job: Job) -> None:
    """Deletes the unfinished files of an earlier run with other settings, which may have had other shards."""
    stem = glob.escape(job.path.name.removesuffix(".gguf"))
    for pattern in (
        f"{stem}.gguf.partial",
        f"{stem}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].gguf.partial",
    ):
        for abandoned in job.path.parent.glob(pattern):
            abandoned.unlink()


def _check_outputs(job: Job, num_finished: int) -> None:
    is_written = num_finished == len(job.tensors)  # killed while renaming
    for shard in job.shards:
        check_replaceable(shard.path, job.is_overwriting or is_written)
    there = sum(shard.partial.stat().st_size for shard in job.shards if shard.partial.exists())
    if not is_written:
        check_space(job.path, sum(shard.data_bytes for shard in job.shards) + HEADER_BYTES - there)


def _write_shards(job: Job, journal: Journal, report: OnProgress) -> None:
    try:
        with ThreadPoolExecutor(usable_cores().most_threads) as pool:
            for number in range(len(job.shards)):
                _write_shard(job, number, journal, pool, report)
    except KimiLiteError:  # a weight that the type cannot hold, or a source that changed: nothing to go on with
        for shard in job.shards:
            shard.partial.unlink(missing_ok=True)
        journal.entries.clear()
        raise


def _write_shard(job: Job, number: int, journal: Journal, pool: ThreadPoolExecutor, report: OnProgress) -> None:
    shard = job.shards[number]
    done = [entry for entry in journal.entries if entry.shard == number]
    if len(done) == len(shard.tensors):
        if shard.partial.exists() or not shard.path.exists():  # else it has its name already
            _open_shard(job, number, done).close()
        return
    total_bytes = sum(tensor.num_bytes for tensor in job.tensors)
    done_bytes = sum(entry.num_bytes for entry in journal.entries)
    with _open_shard(job, number, done) as file:
        waiting: list[Entry] = []
        for tensor in shard.tensors[len(done) :]:
            digest, error_squares, weight_squares = hashlib.sha256(), 0.0, 0.0
            for piece in encode_pieces(tensor, pool, is_measured=True, max_ahead=job.max_ahead):
                write_huge(file, piece.rows)
                digest.update(piece.rows)
                error_squares += piece.error_squares
                weight_squares += piece.weight_squares
                done_bytes += piece.rows.nbytes
                report(tensor.name, done_bytes, total_bytes)
            file.write(bytes(-file.tell() % ALIGNMENT))
            file.flush()  # `Job.written` reads it
            job.check_sources()
            error = (error_squares / weight_squares) ** 0.5 if weight_squares else 0.0
            is_last = tensor is shard.tensors[-1]
            waiting.append(
                Entry(
                    tensor.name,
                    number,
                    file.tell(),
                    tensor.layout.name,
                    tensor.num_bytes,
                    digest.hexdigest(),
                    round(error, 6),
                )
            )
            if is_last or sum(entry.num_bytes for entry in waiting) >= job.sync_bytes:
                file.flush()
                os.fsync(file.fileno())
                journal.append(waiting)
                waiting = []


def _open_shard(job: Job, number: int, done: Sequence[Entry]) -> BinaryIO:
    """The shard's partial file, open where its next tensor goes."""
    shard = job.shards[number]
    if not done:
        return write_header(shard.partial, shard_metadata(job.metadata, job.shards, number), shard.tensors)
    end = done[-1].end
    if not shard.partial.exists() or shard.partial.stat().st_size < end:
        raise KimiLiteError(
            f"{shard.partial} should hold {end:,} finished bytes, and does not.",
            "Repeat the command: it starts again.",
        )
    file = open(shard.partial, "r+b", HUGE_PAGE_BYTES)  # noqa: SIM115  the caller closes it
    file.truncate(end)
    file.seek(end)
    return file
