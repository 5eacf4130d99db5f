"""Saved conversations: one JSON file each in the state folder, written whole after every turn, held by one program at a
time.

A file appears under its name only when it is complete, so a kill at any moment leaves what was saved before. The hold
is a lock on `NAME.lock`, which the system lets go with the process, and which holds the process's id for whoever comes
second.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from kimi_lite.apps.folders import make_private, write_private
from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.documents import FORMAT, load_document, to_document
from kimi_lite.errors import KimiLiteError

_NAME = re.compile(r"[\w][\w.\- ]{0,99}")
_TITLE_CHARS = 60


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A line of /sessions."""

    name: str
    updated_s: float  # of the file, for sorting
    num_turns: int
    title: str  # how the first message begins
    model: str
    error: str = ""  # why it cannot be read


class SessionStore:
    """The folder of saved conversations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """KimiLiteError for a name that could leave the folder."""
        if not _NAME.fullmatch(name) or name.endswith((".partial", ".lock")):
            raise KimiLiteError(
                f"{name!r} is no name for a conversation.", "Use letters, digits, dots, dashes and spaces."
            )
        return self.folder / f"{name}.json"

    def exists(self, name: str) -> bool:
        return self.path(name).is_file()

    def new_name(self) -> str:
        """A free name made of the time."""
        base = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        names = [base, *(f"{base}-{i}" for i in range(2, 100))]
        return next(name for name in names if not self.exists(name) and not (self.folder / f"{name}.lock").exists())

    def summaries(self) -> list[SessionSummary]:
        """All of them, the latest first."""
        found = [self._summarise(path) for path in self.folder.glob("*.json")]
        return sorted(found, key=lambda one: one.updated_s, reverse=True)

    def latest(self) -> str:
        """The name of the conversation that was saved last; KimiLiteError when there is none."""
        readable = [one.name for one in self.summaries() if not one.error]
        if not readable:
            raise KimiLiteError(f"There is no conversation to continue in {self.folder}.", "Start one: kimi-lite chat.")
        return readable[0]

    def read(self, name: str) -> dict[str, Any]:
        """The document; KimiLiteError when there is none or it is no JSON."""
        path = self.path(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise KimiLiteError(
                f"There is no conversation {name!r}.", "/sessions lists those that are saved."
            ) from None
        except (OSError, ValueError) as error:
            raise KimiLiteError(
                f"The conversation {path} is damaged: {error}.", "Delete it or mend it by hand."
            ) from error

    def delete(self, name: str) -> None:
        """For good; refused while another program holds it."""
        if not self.exists(name):
            raise KimiLiteError(f"There is no conversation {name!r}.", "/sessions lists those that are saved.")
        with SessionLock(self, name):
            self.path(name).unlink()

    def _summarise(self, path: Path) -> SessionSummary:
        name, updated_s = path.name.removesuffix(".json"), 0.0
        try:
            updated_s = path.stat().st_mtime
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                return SessionSummary(name, updated_s, 0, "", "", "not a conversation of kimi-lite")
            turns = document["turns"]
            first = next((turn["content"] for turn in turns if turn["role"] == "user"), "")
            title = first if isinstance(first, str) else "".join(part.get("text", "") for part in first)
            return SessionSummary(
                name, updated_s, len(turns), " ".join(title.split())[:_TITLE_CHARS], str(document["model"])
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return SessionSummary(name, updated_s, 0, "", "", f"damaged: {type(error).__name__}: {error}")


class SessionLock:
    """The hold on a conversation's name; a context manager. KimiLiteError when another program has it."""

    def __init__(self, store: SessionStore, name: str) -> None:
        import fcntl

        self._path = store.path(name).with_name(f"{name}.lock")
        make_private(store.folder)
        for file in self._openings():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                pid = file.read().strip() or "?"
                file.close()
                raise KimiLiteError(
                    f"The conversation {name!r} is open in another kimi-lite (pid {pid}).",
                    "Go on there, close it first, or choose another one: --session NAME, /save NAME.",
                ) from None
            if self._is_still_there(file):
                break
            file.close()  # its holder removed it between our opening and our locking
        self._file = file
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()

    def release(self) -> None:
        with suppress(FileNotFoundError):
            self._path.unlink()
        self._file.close()

    def __enter__(self) -> "SessionLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _openings(self) -> Iterator[TextIO]:
        while True:
            yield os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8")

    def _is_still_there(self, file: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False


class Autosave:
    """A conversation and the name it is saved under. Nothing is written before there is something to save."""

    def __init__(self, conversation: Conversation, store: SessionStore) -> None:
        self.conversation, self.store = conversation, store
        self.name = store.new_name()
        self.is_named = False  # by the user
        self.made_by = conversation.info.name  # the model
        self._lock: SessionLock | None = None

    def save(self) -> None:
        """Write the conversation down, unless it is empty and was never saved."""
        if not self.conversation.turns and not self.store.exists(self.name):
            return
        if self._lock is None:
            self._lock = SessionLock(self.store, self.name)
        text = json.dumps(to_document(self.conversation), ensure_ascii=False, separators=(",", ":"))
        try:
            write_private(self.store.path(self.name), text)
        except OSError as error:
            raise KimiLiteError(
                f"The conversation cannot be saved to {self.store.path(self.name)}: {error.strerror} "
                f"({len(text):,} bytes).",
                "Make room, or name another folder in KIMI_LITE_STATE. What was saved before is still there.",
            ) from error

    def open(self, name: str, is_new_allowed: bool = False) -> bool:
        """Take up the conversation `name`, and whether there was one; the present one is saved and let go."""
        lock = None if name == self.name and self._lock is not None else SessionLock(self.store, name)
        try:
            is_there = self.store.exists(name)
            if is_there or not is_new_allowed:
                document = self.store.read(name)
                self.save()
                load_document(self.conversation, document, f"The conversation {name!r}")
                self.made_by = str(document["model"])
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        if lock is not None:
            self.close()
            self._lock = lock
        self.name, self.is_named = name, True
        return is_there

    def save_as(self, name: str) -> None:
        """Go on under `name`; the file of a name that the program made up goes away."""
        if name != self.name:
            if self.store.exists(name):
                raise KimiLiteError(
                    f"There is a conversation {name!r} already.", f"Choose another name, or /load {name}."
                )
            lock, old, was_named = SessionLock(self.store, name), self.name, self.is_named
            self.close()
            self.name, self._lock = name, lock
            self.save()
            if not was_named:
                self.store.path(old).unlink(missing_ok=True)
        self.is_named = True
        self.save()

    def start_new(self) -> None:
        """Leave the present conversation as it is saved, and begin another."""
        self.save()
        self.close()
        self.name, self.is_named = self.store.new_name(), False
        self.conversation.clear()

    def close(self) -> None:
        """Let go of the name."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
