"""/save, /load, /sessions, /export: conversations on disk."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_lite.apps.chat.commands.registry import Registry
from kimi_lite.apps.chat.export import FORMATS, Pictures, export
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import require_writable, whole_file
from kimi_lite.units import counted

if TYPE_CHECKING:
    from kimi_lite.apps.chat.chat import Chat

COMMANDS = Registry()
_MOST_LISTED = 30


@COMMANDS.command("save", usage="[NAME]")
def _save(chat: Chat, argument: str) -> None:
    """name the conversation; it is saved after every answer in any case"""
    if not chat.conversation.turns:
        raise KimiLiteError("There is nothing to save yet.", "Say something first.")
    chat.autosave.save_as(argument) if argument else chat.autosave.save()
    chat.say(f"saved as {chat.autosave.name}")


@COMMANDS.command("load", "resume", usage="NAME", arguments="session")
def _load(chat: Chat, argument: str) -> None:
    """open a saved conversation, by its name or how that begins; this one stays saved"""
    if not argument:
        raise KimiLiteError("There is no name.", "/sessions lists the conversations that are saved.")
    chat.load(argument)
    chat.attachments.clear()


@COMMANDS.command("sessions", usage="[WORD | delete NAME]", arguments=("delete",))
def _sessions(chat: Chat, argument: str) -> None:
    """list the saved conversations, or those with WORD in name or first message; delete one"""
    word, _, name = argument.partition(" ")
    if word == "delete":
        _delete(chat, name.strip())
        return
    found = [one for one in chat.autosave.store.summaries() if one.num_exchanges or one.error]
    found = [one for one in found if argument.lower() in f"{one.name} {one.title}".lower()]
    if not found:
        chat.say(f"no saved conversation has {argument!r}" if argument else "no conversation is saved yet")
    rows = []
    for one in found[:_MOST_LISTED]:
        mark = " · this one" if one.name == chat.autosave.name else ""
        when = datetime.fromtimestamp(one.updated_s).strftime("%d %b %H:%M")
        rows.append((one.name, one.error or f"{when} · {counted(one.num_exchanges, 'exchange')}{mark} · {one.title}"))
    chat.say_table(rows)
    if len(found) > _MOST_LISTED:
        chat.say(
            f"and {len(found) - _MOST_LISTED} older ones in {chat.autosave.store.folder}: /sessions WORD finds them"
        )


def _delete(chat: Chat, name: str) -> None:
    if not name:
        raise KimiLiteError("There is no name.", "It is /sessions delete NAME.")
    if name == chat.autosave.name and chat.autosave.is_saved:
        raise KimiLiteError(f"{name!r} is the conversation you are in.", "/clear begins another one; then delete it.")
    chat.autosave.store.delete(name)
    chat.say(f"deleted {name}")


@COMMANDS.command("export", usage="[md | json] [FILE]", arguments=FORMATS)
def _export(chat: Chat, argument: str) -> None:
    """write the conversation to a file, as Markdown or JSON; without FILE into this folder"""
    form, name = _form_and_name(argument)
    if not chat.conversation.turns:
        raise KimiLiteError("There is nothing to export yet.", "Say something first.")
    path = Path(name or f"{chat.autosave.name}.{form}").expanduser()
    require_writable(path, "The conversation")
    if path.exists():
        if not chat.is_interactive:
            raise KimiLiteError(f"{path} exists already.", "Choose another name, or delete it first.")
        if chat.choose(f"{path} exists already: [o]verwrite it or [c]ancel? ", "oc") == "c":
            chat.say("not written")
            return
    pictures = Pictures(f"{path.stem}-images")
    text = export(chat.conversation, form, pictures)
    try:
        for name, data in pictures.files.items():
            (path.parent / name).parent.mkdir(exist_ok=True)
            with whole_file(path.parent / name, "wb") as file:
                file.write(data)
        with whole_file(path) as file:
            file.write(text)
    except OSError as error:
        raise KimiLiteError(
            f"The conversation cannot be written to {path}: {error.strerror}.",
            "Name a file elsewhere.",
        ) from error
    images = f", {counted(len(pictures.files), 'image')} to {path.parent / pictures.folder}" if pictures.files else ""
    chat.say(f"written to {path}{images}")


def _form_and_name(argument: str) -> tuple[str, str]:
    """`md notes`, `notes.md`, `my notes.json`, `json` or nothing; KimiLiteError for other formats."""
    first, _, rest = argument.partition(" ")
    if not argument or first in FORMATS:
        return first or FORMATS[0], rest.strip()
    form = Path(argument).suffix.removeprefix(".")
    if form not in FORMATS:
        raise KimiLiteError(f"There is no format {form or first!r}.", "It is /export md FILE or /export json FILE.")
    return form, argument
