"""/help, /exit, /clear, /system, /set, /think: the chat itself and how it answers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kimi_lite.apps.chat.commands.registry import Registry
from kimi_lite.apps.chat.parameters import PARAMETERS, changed, find
from kimi_lite.engine.turns import require_utf8
from kimi_lite.errors import KimiLiteError

if TYPE_CHECKING:
    from kimi_lite.apps.chat.chat import Chat

COMMANDS = Registry()
_WIDE = 80  # columns, where values stand in a column of their own
_KEYS = (
    ("Ctrl-C", "stops an answer and keeps it; at the prompt it clears the line"),
    ("Ctrl-D", "leaves"),
    ("Alt-Enter", 'starts a new line; """ begins and ends a text of many lines'),
    ("Ctrl-G", "opens the message in $EDITOR"),
    ("Alt-T", "thinking on or off for the next message"),
    ("Tab", "completes commands, paths and names"),
)


@COMMANDS.command("help", "?", usage="[COMMAND]", arguments=())
def _help(chat: Chat, argument: str) -> None:
    """this list, or more on one command"""
    wanted = argument.removeprefix("/")
    if wanted and wanted not in chat.commands.by_name:
        raise KimiLiteError(f"There is no command /{wanted}.", "/help lists them.")
    shown = [chat.commands.by_name[wanted]] if wanted else chat.commands.commands
    rows = [(f"/{command.names[0]} {command.usage}".rstrip(), command.help, command.names[1:]) for command in shown]
    chat.say_table(
        [(title, text + (f" (also /{', /'.join(others)})" if others else "")) for title, text, others in rows]
    )
    if not wanted:
        chat.say_table(list(_KEYS))


@COMMANDS.command("exit", "quit", "bye")
def _exit(chat: Chat, argument: str) -> None:
    """leave; the conversation is saved"""
    chat.is_over = True


@COMMANDS.command("clear", "new")
def _clear(chat: Chat, argument: str) -> None:
    """begin a new conversation; the old one stays saved, system prompt and settings stay"""
    old = chat.start_new()
    chat.attachments.clear()
    chat.say("a new conversation" + (f"; the old one is saved as {old}" if old else ""))


@COMMANDS.command("system", usage="[TEXT | off]", arguments=("off",))
def _system(chat: Chat, argument: str) -> None:
    """show the system prompt, or set it from the next message on"""
    if argument:
        require_utf8(argument, "The system prompt")
        chat.conversation.system = "" if argument == "off" else argument
    chat.say(f"system prompt: {chat.conversation.system}" if chat.conversation.system else "no system prompt")


@COMMANDS.command("set", usage="[NAME VALUE]", arguments="setting")
def _set(chat: Chat, argument: str) -> None:
    """show the settings of answers, or change one: /set temp 0.7, /set seed default"""
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    if name == "system":
        _system(chat, value.strip())
        return
    if value.strip():
        chat.conversation.settings = changed(chat.conversation, chat.conversation.settings, name, value.strip())
    shown = [find(name)] if name else PARAMETERS
    pad, gap = (16, " ") if chat.status.width >= _WIDE else (0, " · ")
    chat.say_table([(p.name, f"{p.show(chat.conversation.settings):<{pad}}{gap}{p.help}") for p in shown])


@COMMANDS.command(
    "think", usage="[on | off | show | hide | budget N]", arguments=("on", "off", "show", "hide", "budget")
)
def _think(chat: Chat, argument: str) -> None:
    """reason before answering or not; show the last reasoning; hide it while it comes; limit it"""
    word, _, rest = argument.partition(" ")
    if word in ("on", "off"):
        chat.conversation.set_thinking(word == "on")
        chat.shows_reasoning = chat.shows_reasoning or word == "on"
    elif word == "budget":
        chat.conversation.settings = changed(
            chat.conversation, chat.conversation.settings, "think-budget", rest.strip() or "-1"
        )
    elif word == "show":
        _show_reasoning(chat)
        return
    elif word == "hide":
        chat.shows_reasoning = False
    elif word:
        raise KimiLiteError(f"/think {argument} is not known.", "It is /think on, off, show, hide or budget N.")
    hidden = "" if chat.shows_reasoning or not chat.conversation.settings.is_thinking else ", hidden (/think show)"
    chat.say(chat.conversation.mode + hidden)


def _show_reasoning(chat: Chat) -> None:
    """The last answer's, and from now on all."""
    was_hidden, chat.shows_reasoning = not chat.shows_reasoning, True
    reasoning = next(
        (turn.reasoning for turn in reversed(chat.conversation.turns) if turn.role == "assistant"), ""
    ).strip()
    chat.say(reasoning or "the last answer came without reasoning")
    if was_hidden:
        chat.say("reasoning is shown again")


@COMMANDS.command("instant", usage="TEXT")
def _instant(chat: Chat, argument: str) -> None:
    """ask this one message without thinking"""
    _ask_in_mode(chat, argument, is_thinking=False)


@COMMANDS.command("reason", usage="TEXT")
def _reason(chat: Chat, argument: str) -> None:
    """ask this one message with thinking"""
    if not chat.conversation.can_think:
        raise KimiLiteError(f"{chat.conversation.info.name} has no thinking mode.", "Ask it without /reason.")
    _ask_in_mode(chat, argument, is_thinking=True)


def _ask_in_mode(chat: Chat, text: str, is_thinking: bool) -> None:
    if not text:
        raise KimiLiteError("There is no message.", "Write it after the command.")
    chat.ask(text, replace(chat.conversation.settings, is_thinking=is_thinking))
