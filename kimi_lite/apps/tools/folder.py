"""One folder that tools may look into or write to, and nothing outside it: paths, symbolic links and special files
cannot lead out, whatever another process changes meanwhile.

A path is walked component by component from a descriptor of the folder, and no step follows a link: links are read and
walked as paths of their own, and `..` goes back to the descriptor that was come from.
"""

import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kimi_lite.apps.tools.tool import ToolError
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import PARTIAL

MOST_LINKS = 40  # on the way to a file, as Linux counts
_AS_IT_IS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file is or can be. `name` is its path in the folder; `parent` a descriptor, open while it is visited."""

    name: str
    parent: int

    @property
    def base(self) -> str:
        return os.path.basename(self.name)

    def entry(self) -> Entry | None:
        """What is there now."""
        try:
            return Entry(self.name, os.lstat(self.base, dir_fd=self.parent), self.parent)
        except FileNotFoundError:
            return None

    def write(self, data: bytes) -> os.stat_result:
        """The whole file, which appears at once and replaces what is there; the permissions of a file that was there
        stay. Its status, whose time of change is another one than that of any file before."""
        before = self.entry()
        partial = f".{secrets.token_hex(8)}{PARTIAL}"
        descriptor = os.open(partial, _NEW, 0o666, dir_fd=self.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                if before is not None and before.is_file:
                    os.fchmod(descriptor, stat.S_IMODE(before.status.st_mode) & 0o777)
                now_ns = time.time_ns()  # the system's own time of change is that of its last tick
                os.utime(descriptor, ns=(now_ns, now_ns))
                os.fsync(descriptor)
                status = os.fstat(descriptor)
            os.replace(partial, self.base, src_dir_fd=self.parent, dst_dir_fd=self.parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial, dir_fd=self.parent)
            raise
        return status


class _End(NamedTuple):
    """Where a path leads. `status` is None where there is nothing yet."""

    name: str
    parent: int
    status: os.stat_result | None


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
                end = self._walk_to(path, opened, makes=False)
            except (OSError, ValueError) as error:
                raise ToolError(f"there is no {path!r} in the folder") from error
            assert end.status is not None, end
            yield Entry(end.name, end.status, end.parent)

    @contextmanager
    def place(self, path: str) -> Iterator[Place]:
        """Where a file can be written; folders on the way are made. ToolError for what is outside, for a folder or a
        special file, and for `.git`, whose hooks and settings are programs to run."""
        with ExitStack() as opened:
            try:
                end = self._walk_to(path, opened, makes=True)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                raise ToolError(f"{path!r} cannot be written: {reason}") from error
            if end.status is not None and not stat.S_ISREG(end.status.st_mode):
                kind = "a folder" if stat.S_ISDIR(end.status.st_mode) else "no ordinary file"
                raise ToolError(f"{path!r} is {kind}; name a file")
            yield Place(end.name, end.parent)

    def _walk_to(self, path: str, opened: ExitStack, makes: bool) -> _End:
        def enter(base: str, parent: int | None) -> int:
            folder = os.open(base, _AS_IT_IS | os.O_DIRECTORY, dir_fd=parent)
            opened.callback(os.close, folder)
            return folder

        outer = ToolError(f"{path!r} lies outside the folder")
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
            if makes and part.casefold() == ".git":
                raise ToolError(f"{path!r} is git's own; it is not written")
            try:
                status = os.lstat(part, dir_fd=folders[-1])
            except FileNotFoundError:
                if not makes:
                    raise
                if not left:
                    return _End(os.path.join(*names, part), folders[-1], None)
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=folders[-1])
                left.append(part)
                continue
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
                return _End(os.path.join(*names, part), folders[-1], status)
        if not names:
            return _End("", root, os.fstat(root))
        return _End(os.path.join(*names), folders[-2], os.fstat(folders[-1]))

    def _parts(self, path: str, outer: ToolError) -> list[str]:
        """Components, the first one last; of an absolute path those below the root."""
        if os.path.isabs(path):
            root = str(self.root).rstrip("/")
            if path != root and not path.startswith(f"{root}/"):
                raise outer
            path = path[len(root) :]
        return [part for part in reversed(path.split("/")) if part not in ("", ".")]
