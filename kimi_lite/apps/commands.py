"""The slash commands of `kimi-lite chat`: one table feeds the prompt's completion, /help and the dispatch.

A command is a function of the chat and the text after its name; its docstring is its help.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from kimi_lite.errors import KimiLiteError

if TYPE_CHECKING:
    from kimi_lite.apps.chat import Chat

Action = Callable[["Chat", str], None]


@dataclass(frozen=True, slots=True)
class Command:
    """`names[0]` is the one shown; `usage` is what may follow it."""

    names: tuple[str, ...]
    usage: str
    help: str
    action: Action


class Registry:
    """Commands by name, in the order of their definition."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    def command(self, *names: str, usage: str = "") -> Callable[[Action], Action]:
        """Decorator: enter a function under these names."""

        def enter(action: Action) -> Action:
            assert action.__doc__, names
            taken = {name for command in self.commands for name in command.names}
            assert not taken & set(names), (names, taken)
            self.commands.append(Command(names, usage, action.__doc__, action))
            return action

        return enter

    def run(self, chat: Chat, line: str) -> None:
        """Run `/name argument`; KimiLiteError with the nearest name when there is no such command."""
        name, _, argument = line.removeprefix("/").partition(" ")
        by_name = {known: command for command in self.commands for known in command.names}
        if name not in by_name:
            near = get_close_matches(name, by_name, n=1, cutoff=0.5)
            raise KimiLiteError(
                f"unknown command /{name}" + (f" - did you mean /{near[0]}?" if near else ""), "/help lists them."
            )
        by_name[name].action(chat, argument.strip())


COMMANDS = Registry()


@COMMANDS.command("help", "?")
def _help(chat: Chat, argument: str) -> None:
    """this list"""
    for command in COMMANDS.commands:
        title = f"/{command.names[0]} {command.usage}".rstrip()
        others = ", ".join(f"/{name}" for name in command.names[1:])
        chat.say(f"  {title:<22}{command.help}" + (f" (also {others})" if others else ""))
    chat.say("  Ctrl-C stops an answer and keeps it; Ctrl-D leaves; Alt-Enter starts a new line")


@COMMANDS.command("exit", "quit", "bye")
def _exit(chat: Chat, argument: str) -> None:
    """leave"""
    chat.is_over = True


@COMMANDS.command("clear")
def _clear(chat: Chat, argument: str) -> None:
    """forget the conversation, keep the system prompt"""
    chat.session.clear()
    chat.say("forgotten")


@COMMANDS.command("system", usage="[TEXT | off]")
def _system(chat: Chat, argument: str) -> None:
    """show the system prompt, or set it from the next message on"""
    if argument:
        chat.session.system = "" if argument == "off" else argument
    chat.say(f"system prompt: {chat.session.system}" if chat.session.system else "no system prompt")


@COMMANDS.command("think", usage="[on | off]")
def _think(chat: Chat, argument: str) -> None:
    """show or set whether the model reasons before it answers"""
    if argument not in ("", "on", "off"):
        raise KimiLiteError(f"/think {argument} is not known", "It is /think on or /think off.")
    if argument:
        chat.session.set_thinking(argument == "on")
    chat.say(chat.session.mode)
