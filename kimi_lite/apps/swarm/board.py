"""Files that the agents of a swarm share: a run's scratch board, and the folder that `--dir` names.

    board = SharedFiles(run.folder / "board", on_conflict, name="board")
    tools = board.tools("a3")  # board_list_files, board_read_file, board_search_files, board_write_file, ...

An agent overwrites what it has seen and nothing else. A write is refused, and the agent told what to do, where the file
is not what that agent last read or wrote: because another agent wrote it meanwhile, because a program outside did, or
because the agent never read what is there. To append needs no reading, so any number of agents can add to one file.

A file appears whole. From the comparison to the write a lock is held on the file's folder (`flock`), against the other
agents and against other programs that lock it too, another run in the same folder among them.
"""

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kimi_lite.apps.tools.files import LARGEST_SEARCHED_BYTES, Reading, file_tools
from kimi_lite.apps.tools.folder import Entry, Folder, Place
from kimi_lite.apps.tools.tool import ShouldStop, Tool, ToolError, parameters
from kimi_lite.units import counted

BOARD = "board"  # the name of a run's own folder, in the run's folder and before its tools
LARGEST_BYTES = LARGEST_SEARCHED_BYTES  # of a file that is written
LOCK_S = 10.0  # how long a lock is waited for; it is held for milliseconds

OnConflict = Callable[[str, tuple[str, ...]], None]  # path; the agent that was refused, then who wrote, where known


class Version(NamedTuple):
    """Which content a file has: no two that are written here are the same."""

    inode: int
    modified_ns: int
    size: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Version":
        return cls(status.st_ino, status.st_mtime_ns, status.st_size)


class SharedFiles:
    """One folder with its agents' views of it. The tools may be called from any thread."""

    def __init__(self, root: Path, on_conflict: OnConflict, name: str = "") -> None:
        """`name` stands before the names of the tools (`board_read_file`) and the paths that are reported
        (`board/plan.md`). KimiLiteError where there is no folder `root`."""
        self.folder, self.name = Folder(root), name
        self._on_conflict = on_conflict
        self._lock = threading.Lock()  # over the three below
        self._seen: dict[tuple[str, str], Version] = {}  # by agent and path
        self._begun: dict[tuple[str, str], tuple[Version, int]] = {}  # read from line 1 up to a line, not to the end
        self._written: dict[str, tuple[Version, str]] = {}  # by path: the last write here, and the agent

    def tool_name(self, tool: str) -> str:
        return f"{self.name}_{tool}" if self.name else tool

    def tools(self, agent_id: str) -> list[Tool]:
        """For one agent: to list, read and search, and to write and append."""

        def on_read(reading: Reading) -> None:
            self._take_reading(agent_id, reading)

        path = {"type": "string", "description": "Path inside the folder, relative to it. Folders are made."}
        writing = [
            Tool(
                "write_file",
                "Write a text file whole. One that exists must have been read to its end, as it is now.",
                parameters(("path", "text"), path=path, text={"type": "string"}),
                lambda arguments, should_stop: self.write(agent_id, should_stop, **arguments),
            ),
            Tool(
                "append_file",
                "Add text at the end of a text file, or begin one. Needs no reading before.",
                parameters(("path", "text"), path=path, text={"type": "string"}),
                lambda arguments, should_stop: self.append(agent_id, should_stop, **arguments),
            ),
        ]
        shared = f" The {self.name} is a folder that all agents of this run share." if self.name else ""
        return [
            replace(tool, name=self.tool_name(tool.name), description=tool.description + shared)
            for tool in (*file_tools(self.folder, on_read), *writing)
        ]

    def write(self, agent_id: str, should_stop: ShouldStop, path: str, text: str) -> str:
        """Replace a file that is as the agent saw it, or make a new one; ToolError where it is not."""
        data = _encoded(text)
        with self._locked(path, should_stop) as place:
            there = place.entry()
            if there is not None:
                self._require_seen(agent_id, path, there)
            self._replace(agent_id, place, data, knows_all=True)
        return f"{path} is written: {_amount(data)}"

    def append(self, agent_id: str, should_stop: ShouldStop, path: str, text: str) -> str:
        """Add to the end of what is there, by any agent."""
        data = _encoded(text)
        with self._locked(path, should_stop) as place:
            there, before, knows_all = place.entry(), b"", True
            if there is not None:
                with there.open() as file:
                    version, before = Version.of(os.fstat(file.fileno())), file.read(LARGEST_BYTES + 1)
                knows_all = self._seen_by(agent_id, there.name) == version
            _require_small(before + data, path)
            self._replace(agent_id, place, before + data, knows_all)
        return f"{path} has {_amount(data)} more: {_amount(before + data)} in all"

    def _take_reading(self, agent_id: str, reading: Reading) -> None:
        """An agent has seen a file when it has read it to its end, in one call or in several that leave no gap."""
        key, version = (agent_id, reading.name), Version.of(reading.status)
        with self._lock:
            before, next_line = self._begun.get(key, (version, 1))
            next_line = next_line if before == version else 1
            if reading.first_line > next_line:
                return
            if reading.next_line is None:
                self._seen[key] = version
            else:
                self._begun[key] = version, max(next_line, reading.next_line)

    def _replace(self, agent_id: str, place: Place, data: bytes, knows_all: bool) -> None:
        """`knows_all`: the agent knows what the file then holds."""
        try:
            version = Version.of(place.write(data))
        except OSError as error:
            raise ToolError(f"{place.name!r} cannot be written: {error.strerror}") from error
        with self._lock:
            self._written[place.name] = (version, agent_id)
            if knows_all:
                self._seen[agent_id, place.name] = version

    def _require_seen(self, agent_id: str, path: str, there: Entry) -> None:
        """ToolError where `there` is not what the agent last saw of it."""
        current, seen = Version.of(there.status), self._seen_by(agent_id, there.name)
        if current == seen:
            return
        with self._lock:
            written, writer = self._written.get(there.name, (None, ""))
        is_known = written == current  # else a program outside wrote since
        if seen is not None or is_known:
            self._on_conflict(os.path.join(self.name, there.name), (agent_id, writer) if is_known else (agent_id,))
        who = f"Agent {writer} wrote it" if is_known else "It was changed from outside" if seen else "It was there"
        since = "after you last saw it" if seen else "before, and you have not read it to its end"
        raise ToolError(
            f"{path!r} was not written: it holds something else than you know. {who} {since}. Read it with "
            f"{self.tool_name('read_file')}, then write what keeps the work of both; or write to another file."
        )

    def _seen_by(self, agent_id: str, name: str) -> Version | None:
        with self._lock:
            return self._seen.get((agent_id, name))

    @contextmanager
    def _locked(self, path: str, should_stop: ShouldStop) -> Iterator[Place]:
        """The place of a file, whose folder is locked."""
        with self.folder.place(path) as place:
            end_s = time.monotonic() + LOCK_S
            while not _try_lock(place.parent, path):
                if should_stop() or time.monotonic() > end_s:
                    raise ToolError(f"{path!r} is locked by another program for {LOCK_S:g} s. Try again later")
                time.sleep(0.005)
            yield place  # its descriptor is closed with it, and the lock is gone


def _try_lock(folder: int, path: str) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        raise ToolError(f"{path!r} cannot be locked and was not written: {error.strerror}") from error
    return True


def _encoded(text: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ToolError("the text holds half a surrogate pair, which is no character") from error
    if b"\0" in data:
        raise ToolError("the text holds a NUL, which no text file has")
    _require_small(data, "the text")
    return data


def _require_small(data: bytes, what: str) -> None:
    if len(data) > LARGEST_BYTES:
        raise ToolError(f"{what} would have {len(data):,} bytes; a file may have {LARGEST_BYTES:,}. Split it")


def _amount(data: bytes) -> str:
    return f"{counted(len(data.splitlines()), 'line')}, {counted(len(data), 'byte')}"
