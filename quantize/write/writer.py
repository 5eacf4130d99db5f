"""One GGUF file, written as a stream: header first, then each tensor read, encoded and appended a few rows at a time.

The file grows under a `.partial` name, is fsynced, and takes its own name only when it is whole. Whatever would make
that fail late (a full disk, no right to write, a file in the way) is refused before any work. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

import glob
import os
import secrets
import shutil
import struct
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import psutil

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import HUGE_PAGE_BYTES, write_huge
from kimi_lite.gguf.metadata import Value, ValueType, pack_text, pack_value
from kimi_lite.hardware.host import usable_cores
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.codecs.feedback import Coding
from kimi_lite.quantize.source.files import FileState
from kimi_lite.quantize.source.model import RowReader
from kimi_lite.units import gib

ALIGNMENT = 32  # bytes; GGUF's default
_VERSION = 3
_CHUNK_WEIGHTS = 1 << 18  # 1 MiB of float32: rows on their way from file to file stay in the processor's cache
_FEEDBACK_WEIGHTS = 1 << 21  # rows that share a product with the whole curvature of their matrix
_MEASURED_EVERY = 8  # pieces: an error known to a per cent for an eighth of the time that decoding all would take
HEADER_BYTES = 64 << 20  # space asked for besides the tensors: more than the largest tokenizer and all padding take

OnProgress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to write. `open_rows` is called once, when its turn comes, and returns the reader of its rows, which
    may be called by several threads; rows are counted over all axes but the last."""

    name: str
    shape: tuple[int, ...]  # numpy order: the last axis is the row
    layout: Layout
    open_rows: Callable[[], RowReader]
    is_encoded: bool = False  # its reader gives the bytes to be written
    importance: np.ndarray | None = None  # float32 (matrices, row): weighs the squared errors of each matrix's columns
    coding: Callable[[int, RowReader], Coding] | None = None  # of a matrix, asked for when its turn comes

    @property
    def num_weights(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_weights // self.shape[-1] * self.layout.row_bytes(self.shape[-1])


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[Tensor],
    on_progress: OnProgress | None = None,
    is_overwriting: bool = False,
    sources: Sequence[FileState] = (),
) -> int:
    """Writes the file and returns its size in bytes; `sources` must not change meanwhile. Raises KimiLiteError before
    any work where it cannot end well."""
    report = on_progress or (lambda name, done, total: None)
    done_bytes, total_bytes = 0, sum(tensor.num_bytes for tensor in tensors)
    check_output(path, total_bytes, is_overwriting)
    with _partial_file(path) as partial:
        file = write_header(partial, metadata, tensors)
        with file, ThreadPoolExecutor(usable_cores().most_threads) as pool:
            for tensor in tensors:
                for piece in encode_pieces(tensor, pool):
                    write_huge(file, piece.rows)
                    done_bytes += piece.rows.nbytes
                    report(tensor.name, done_bytes, total_bytes)
                file.write(bytes(-file.tell() % ALIGNMENT))
            assert done_bytes == total_bytes, (done_bytes, total_bytes)
            file.flush()
            os.fsync(file.fileno())
            num_bytes = file.tell()
        for source in sources:
            source.check()
        partial.replace(path)
    return num_bytes


def check_output(path: Path, total_bytes: int, is_overwriting: bool) -> None:
    """Raises KimiLiteError where `path` exists, its folder cannot be written, or the disk is too small."""
    check_replaceable(path, is_overwriting)
    check_folder(path)
    _remove_abandoned(path)
    check_space(path, total_bytes + HEADER_BYTES)


def check_replaceable(path: Path, is_overwriting: bool) -> None:
    """Raises KimiLiteError where something is at `path`, but for a file that may be overwritten; a device or a pipe
    (/dev/null, /dev/stdout) would be gone after the rename."""
    if path.is_dir():
        raise KimiLiteError(
            f"{path} is a folder; the output is one file.", f"Name a file, such as {path / 'model.gguf'}."
        )
    if path.exists() and not path.is_file():
        raise KimiLiteError(f"{path} is a device or a pipe; a GGUF needs a file.", "Name a file.")
    if path.exists() and not is_overwriting:
        raise KimiLiteError(
            f"{path} exists ({path.stat().st_size:,} bytes).", "Add --force to replace it, or name another file."
        )


def check_folder(path: Path) -> None:
    """Makes the folder of `path` and writes in it, for a KimiLiteError now and not after hours."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as probe:  # without a name: nothing is left if this is killed
            probe.write(b" ")
    except OSError as error:
        raise KimiLiteError(
            f"Cannot write in {path.parent}: {error.strerror}.", "Name an output in a folder of yours."
        ) from error


def check_space(path: Path, needed: int) -> None:
    """Raises KimiLiteError where the disk has less than `needed` bytes free."""
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise KimiLiteError(
            f"{path.name} needs {gib(needed)} and {path.parent} has {gib(free)} free.",
            f"Free {gib(needed - free)}, name an output on another disk, or choose a smaller type.",
        )


def _partial_name(path: Path) -> Path:
    """Each writer has its own, so that two writing the same output cannot mix; the later rename wins whole."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(3)}.partial")


def _remove_abandoned(path: Path) -> None:
    """Deletes what killed processes left of the same output."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.*-*.partial"):
        pid = partial.name.removeprefix(f"{path.name}.").partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            partial.unlink(missing_ok=True)


@contextmanager
def _partial_file(path: Path) -> Iterator[Path]:
    """Yields the partial file's name; deletes the file if the work fails, and says what a failing disk means."""
    partial = _partial_name(path)
    try:
        yield partial
    except OSError as error:
        raise KimiLiteError(
            f"Writing {partial} failed: {error.strerror or error}.", "Free some space or name another disk."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_header(partial: Path, metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> BinaryIO:
    """Returns the file, open where the first tensor goes."""
    file = open(partial, "wb", HUGE_PAGE_BYTES)  # noqa: SIM115  the caller closes it
    file.write(make_header(metadata, tensors))
    return file


def make_header(metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> bytes:
    """Magic, metadata and tensor infos, padded. Arrays without items are left out: readers know no type for them."""
    first = {"general.architecture": metadata["general.architecture"]}
    values = {key: value for key, value in (first | dict(metadata)).items() if not _is_empty(value)}
    parts = [b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(values))]
    parts += [pack_text(key) + pack_value(value) for key, value in values.items()]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts.append(pack_text(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        parts.append(struct.pack("<IQ", tensor.layout.ggml_id, offset))
        offset += padded_bytes(tensor)
    size = sum(map(len, parts))
    return b"".join([*parts, bytes(-size % ALIGNMENT)])


def padded_bytes(tensor: Tensor) -> int:
    return -(-tensor.num_bytes // ALIGNMENT) * ALIGNMENT


def _is_empty(value: Value) -> bool:
    return value.value_type == ValueType.ARRAY and not len(value.value)


class EncodedPiece(NamedTuple):
    """Some encoded rows of a tensor, uint8 (rows, row_bytes); the squares are sums over its weights where it was
    measured."""

    rows: np.ndarray
    error_squares: float = 0.0
    weight_squares: float = 0.0


def encode_pieces(
    tensor: Tensor, pool: ThreadPoolExecutor, is_measured: bool = False, max_ahead: int | None = None
) -> Iterator[EncodedPiece]:
    """Yields the tensor's encoded rows in order; up to `max_ahead` pieces (default: two a core) are read and encoded by
    the pool meanwhile. Every eighth piece is measured where that is asked for and where the source's rows are not kept
    as they are."""
    read_rows = tensor.open_rows()
    max_ahead = max_ahead or 2 * usable_cores().most_threads

    def encode_piece(index: int, matrix: int, start: int, stop: int) -> EncodedPiece:
        rows = read_rows(start, stop)
        if tensor.is_encoded:
            assert rows.dtype == np.uint8, (tensor.name, rows.dtype)
            return EncodedPiece(rows)
        known = Coding(importance=None if tensor.importance is None else tensor.importance[matrix])
        coding = tensor.coding(matrix, read_rows) if tensor.coding else known
        encoded = coding.encode(tensor.layout, rows)
        return (
            _measure(tensor, rows, encoded) if is_measured and index % _MEASURED_EVERY == 0 else EncodedPiece(encoded)
        )

    pending: deque[Future] = deque()
    try:
        for index, chunk in enumerate(_list_chunks(tensor)):
            pending.append(pool.submit(encode_piece, index, *chunk))
            if len(pending) > max_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except KimiLiteError as error:
        raise KimiLiteError(f"{tensor.name}: {error.message}", error.hint) from error
    finally:
        for future in pending:
            future.cancel()


def piece_weights(tensor: Tensor) -> int:
    """Weights that are read and encoded at once."""
    return _FEEDBACK_WEIGHTS if tensor.coding else _CHUNK_WEIGHTS


def _measure(tensor: Tensor, rows: np.ndarray, encoded: np.ndarray) -> EncodedPiece:
    from kimi_lite.native.cpu.matrix import dequantize  # compiles a kernel, so only where it is needed

    error = dequantize(encoded, tensor.layout.name) - rows
    return EncodedPiece(encoded, float(np.vdot(error, error)), float(np.vdot(rows, rows)))


def _list_chunks(tensor: Tensor) -> Iterator[tuple[int, int, int]]:
    """(matrix, first row, end row) of each piece of work; no piece has rows of two matrices that are encoded
    differently."""
    num_matrices = 1 if tensor.importance is None else len(tensor.importance)
    if tensor.coding:
        num_matrices = prod(tensor.shape[:-2])
    num_rows, chunk_rows = tensor.num_weights // tensor.shape[-1], max(1, piece_weights(tensor) // tensor.shape[-1])
    assert num_rows % num_matrices == 0, (tensor.name, num_rows, num_matrices)
    matrix_rows = num_rows // num_matrices
    for matrix in range(num_matrices):
        for start in range(matrix * matrix_rows, (matrix + 1) * matrix_rows, chunk_rows):
            yield matrix, start, min(start + chunk_rows, (matrix + 1) * matrix_rows)
