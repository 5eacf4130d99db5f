"""The runs that there are: a folder each in the state folder, with the journal and the board.

swarm/2026-11-29_02-10-45/events.jsonl
                          board/
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Literal

from kimi_lite.apps.folders import make_private, state_folder
from kimi_lite.apps.swarm.events import Event, RunEnded, RunStarted, from_line
from kimi_lite.apps.swarm.journal import FILE_NAME, is_running
from kimi_lite.errors import KimiLiteError

_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
_LIST = "kimi-lite swarm list shows the runs."

RunState = Literal["running", "finished", "interrupted", "damaged"]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A line of the list."""

    run_id: str
    state: RunState
    updated_s: float  # of the journal, seconds since 1970
    task: str = ""
    ended: RunEnded | None = None  # where it is finished


class RunStore:
    """The folder of runs."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else state_folder() / "swarm"

    def create(self) -> Path:
        """The folder of a new run, named after the time; its name is the run's id."""
        make_private(self.folder, is_ours=True)
        now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        for number in count(1):
            folder = self.folder / (now if number == 1 else f"{now}-{number}")
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                continue
            except OSError as error:
                raise KimiLiteError(
                    f"The folder {folder} cannot be made: {error.strerror}.",
                    "Free space there, or name another folder in KIMI_LITE_STATE.",
                ) from error
            return folder
        raise AssertionError(now)

    def find(self, beginning: str = "") -> Path:
        """The folder of the one run whose id begins so, of the last run where nothing is said. KimiLiteError for none
        and for several."""
        if beginning and not _NAME.fullmatch(beginning):
            raise KimiLiteError(f"{beginning!r} is not the name of a run.", _LIST)
        names = sorted(path.name for path in self._folders() if path.name.startswith(beginning))
        if not names:
            raise KimiLiteError(
                f"There is no run {beginning!r} in {self.folder}."
                if beginning
                else f"There is no run in {self.folder}.",
                _LIST if beginning else 'Start one: kimi-lite swarm "TASK".',
            )
        if not beginning:
            return max((self.folder / name for name in names), key=lambda folder: _updated_s(folder))
        if len(names) > 1 and beginning not in names:
            raise KimiLiteError(f"{len(names)} runs begin with {beginning!r}.", f"{', '.join(names[:9])}")
        return self.folder / (beginning if beginning in names else names[0])

    def summaries(self) -> list[RunSummary]:
        """All runs, the last first."""
        return sorted((summarise(folder) for folder in self._folders()), key=lambda one: one.updated_s, reverse=True)

    def delete(self, folder: Path) -> None:
        """A run for good, with its board; refused while it goes on."""
        if is_running(folder):
            raise KimiLiteError(f"The run {folder.name} is going on.", "Stop it first.")
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise KimiLiteError(f"The run {folder} cannot be deleted: {error.strerror}.") from error

    def _folders(self) -> Iterator[Path]:
        return (path.parent for path in self.folder.glob(f"*/{FILE_NAME}") if _NAME.fullmatch(path.parent.name))


def summarise(folder: Path) -> RunSummary:
    """From the first and the last line of its journal."""
    updated_s, lines = _updated_s(folder), [b""]
    with suppress(OSError):
        lines = (folder / FILE_NAME).read_bytes().split(b"\n")[:-1] or lines
    first, last = _event(lines[0]), _event(lines[-1])
    if not isinstance(first, RunStarted):
        return RunSummary(folder.name, "running" if is_running(folder) else "damaged", updated_s)
    if is_running(folder):
        return RunSummary(folder.name, "running", updated_s, first.task)
    if isinstance(last, RunEnded):
        return RunSummary(folder.name, "finished", updated_s, first.task, last)
    return RunSummary(folder.name, "interrupted", updated_s, first.task)


def _event(line: bytes) -> Event | None:
    try:
        return from_line(line)
    except ValueError:
        return None


def _updated_s(folder: Path) -> float:
    try:
        return (folder / FILE_NAME).stat().st_mtime
    except OSError:
        return 0.0
