"""The files that a conversion reads: they must stay as they were when it began, and must not be what it writes."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kimi_lite.errors import KimiLiteError

_CHANGED_HINT = "Leave the source alone while it is read, and repeat the command: the conversion starts again."


@dataclass(frozen=True, slots=True)
class FileState:
    """A source file as it was: what tells a changed one from the same one."""

    path: Path
    num_bytes: int
    modified_ns: int
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """Raises KimiLiteError where the file cannot be seen."""
        try:
            stat = path.stat()
        except OSError as error:
            raise KimiLiteError(f"{path} cannot be read: {error.strerror}.", _CHANGED_HINT) from error
        return cls(path, stat.st_size, stat.st_mtime_ns, stat.st_dev, stat.st_ino)

    def check(self) -> None:
        """Raises KimiLiteError where the file is not what it was."""
        now = FileState.of(self.path)
        if now == self:
            return
        sizes = f"it had {self.num_bytes:,} bytes and has {now.num_bytes:,}"
        change = sizes if now.num_bytes != self.num_bytes else "it was written again or replaced"
        raise KimiLiteError(f"{self.path} changed while it was converted: {change}.", _CHANGED_HINT)


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raises KimiLiteError where a file to be written is one to be read: under its own name, through links, or as
    another name of the same file."""
    by_place = {_place(path): path for path in inputs}
    for output in outputs:
        if source := by_place.get(_place(output)):
            is_named = os.path.abspath(output) == os.path.abspath(source)
            what = "is what is read here" if is_named else f"is the same file as {source}, which is read here"
            raise KimiLiteError(
                f"{output} {what} and would be overwritten.",
                "Name another output; --force does not replace a source.",
            )


def _place(path: Path) -> object:
    """What is equal for two names of one file, whether it exists or not."""
    try:
        stat = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return stat.st_dev, stat.st_ino
