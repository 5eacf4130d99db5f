"""/read, /image, /video and /tools: what the model is given apart from words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kimi_lite.apps.chat.attachments import attachment_of, read_text
from kimi_lite.apps.chat.commands.registry import Registry
from kimi_lite.errors import KimiLiteError

if TYPE_CHECKING:
    from kimi_lite.apps.chat.chat import Chat

COMMANDS = Registry()


@COMMANDS.command("read", usage="[FILE | off]", arguments="file")
def _read(chat: Chat, argument: str) -> None:
    """put a text file into the next message; off takes all files out again"""
    if argument == "off":
        chat.attachments.clear()
    elif argument:
        one = read_text(argument)
        num_tokens = chat.conversation.count_tokens(one.text, num_dropped=len(chat.conversation.turns))
        chat.attachments.append(one)
        size = "" if num_tokens is None else f", about {num_tokens:,} tokens,"
        chat.say(f"{one.describe()}{size} goes with your next message")
        return
    names = ", ".join(one.describe() for one in chat.attachments)
    chat.say(f"with the next message: {names}" if names else "no files go with the next message")


@COMMANDS.command("tools", usage="[NAME on | NAME ask]")
def _tools(chat: Chat, argument: str) -> None:
    """list the tools that the model may use; let one run without asking, or ask again"""
    if chat.tools is None:
        raise KimiLiteError("The model has no tools here.", "Start with --tools FOLDER or --mcp-config FILE.")
    name, _, word = argument.partition(" ")
    if name and name not in chat.tools.tools:
        raise KimiLiteError(f"There is no tool {name!r}.", f"There are {', '.join(chat.tools.tools)}.")
    if name and word.strip() not in ("on", "ask"):
        raise KimiLiteError(f"/tools {argument} is not known.", "It is /tools, /tools NAME on or /tools NAME ask.")
    if name:
        (chat.tools.allow if word.strip() == "on" else chat.tools.disallow)(name)
    rows = [
        (one.name, f"{'runs' if chat.tools.is_allowed(one.name) else 'asks'} · {one.description}")
        for one in chat.tools.tools.values()
    ]
    chat.say_table(rows)


@COMMANDS.command("image", usage="[FILE]", arguments="file")
def _image(chat: Chat, argument: str) -> None:
    """put an image into the next message, the clipboard's without FILE; a path dropped into the prompt does the same"""
    if argument:
        chat.require_sight("An image needs")
        chat.attach(attachment_of("image", argument, chat.options))
    else:
        chat.paste_image()


@COMMANDS.command("video", usage="FILE", arguments="file")
def _video(chat: Chat, argument: str) -> None:
    """put a video into the next message; --video-fps and --video-frames say how much of it is seen"""
    chat.require_sight("A video needs")
    if not argument:
        raise KimiLiteError("There is no video.", "Use /video FILE.")
    chat.attach(attachment_of("video", argument, chat.options))
