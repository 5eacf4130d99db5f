"""The journal of a run: `events.jsonl` in its folder, one event a line, only ever appended to.

    with Journal(folder) as journal:  # a listener of events
        journal(event)
    events = read(folder).events

The file is locked while a program writes it: that is how others know that the run goes on. A kill leaves at most one
torn line at the end, which readers leave out and the next writer takes away.
"""

import fcntl
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kimi_lite.apps.folders import make_private
from kimi_lite.apps.swarm.events import AgentProgress, Event, from_line, to_line
from kimi_lite.errors import KimiLiteError

FILE_NAME = "events.jsonl"
PROGRESS_S = 1.0  # between two kept progress events of an agent whose state stays the same


class Journal:
    """Writes events down, for one program at a time. What resuming depends on is on the disk when the call returns."""

    def __init__(self, folder: Path) -> None:
        """KimiLiteError where another program runs the same run, or where nothing can be written."""
        self.path = make_private(folder, is_ours=True) / FILE_NAME
        self._lock = threading.Lock()
        self._kept_progress: dict[str, AgentProgress] = {}
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._file = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        try:
            _lock(self._file)
            self._drop_torn_line()
        except BlockingIOError as error:
            os.close(self._file)
            raise KimiLiteError(
                f"The run {folder.name} is going on in another kimi-lite.", "Watch it there."
            ) from error
        except OSError as error:
            os.close(self._file)
            raise _unwritable(self.path, error) from error

    def __call__(self, event: Event) -> None:
        """Append it. KimiLiteError where the disk takes no more: the journal then ends with a whole line."""
        with self._lock:
            is_over = self._file < 0  # a tool that could not be stopped may still have something to tell
            if is_over or (isinstance(event, AgentProgress) and not self._keeps(event)):
                return
            data = to_line(event).encode("ascii") + b"\n"
            end = os.fstat(self._file).st_size
            try:
                while data:
                    data = data[os.write(self._file, data) :]
                if event.is_durable:
                    os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, end)
                raise _unwritable(self.path, error) from error

    def close(self) -> None:
        """Let go of the run; a second call does nothing."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _keeps(self, event: AgentProgress) -> bool:
        """Of progress: changes of state, and what is `PROGRESS_S` younger than the last that was kept."""
        last = self._kept_progress.get(event.agent_id)
        if last is not None and last.state == event.state and event.t_s - last.t_s < PROGRESS_S:
            return False
        self._kept_progress[event.agent_id] = event
        return True

    def _drop_torn_line(self) -> None:
        """A line that a kill cut off must not become the beginning of the next one."""
        data = self.path.read_bytes()
        os.ftruncate(self._file, data.rfind(b"\n") + 1)


class Recorded(NamedTuple):
    """What a journal holds."""

    events: list[Event]
    damaged: list[int]  # numbers of lines, from 1, that are no events; a torn last line does not count
    num_unknown: int  # events of kinds that a newer version wrote


def read(folder: Path) -> Recorded:
    """The events of a run, also while it goes on; KimiLiteError where there is no journal."""
    path = folder / FILE_NAME
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except OSError as error:
        raise KimiLiteError(f"The run's journal {path} cannot be read: {error.strerror}.") from error
    events, damaged, num_unknown = [], [], 0
    for number, line in enumerate(lines, start=1):
        try:
            event = from_line(line)
        except ValueError:
            damaged.append(number)
            continue
        if event is None:
            num_unknown += 1
        else:
            events.append(event)
    return Recorded(events, damaged, num_unknown)


def is_running(folder: Path) -> bool:
    """Whether a program writes the run's journal now."""
    try:
        file = os.open(folder / FILE_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _lock(file: int) -> None:
    """BlockingIOError where a program holds it; `is_running` of another one has it for a moment."""
    for _ in range(20):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.01)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unwritable(path: Path, error: OSError) -> KimiLiteError:
    return KimiLiteError(
        f"The run's journal {path} cannot be written: {error.strerror}.",
        "Free space there, or name another folder in KIMI_LITE_STATE.",
    )
