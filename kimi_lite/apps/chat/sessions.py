"""Saved conversations: one JSON file each in the state folder, written whole before and after every answer, held by one
program at a time.

A file appears under its name only when it is complete, so a kill at any moment leaves what was saved before. The hold
is a lock on `NAME.lock`, which the system releases with the process; the file tells the next program its id. A name is
taken under its lock, so two chats that begin in the same second get two names.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TextIO

from kimi_lite.apps.folders import make_private, write_private
from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.documents import FORMAT, load_document, read_document, to_document
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import PARTIAL

_NAME = re.compile(r"[\w][\w.\- ]{0,99}")
_TITLE_CHARS = 60
_LOCK = ".lock"


class HeldElsewhere(KimiLiteError):
    """Another program has the conversation open."""


class NotWritable(KimiLiteError):
    """The folder of conversations takes no files."""


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A line of /sessions."""

    name: str
    updated_s: float  # of the file, for sorting
    num_exchanges: int
    title: str  # how the first message begins
    model: str
    error: str = ""  # why it cannot be read


class SessionStore:
    """The folder of saved conversations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """KimiLiteError for a name that could leave the folder."""
        if not _NAME.fullmatch(name) or name.endswith((PARTIAL, _LOCK)):
            raise KimiLiteError(
                f"{name!r} is not a valid name of a conversation.", "Use letters, digits, dots, dashes and spaces."
            )
        return self.folder / f"{name}.json"

    def exists(self, name: str) -> bool:
        return self.path(name).is_file()

    def summaries(self) -> list[SessionSummary]:
        """All of them, the latest first."""
        found = [self._summarise(path) for path in self.folder.glob("*.json")]
        return sorted(found, key=lambda one: one.updated_s, reverse=True)

    def latest(self) -> str:
        """The name of the conversation that was saved last; KimiLiteError when there is none."""
        names = [one.name for one in self.summaries() if one.num_exchanges]
        if not names:
            raise KimiLiteError(f"There is no conversation to continue in {self.folder}.", "Start one: kimi-lite chat.")
        return names[0]

    def find(self, beginning: str) -> str:
        """The one name that is `beginning` or begins so; `beginning` itself where none does. KimiLiteError for
        several."""
        if self.exists(beginning):
            return beginning
        names = sorted(path.name.removesuffix(".json") for path in self.folder.glob("*.json"))
        names = [name for name in names if name.startswith(beginning)]
        if len(names) > 1:
            raise KimiLiteError(f"{len(names)} conversations begin with {beginning!r}.", f"{', '.join(names[:9])}")
        return names[0] if names else beginning

    def read(self, name: str) -> object:
        """The document, not yet checked; KimiLiteError when there is none or it is not valid JSON."""
        path = self.path(name)
        if not path.exists():
            raise KimiLiteError(f"There is no conversation {name!r}.", "/sessions lists those that are saved.")
        try:
            return _load(path)
        except (OSError, ValueError, RecursionError) as error:
            raise KimiLiteError(
                f"The conversation {path} is damaged: {_reason(error)}.", "Delete it or fix it by hand."
            ) from error

    def delete(self, name: str) -> None:
        """For good, with what killed saves left of it; refused while another program holds it."""
        if not self.exists(name):
            raise KimiLiteError(f"There is no conversation {name!r}.", "/sessions lists those that are saved.")
        with SessionLock(self, name):
            self.path(name).unlink()
            self._remove_leftovers(name)

    def clean(self) -> None:
        """Remove what killed programs left: unfinished files, which may hold deleted text, and locks."""
        leftovers = {path.name.split(".json.")[0] for path in self.folder.glob(f"*.json.*{PARTIAL}")}
        locks = {path.name.removesuffix(_LOCK) for path in self.folder.glob(f"*{_LOCK}")}
        for name in leftovers | locks:
            with suppress(KimiLiteError, OSError), SessionLock(self, name):
                self._remove_leftovers(name)

    def _remove_leftovers(self, name: str) -> None:
        """Of a name whose lock is held, so that nothing is being written."""
        for path in self.folder.glob("*" + PARTIAL):
            if re.fullmatch(re.escape(f"{name}.json.") + r"\d+" + re.escape(PARTIAL), path.name):
                path.unlink(missing_ok=True)

    def _summarise(self, path: Path) -> SessionSummary:
        name, updated_s = path.name.removesuffix(".json"), 0.0
        try:
            updated_s = path.stat().st_mtime
            document = _load(path)
            if document["format"] != FORMAT:
                return SessionSummary(name, updated_s, 0, "", "", "not a conversation of kimi-lite")
            messages = [turn["content"] for turn in document["turns"] if turn["role"] == "user"]
            first = messages[0] if messages else ""
            title = first if isinstance(first, str) else "".join(part.get("text", "") for part in first)
            title = " ".join(title.split())[:_TITLE_CHARS]
            return SessionSummary(name, updated_s, len(messages), title, str(document["model"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return SessionSummary(name, updated_s, 0, "", "", f"damaged: {_reason(error)}")


def _load(path: Path) -> object:
    if not path.is_file():
        raise ValueError("it is not a file")
    return json.loads(path.read_bytes())


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"


class SessionLock:
    """The hold on a conversation's name; a context manager. HeldElsewhere when another program has it, NotWritable when
    there can be no lock."""

    def __init__(self, store: SessionStore, name: str) -> None:
        self._path = store.path(name).with_name(f"{name}{_LOCK}")
        try:
            make_private(store.folder, is_ours=True)
            self._file = self._locked()
            with suppress(OSError):  # a full disk: the lock holds all the same
                self._file.truncate(0)
                os.pwrite(self._file.fileno(), str(os.getpid()).encode(), 0)
        except BlockingIOError:
            raise HeldElsewhere(
                f"The conversation {name!r} is open in another kimi-lite (pid {self._holder()}).",
                "Go on there, close it first, or choose another one: --session NAME, /save NAME.",
            ) from None
        except OSError as error:
            raise NotWritable(
                f"Conversations cannot be saved in {store.folder}: {error.strerror}.",
                "Free space there, or name another folder in KIMI_LITE_STATE.",
            ) from error
        except KimiLiteError as error:
            raise NotWritable(error.message, error.hint) from error

    def release(self) -> None:
        """A second call does nothing: the name may be held by another program by then."""
        if not self._file.closed:
            with suppress(OSError):
                self._path.unlink()
            self._file.close()

    def __enter__(self) -> "SessionLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _locked(self) -> TextIO:
        """The file, locked and still the one under its name: a holder that ends removes it."""
        for file in self._openings():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self._path, follow_symlinks=False)):
                    return file
            except FileNotFoundError:
                pass
            except BaseException:
                file.close()
                raise
            file.close()
        raise AssertionError(self._path)

    def _openings(self) -> Iterator[TextIO]:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            yield os.fdopen(descriptor, "r+", encoding="utf-8")

    def _holder(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8", errors="replace").strip()[:20] or "?"
        except OSError:
            return "?"


@dataclass(frozen=True, slots=True)
class Claim:
    """A conversation that is to be opened: its name and document, checked, under its lock. Taken before the model is
    loaded, so that what can fail fails early."""

    name: str
    document: object | None  # None: it is new
    lock: SessionLock | None  # None: it can be read but not saved

    @classmethod
    def of(cls, store: SessionStore, name: str, is_new_allowed: bool = False) -> "Claim":
        """KimiLiteError for a conversation that is held elsewhere, damaged, or not there."""
        store.path(name)
        try:
            lock = SessionLock(store, name)
        except NotWritable:
            lock = None
        try:
            document = None
            if store.exists(name) or not is_new_allowed:
                document = store.read(name)
                read_document(document, f"The conversation {name!r}")
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return cls(name, document, lock)

    def release(self) -> None:
        if self.lock is not None:
            self.lock.release()


class Autosave:
    """A conversation and the name it is saved under. Nothing is written before there is something to save."""

    def __init__(self, conversation: Conversation, store: SessionStore) -> None:
        self.conversation, self.store = conversation, store
        self.name = _name_of_now()  # until the first save takes it, or another one where it is taken
        self.is_named = False  # by the user
        self.made_by = conversation.info.name  # the model
        self._lock: SessionLock | None = None

    @property
    def is_saved(self) -> bool:
        """Whether there is a file of it."""
        return self._lock is not None and self.store.exists(self.name)

    def save(self) -> None:
        """Write the conversation down. Of one that is empty and has no name of the user's, nothing is kept.

        KimiLiteError where it cannot be written; what was saved before is still there then.
        """
        if not self.conversation.turns and not self.is_named:
            if self._lock is not None:
                self.store.path(self.name).unlink(missing_ok=True)
            return
        if self._lock is None:
            self._take_name()
        text = self.text()
        path = self.store.path(self.name)
        try:
            write_private(path, text)
        except OSError as error:
            raise NotWritable(
                f"The conversation cannot be saved to {path}: {error.strerror} ({len(text):,} bytes).",
                "Free space there, or write it elsewhere: /export json FILE. What was saved before is still there.",
            ) from error

    def text(self) -> str:
        """The file's content."""
        return json.dumps(to_document(self.conversation), ensure_ascii=False, separators=(",", ":"))

    def open(self, claim: Claim) -> bool:
        """Go on with a claimed conversation; whether there was one. The present one is to be saved before."""
        if claim.document is not None:
            load_document(self.conversation, claim.document, f"The conversation {claim.name!r}")
            self.made_by = str(claim.document["model"])
        self.close()
        self.name, self.is_named, self._lock = claim.name, True, claim.lock
        return claim.document is not None

    def save_as(self, name: str) -> None:
        """Go on under `name`; the file of a name that the program made up is removed."""
        if name == self.name:
            self.is_named = True
            self.save()
            return
        lock = SessionLock(self.store, name)
        if self.store.exists(name):
            lock.release()
            raise KimiLiteError(f"There is a conversation {name!r} already.", f"Choose another name, or /load {name}.")
        old = self.name, self.is_named, self._lock
        self.name, self.is_named, self._lock = name, True, lock
        try:
            self.save()
        except BaseException:
            lock.release()
            self.name, self.is_named, self._lock = old
            raise
        old_name, was_named, old_lock = old
        if old_lock is not None:
            if not was_named:
                self.store.path(old_name).unlink(missing_ok=True)
            old_lock.release()

    def start_new(self) -> None:
        """Begin another conversation. The present one is to be saved before."""
        self.close()
        self.name, self.is_named, self.made_by = _name_of_now(), False, self.conversation.info.name
        self.conversation.clear()

    def close(self) -> None:
        """Release the name."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _take_name(self) -> None:
        """Lock the name, or the next that is free where it is not the user's own."""
        for number in count(1):
            name = self.name if number == 1 else f"{self.name}-{number}"
            try:
                lock = SessionLock(self.store, name)
            except HeldElsewhere:
                if self.is_named:
                    raise
                continue
            if self.is_named or not self.store.exists(name):
                self.name, self._lock = name, lock
                return
            lock.release()


def _name_of_now() -> str:
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
