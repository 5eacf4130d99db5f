"""/regen, /retry-with, /undo, /edit: the last exchange again, otherwise, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kimi_lite.apps.chat.attachments import attachments_of
from kimi_lite.apps.chat.commands.registry import Registry
from kimi_lite.apps.chat.parameters import changed, parse_pairs
from kimi_lite.engine.turns import text_of
from kimi_lite.errors import KimiLiteError
from kimi_lite.units import counted, shortened

if TYPE_CHECKING:
    from kimi_lite.apps.chat.chat import Chat

COMMANDS = Registry()
_SHOWN_CHARS = 60


@COMMANDS.command("regen", "retry")
def _regen(chat: Chat, argument: str) -> None:
    """answer the last message again"""
    chat.require_files()
    chat.answer(chat.conversation.regenerate(chat.on_prefill))


@COMMANDS.command("retry-with", usage="NAME=VALUE ...", arguments="pairs")
def _retry_with(chat: Chat, argument: str) -> None:
    """answer the last message again with other settings, this once: /retry-with temp=0.7"""
    settings = chat.conversation.settings
    for name, value in parse_pairs(argument):
        settings = changed(chat.conversation, settings, name, value)
    chat.require_files()
    chat.answer(chat.conversation.regenerate(chat.on_prefill, settings), settings)


@COMMANDS.command("undo")
def _undo(chat: Chat, argument: str) -> None:
    """remove the last message and its answer"""
    text = " ".join(text_of(chat.conversation.undo()).split())
    chat.save()
    left = len(chat.conversation.exchanges)
    chat.say(f"removed: {shortened(text, _SHOWN_CHARS)} ({counted(left, 'exchange')} left)")


@COMMANDS.command("edit", usage="[TEXT]")
def _edit(chat: Chat, argument: str) -> None:
    """put the last message into the prompt again to change it, or replace it by TEXT"""
    if not chat.conversation.exchanges:
        raise KimiLiteError("There is no message yet to edit.", "Type one.")
    last = chat.conversation.turns[chat.conversation.exchanges[-1]].content
    if argument:
        chat.attachments = attachments_of(last)
        chat.replace(argument)
    elif not chat.is_interactive:
        raise KimiLiteError("There is no prompt here to edit in.", "Use /edit TEXT.")
    else:
        chat.attachments = attachments_of(last)
        if chat.attachments:
            names = ", ".join(one.name for one in chat.attachments)
            chat.say(f"{names} stays with the message; /read off takes files out of it")
        chat.draft, chat.is_editing = text_of(last), True
