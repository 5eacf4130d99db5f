"""/regen, /retry-with, /undo, /edit: the last exchange again, otherwise, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kimi_lite.apps.chat.commands.registry import Registry
from kimi_lite.apps.chat.parameters import changed, parse_pairs
from kimi_lite.engine.turns import num_images, text_of
from kimi_lite.errors import KimiLiteError

if TYPE_CHECKING:
    from kimi_lite.apps.chat.chat import Chat

COMMANDS = Registry()
_SHOWN_CHARS = 60


@COMMANDS.command("regen", "retry")
def _regen(chat: Chat, argument: str) -> None:
    """answer the last message again"""
    chat.answer(lambda report: chat.session.regenerate(report))


@COMMANDS.command("retry-with", usage="NAME=VALUE ...", arguments="pairs")
def _retry_with(chat: Chat, argument: str) -> None:
    """answer the last message again with other settings, this once: /retry-with temp=0.7"""
    settings = chat.session.settings
    for name, value in parse_pairs(argument):
        settings = changed(chat.session, settings, name, value)
    chat.answer(lambda report: chat.session.regenerate(report, settings))


@COMMANDS.command("undo")
def _undo(chat: Chat, argument: str) -> None:
    """take the last message and its answer back"""
    text = " ".join(text_of(chat.session.undo()).split())
    chat.autosave.save()
    left = len(chat.session.exchanges)
    short = text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"
    chat.say(f"taken back: {short} ({left} left)")


@COMMANDS.command("edit", usage="[TEXT]")
def _edit(chat: Chat, argument: str) -> None:
    """take the last message back into the prompt to change it, or replace it by TEXT"""
    if not chat.session.exchanges:
        raise KimiLiteError("There is no message yet to edit.", "Type one.")
    last = chat.session.turns[chat.session.exchanges[-1]].content
    if argument:
        chat.replace(argument)
    elif not chat.is_interactive:
        raise KimiLiteError("There is no prompt here to edit in.", "Say /edit TEXT.")
    else:
        if num_images(last):
            chat.say("its images are not taken along; attach them again by /image")
        chat.draft, chat.is_editing = text_of(last), True
