"""One folder that tools may look into, and nothing outside it: paths, symbolic links and special files cannot lead
out."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kimi_lite.apps.tools.tool import ToolError
from kimi_lite.errors import KimiLiteError


class Folder:
    """The folder `root`. Paths are relative to it, as the model writes them."""

    def __init__(self, root: Path) -> None:
        try:
            self.root = root.expanduser().resolve(strict=True)
        except OSError as error:
            raise KimiLiteError(
                f"The tools' folder {root} cannot be opened: {error.strerror}.", "Name one that exists."
            ) from error
        if not self.root.is_dir():
            raise KimiLiteError(f"The tools' folder {root} is a file.", "Name a folder.")

    def locate(self, path: str) -> Path:
        """The real path of something inside; ToolError for what is outside or does not exist."""
        try:
            real = (self.root / path).resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise ToolError(f"there is no {path!r} in the folder") from error
        if not real.is_relative_to(self.root):
            raise ToolError(f"{path!r} lies outside the folder that may be read")
        return real

    def name(self, path: Path) -> str:
        """A path inside as the model is told it."""
        return str(path.relative_to(self.root))

    def open(self, path: Path) -> BinaryIO:
        """A located file for reading. It is looked at again once open: nothing may have changed its place meanwhile."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ToolError(f"{self.name(path)} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(file).st_mode) or path.resolve() != path:
            os.close(file)
            raise ToolError(f"{self.name(path)} is no ordinary file")
        return os.fdopen(file, "rb")

    def walk(self, start: Path, depth: int) -> Iterator[os.DirEntry]:
        """Files and folders below `start`, sorted by name, folders before what they hold. Links are named, not
        followed."""
        try:
            with os.scandir(start) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            return
        for entry in entries:
            yield entry
            if depth > 1 and entry.is_dir(follow_symlinks=False) and entry.name != ".git":
                yield from self.walk(Path(entry.path), depth - 1)
