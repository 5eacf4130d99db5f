"""What is piped or redirected into `kimi-lite run`: `git diff | kimi-lite run "Write a commit message."`

A pipe that is never closed must not stop a program that has its prompt already (Node's `exec`, cron and daemons leave
one behind). So a pipe whose other end only our ancestors hold gets a few seconds for its first byte; a neighbour in the
shell's pipeline gets as long as it takes.
"""

import os
import select
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import MAX_TEXT_BYTES, decode_text

FIRST_BYTE_S = 3.0  # for a pipe that no neighbour in the pipeline writes
PATIENCE_S = 1.0  # then it is said what is waited for
_CHUNK_BYTES = 1 << 20


def read_piped(stdin: TextIO | None, is_wanted: bool, say: Callable[[str], None]) -> str:
    """The text that comes through stdin; "" where nothing does.

    `is_wanted`: it is the prompt, so it is waited for, at a terminal too. Otherwise it is what goes with one. `say`
    tells what is waited for. KimiLiteError for what is no text.
    """
    if stdin is None or stdin.closed or (stdin.isatty() and not is_wanted):
        return ""
    try:
        descriptor = stdin.fileno()
    except OSError:  # not a file of the system
        return decode_text(stdin.buffer.read(), "What came through stdin")
    try:
        return decode_text(_read(descriptor, is_wanted, say), "What came through stdin")
    except OSError as error:
        if not is_wanted:
            return ""  # open for writing only, for instance
        raise KimiLiteError(f"stdin cannot be read: {error.strerror}.", "Use -f FILE.") from error


def _read(descriptor: int, is_wanted: bool, say: Callable[[str], None]) -> bytes:
    """Bytes up to the end, or to more than a text may have."""
    mode = os.fstat(descriptor).st_mode
    is_stream = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
    has_limit = is_stream and not is_wanted and not _has_neighbour(descriptor)
    data, began_s, is_told = bytearray(), time.monotonic(), False
    while len(data) <= MAX_TEXT_BYTES:
        if not select.select([descriptor], [], [], 0.1)[0]:
            waited_s = time.monotonic() - began_s
            if has_limit and not data and waited_s > FIRST_BYTE_S:
                say(f"nothing came through stdin in {FIRST_BYTE_S:.0f} s: the prompt goes without it (-f - waits)")
                return b""
            if waited_s > PATIENCE_S and not is_told and not has_limit:
                say("reading stdin (Ctrl-D ends it)" if os.isatty(descriptor) else "reading stdin")
                is_told = True
            continue
        chunk = os.read(descriptor, _CHUNK_BYTES)
        if not chunk:
            break
        data += chunk
    return bytes(data)


def _has_neighbour(descriptor: int) -> bool:
    """Whether a process of our own group that is not our ancestor holds the pipe, too: `slow | kimi-lite run ...`."""
    proc, pipe = Path("/proc"), os.fstat(descriptor)
    if not (proc / "self/fd").is_dir():
        return True  # not to be known here: wait
    group, ancestors = os.getpgrp(), _ancestors()
    for process in proc.iterdir():
        if not process.name.isdecimal() or int(process.name) in ancestors:
            continue
        try:
            if os.getpgid(int(process.name)) != group:
                continue
            if any(os.path.samestat(pipe, os.stat(entry)) for entry in _entries(process / "fd")):
                return True
        except PermissionError:
            return True  # sudo something | kimi-lite run ...
        except OSError:  # it has ended
            continue
    return False


def _entries(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.exists()]


def _ancestors() -> set[int]:
    """Us, our parent, its parent and so on."""
    found, pid = set(), os.getpid()
    while pid > 0 and pid not in found:
        found.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            break
    return found
