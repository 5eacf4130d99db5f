"""What a long conversion has finished, so that a killed one goes on: one JSON line for each tensor that is safe on
disk.

The first line holds the fingerprint of the work (source files, types, sizes, metadata). Lines are appended and fsynced
after the bytes they vouch for; a line that a kill cut in half is dropped. The file is locked while a process works on
it, and in the end stays next to the model as its log: type, bytes, SHA-256 and relative error of every tensor.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

from kimi_lite.errors import KimiLiteError
from kimi_lite.units import gib


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished tensor. `end` is the length of its shard's file behind it; `error` its relative RMS error on sampled
    rows."""

    name: str
    shard: int
    end: int
    type: str
    num_bytes: int
    sha256: str
    error: float


class Journal:
    """The open journal of a conversion; `entries` are what earlier runs finished. Made by `open`."""

    def __init__(self, path: Path, file: BinaryIO, entries: list[Entry]) -> None:
        self.path = path
        self.entries = entries
        self._file = file

    @classmethod
    def open(cls, path: Path, fingerprint: str, is_overwriting: bool) -> "Journal":
        """Goes on with the journal at `path`, or starts it. Raises KimiLiteError where another process holds it, or
        where it is of other work and may not be overwritten."""
        file = open(path, "a+b")  # noqa: SIM115  closed by close()
        if not _lock(file):
            file.close()
            raise KimiLiteError(
                f"Another process is writing this output ({path}).", "Wait for it, or name another output."
            )
        file.seek(0)
        lines = _whole_lines(file.read())
        found, entries = lines[0].get("fingerprint") if lines else None, [Entry(**line) for line in lines[1:]]
        if entries and found != fingerprint and not is_overwriting:
            file.close()
            done = sum(entry.num_bytes for entry in entries)
            raise KimiLiteError(
                f"{path} belongs to a conversion with other settings or of a changed source, stopped after "
                f"{gib(done)}.",
                "Repeat that command to finish it, or add --force to start again.",
            )
        if found != fingerprint:
            entries = []
            file.truncate(0)
            file.write(_line({"fingerprint": fingerprint}))
        else:  # drop the half line that a kill may have left
            file.truncate(sum(len(_line(line)) for line in lines))
        _sync(file)
        return cls(path, file, entries)

    def append(self, entries: Iterable[Entry]) -> None:
        """To be called when the bytes of these tensors are on disk."""
        for entry in entries:
            self._file.write(_line(asdict(entry)))
            self.entries.append(entry)
        _sync(self._file)

    def finish(self, log: Path) -> None:
        """The work is done: the journal becomes the log file `log`."""
        self.close()
        self.path.replace(log)

    def discard(self) -> None:
        """The work cannot be finished: the journal is deleted."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> dict[str, Entry]:
    """The finished tensors of a log by name. Raises KimiLiteError where there is none."""
    if not path.is_file():
        raise KimiLiteError(
            f"There is no {path}, the log that `quantize` leaves next to a model.", "Verify what it wrote."
        )
    return {line["name"]: Entry(**line) for line in _whole_lines(path.read_bytes())[1:]}


def _whole_lines(content: bytes) -> list[dict]:
    """The lines that this version wrote, up to the first that is cut or damaged."""
    lines: list[dict] = []
    known = {field.name for field in fields(Entry)}
    for raw in content.split(b"\n")[:-1]:
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not isinstance(line, dict) or (lines and line.keys() != known) or _line(line) != raw + b"\n":
            break
        lines.append(line)
    return lines


def _line(content: dict) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _lock(file: BinaryIO) -> bool:
    """Whether this process is now the only one; the system frees the lock when the process ends in whatever way."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
