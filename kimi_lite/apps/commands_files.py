"""/read and /image: files that go with the next message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kimi_lite.apps.attachments import read_image, read_text
from kimi_lite.apps.commands import Registry
from kimi_lite.errors import KimiLiteError

if TYPE_CHECKING:
    from kimi_lite.apps.chat import Chat

COMMANDS = Registry()


@COMMANDS.command("read", usage="[FILE | off]", arguments="file")
def _read(chat: Chat, argument: str) -> None:
    """put a text file into the next message; off takes all files out again"""
    if argument == "off":
        chat.attachments.clear()
    elif argument:
        one = read_text(argument)
        num_tokens = chat.session.count_tokens(one.text, num_dropped=len(chat.session.turns))
        chat.attachments.append(one)
        size = "" if num_tokens is None else f", about {num_tokens:,} tokens,"
        chat.say(f"{one.describe()}{size} goes with your next message")
        return
    names = ", ".join(one.describe() for one in chat.attachments)
    chat.say(f"with the next message: {names}" if names else "no files go with the next message")


@COMMANDS.command("image", usage="FILE", arguments="file")
def _image(chat: Chat, argument: str) -> None:
    """put an image into the next message; a path dropped into the prompt does the same"""
    if not chat.session.can_see:
        raise KimiLiteError(
            f"An image needs a model with a vision tower; {chat.session.info.name} has none here.",
            "Describe it in words, or use --endpoint URL of a server whose model sees.",
        )
    if not argument:
        raise KimiLiteError("There is no image.", "Say /image FILE.")
    one = read_image(argument)
    chat.attachments.append(one)
    chat.say(f"{one.describe()} goes with your next message")
