"""/save, /load, /sessions, /export: conversations on disk."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_lite.apps.chat.attachments import counted
from kimi_lite.apps.chat.commands.registry import Registry
from kimi_lite.apps.chat.export import FORMATS, export
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import whole_file

if TYPE_CHECKING:
    from kimi_lite.apps.chat.chat import Chat

COMMANDS = Registry()
_MOST_LISTED = 30


@COMMANDS.command("save", usage="[NAME]")
def _save(chat: Chat, argument: str) -> None:
    """save the conversation (it is, after every answer), under a name of yours"""
    if not chat.session.turns:
        raise KimiLiteError("There is nothing to save yet.", "Say something first.")
    if argument:
        chat.autosave.save_as(argument)
    else:
        chat.autosave.save()
    chat.say(f"saved as {chat.autosave.name}")


@COMMANDS.command("load", "resume", usage="NAME", arguments="session")
def _load(chat: Chat, argument: str) -> None:
    """take up a saved conversation; the present one stays saved"""
    if not argument:
        raise KimiLiteError("There is no name.", "/sessions lists the conversations that are saved.")
    chat.take_up(argument)
    chat.attachments.clear()


@COMMANDS.command("sessions", usage="[delete NAME]", arguments=("delete",))
def _sessions(chat: Chat, argument: str) -> None:
    """list the saved conversations, or delete one"""
    word, _, name = argument.partition(" ")
    if word:
        _delete(chat, word, name.strip())
        return
    found = chat.autosave.store.summaries()
    if not found:
        chat.say("no conversation is saved yet")
    rows = []
    for one in found[:_MOST_LISTED]:
        mark = " · this one" if one.name == chat.autosave.name else ""
        when = datetime.fromtimestamp(one.updated_s).strftime("%d %b %H:%M")
        rows.append((one.name, one.error or f"{when} · {counted(one.num_turns, 'turn')}{mark} · {one.title}"))
    chat.say_table(rows)
    if len(found) > _MOST_LISTED:
        chat.say(f"and {len(found) - _MOST_LISTED} older ones in {chat.autosave.store.folder}")


def _delete(chat: Chat, word: str, name: str) -> None:
    if word != "delete" or not name:
        raise KimiLiteError(f"/sessions {word} is not known.", "It is /sessions or /sessions delete NAME.")
    if name == chat.autosave.name:
        raise KimiLiteError(f"{name!r} is the conversation you are in.", "/clear begins another one; delete it then.")
    chat.autosave.store.delete(name)
    chat.say(f"deleted {name}")


@COMMANDS.command("export", usage="[md | json] [FILE]", arguments=FORMATS)
def _export(chat: Chat, argument: str) -> None:
    """write the conversation to a file, as Markdown or JSON; without FILE into this folder"""
    first, _, rest = argument.partition(" ")
    form = first if first in FORMATS else Path(first).suffix.removeprefix(".") or "md"
    name = rest.strip() if first in FORMATS else argument
    if form not in FORMATS:
        raise KimiLiteError(f"There is no format {form!r}.", "It is /export md FILE or /export json FILE.")
    if not chat.session.turns:
        raise KimiLiteError("There is nothing to export yet.", "Say something first.")
    path = Path(name or f"{chat.autosave.name}.{form}").expanduser()
    if path.exists():
        raise KimiLiteError(f"{path} exists already.", "Choose another name, or delete it first.")
    _write(path, export(chat.session, form))
    chat.say(f"written to {path}")


def _write(path: Path, text: str) -> None:
    """The file appears only when it is complete."""
    try:
        with whole_file(path) as file:
            file.write(text)
    except OSError as error:
        raise KimiLiteError(f"The conversation cannot be written to {path}: {error.strerror}.") from error
