"""One folder that tools may look into, and nothing outside it: paths, symbolic links and special files cannot lead out,
whatever another process changes meanwhile.

A path is walked component by component from a descriptor of the folder, and no step follows a link: links are read and
walked as paths of their own, and `..` goes back to the descriptor that was come from.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kimi_lite.apps.tools.tool import ToolError
from kimi_lite.errors import KimiLiteError

MOST_LINKS = 40  # on the way to a file, as Linux counts
_AS_IT_IS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Entry:
    """Something in the folder. `name` is its path there; `parent` a descriptor, open while it is visited."""

    name: str
    status: os.stat_result
    parent: int

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.status.st_mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.status.st_mode)

    @property
    def base(self) -> str:
        """Its name in its own folder; the folder of the tools itself is `.`."""
        return os.path.basename(self.name) or "."

    def open(self) -> BinaryIO:
        """A file for reading; ToolError for what is no ordinary file, or no longer."""
        if not self.is_file:
            raise ToolError(f"{self.name} is no ordinary file")
        try:
            file = os.open(self.base, _AS_IT_IS, dir_fd=self.parent)
        except OSError as error:
            raise ToolError(f"{self.name} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise ToolError(f"{self.name} is no ordinary file")
        return os.fdopen(file, "rb")

    def walk(self, depth: int) -> Iterator["Entry"]:
        """Files and folders below, sorted by name, folders before what they hold. Links are named, not followed."""
        try:
            folder = os.open(self.base, _AS_IT_IS | os.O_DIRECTORY, dir_fd=self.parent)
        except OSError:
            return
        try:
            for base in sorted(os.listdir(folder)):
                with suppress(OSError):  # gone meanwhile
                    status = os.lstat(base, dir_fd=folder)
                    entry = Entry(os.path.join(self.name, base), status, folder)
                    yield entry
                    if depth > 1 and entry.is_folder and base != ".git":
                        yield from entry.walk(depth - 1)
        finally:
            os.close(folder)


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

    @contextmanager
    def find(self, path: str) -> Iterator[Entry]:
        """What is there; ToolError for what is outside or does not exist. Links are followed inside the folder."""
        with ExitStack() as opened:
            try:
                entry = self._walk_to(path, opened)
            except (OSError, ValueError) as error:
                raise ToolError(f"there is no {path!r} in the folder") from error
            yield entry

    def _walk_to(self, path: str, opened: ExitStack) -> Entry:
        def enter(base: str, parent: int | None) -> int:
            folder = os.open(base, _AS_IT_IS | os.O_DIRECTORY, dir_fd=parent)
            opened.callback(os.close, folder)
            return folder

        outer = ToolError(f"{path!r} lies outside the folder that may be read")
        root = enter(str(self.root), None)
        folders, names = [root], []  # from the root to where we are
        left, num_links = self._parts(path, outer), 0
        while left:
            part = left.pop()
            if part == "..":
                if not names:
                    raise outer
                names.pop(), folders.pop()
                continue
            status = os.lstat(part, dir_fd=folders[-1])
            if stat.S_ISLNK(status.st_mode):
                target, num_links = os.readlink(part, dir_fd=folders[-1]), num_links + 1
                if num_links > MOST_LINKS:
                    raise OSError(path)
                if os.path.isabs(target):
                    folders, names = [root], []
                left += self._parts(target, outer)
            elif left:
                folders.append(enter(part, folders[-1]))
                names.append(part)
            else:
                return Entry(os.path.join(*names, part), status, folders[-1])
        if not names:
            return Entry("", os.fstat(root), root)
        return Entry(os.path.join(*names), os.fstat(folders[-1]), folders[-2])

    def _parts(self, path: str, outer: ToolError) -> list[str]:
        """Components, the first one last; of an absolute path those below the root."""
        if os.path.isabs(path):
            root = str(self.root).rstrip("/")
            if path != root and not path.startswith(f"{root}/"):
                raise outer
            path = path[len(root) :]
        return [part for part in reversed(path.split("/")) if part not in ("", ".")]
