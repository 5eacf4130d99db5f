"""Tools to list, read and search the files of one folder: read-only, text only, every answer of bounded size and
time."""

import codecs
import os
import time
from collections.abc import Callable
from fnmatch import fnmatch
from itertools import islice
from typing import NamedTuple

from kimi_lite.apps.tools.folder import Entry, Folder
from kimi_lite.apps.tools.tool import LONGEST_RESULT, ShouldStop, Tool, ToolError, parameters

MOST_ENTRIES, MOST_DEPTH, MOST_SEARCHED_DEPTH = 500, 8, 64
MOST_LINES, LONGEST_LINE = 2000, 2000  # of one answer; characters
MOST_MATCHES, LONGEST_MATCH = 100, 200
LARGEST_SEARCHED_BYTES, SEARCH_S = 4 * 1024**2, 10.0
PROBE_BYTES = 8192


class Reading(NamedTuple):
    """What a call of `read_file` showed of a file: lines from one number up to another, None for the end."""

    name: str  # path in the folder
    status: os.stat_result  # of what was read
    first_line: int
    next_line: int | None


OnRead = Callable[[Reading], None]


def ignore_read(reading: Reading) -> None:
    """Where it does not matter what was read."""


def file_tools(folder: Folder, on_read: OnRead = ignore_read) -> list[Tool]:
    """The three tools for `folder`. `on_read` hears what `read_file` showed."""
    path = {"type": "string", "description": "Path inside the folder, relative to it. Default: the folder itself."}
    return [
        Tool(
            "list_files",
            "List files and folders, with sizes in bytes.",
            parameters(
                path=path, depth={"type": "integer", "description": "Levels of folders. Default: 1.", "minimum": 1}
            ),
            lambda arguments, _: list_files(folder, **arguments),
        ),
        Tool(
            "read_file",
            "Read lines of a text file.",
            parameters(
                ("path",),
                path=path | {"description": "Path inside the folder, relative to it."},
                first_line={"type": "integer", "description": "Number of the first line. Default: 1.", "minimum": 1},
                num_lines={"type": "integer", "description": f"Default and maximum: {MOST_LINES}.", "minimum": 1},
            ),
            lambda arguments, should_stop: read_file(folder, should_stop, **arguments, on_read=on_read),
        ),
        Tool(
            "search_files",
            "Find lines with a text (no pattern; upper and lower case are the same) in text files, at any depth.",
            parameters(
                ("text",),
                text={"type": "string"},
                path=path,
                name={"type": "string", "description": "Only files whose names match this pattern, e.g. *.py."},
            ),
            lambda arguments, should_stop: search_files(folder, should_stop, **arguments),
        ),
    ]


def list_files(folder: Folder, path: str = ".", depth: int = 1) -> str:
    rows = []
    with folder.find(path) as start:
        if not start.is_folder:
            raise ToolError(f"{path!r} is a file; read_file reads it")
        for entry in islice(start.walk(min(depth, MOST_DEPTH)), MOST_ENTRIES + 1):
            kind = " (link)" if entry.is_link else "/" if entry.is_folder else f" {entry.status.st_size}"
            rows.append(entry.name + kind)
    if len(rows) > MOST_ENTRIES:
        rows[MOST_ENTRIES:] = [f"[more than {MOST_ENTRIES} entries; list a folder inside]"]
    return "\n".join(rows) or "(empty)"


def read_file(
    folder: Folder,
    should_stop: ShouldStop,
    path: str,
    first_line: int = 1,
    num_lines: int = MOST_LINES,
    on_read: OnRead = ignore_read,
) -> str:
    """The lines, and where there are more, how to go on."""
    start, most, size, rows = int(max(first_line, 1)), int(min(num_lines, MOST_LINES)), 0, []
    next_line: int | None = None
    end_s = time.monotonic() + SEARCH_S
    with folder.find(path) as entry:
        if entry.is_folder:
            raise ToolError(f"{path!r} is a folder; list_files lists it")
        name, file = entry.name, entry.open()
    with file:
        status = os.fstat(file.fileno())
        _require_text(file.read(PROBE_BYTES), path)
        file.seek(0)
        for number, line in enumerate(iter(lambda: file.readline(1024**2), b""), start=1):
            if should_stop() or time.monotonic() > end_s:
                rows.append(f"[stopped after {SEARCH_S:g} s at line {number}]")
                next_line = max(number, start)
                break
            if number < start:
                continue
            if len(rows) == most or size > LONGEST_RESULT * 3 // 4:
                rows.append(f"[more lines; go on with first_line={number}]")
                next_line = number
                break
            text = line.decode("utf-8", "replace").rstrip("\n")
            rows.append(text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]} [... line cut]")
            size += len(rows[-1])
    on_read(Reading(name, status, start, next_line))
    if not rows:
        return f"(no line {start})" if start > 1 else "(empty file)"
    return "\n".join(rows)


def search_files(folder: Folder, should_stop: ShouldStop, text: str, path: str = ".", name: str = "*") -> str:
    """`file:line: text` for every match; notes where it was cut short."""
    if not text:
        raise ToolError("the text to search for is empty")
    wanted, rows, end_s = text.casefold(), [], time.monotonic() + SEARCH_S
    with folder.find(path) as start:
        for entry in start.walk(MOST_SEARCHED_DEPTH) if start.is_folder else [start]:
            if should_stop() or time.monotonic() > end_s:
                rows.append(f"[stopped after {SEARCH_S:g} s; search a folder inside]")
                break
            if entry is start or (entry.is_file and fnmatch(entry.base, name)):
                rows += _matches(entry, wanted)
            if len(rows) > MOST_MATCHES:
                rows[MOST_MATCHES:] = [f"[more than {MOST_MATCHES} matches; search for something rarer]"]
                break
    return "\n".join(rows) or "(no match)"


def _matches(entry: Entry, wanted: str) -> list[str]:
    """Matches in one file; none in files that are large, unreadable or no text."""
    try:
        with entry.open() as file:
            data = file.read(LARGEST_SEARCHED_BYTES + 1)
        _require_text(data[:PROBE_BYTES], entry.name)
    except (ToolError, OSError):
        return []
    if len(data) > LARGEST_SEARCHED_BYTES:
        return []
    lines = enumerate(data.decode("utf-8", "replace").split("\n"), start=1)
    found = [(number, line.strip()) for number, line in lines if wanted in line.casefold()]
    return [f"{entry.name}:{number}: {line[:LONGEST_MATCH]}" for number, line in found[: MOST_MATCHES + 1]]


def _require_text(beginning: bytes, path: str) -> None:
    """ToolError unless a file's first bytes are UTF-8 without NUL; a character cut where the probe ends does not
    count."""
    is_whole = len(beginning) < PROBE_BYTES
    try:
        codecs.getincrementaldecoder("utf-8")().decode(beginning, final=is_whole)
    except UnicodeDecodeError as error:
        raise ToolError(f"{path} is not a UTF-8 text file") from error
    if b"\0" in beginning:
        raise ToolError(f"{path} is a binary file")
