"""The table of slash commands: one registry feeds the dispatch, /help, completion and the tests.

A command is a function of the chat and the text after its name; its docstring is its help. They are defined in
the modules of this folder; `all_commands` brings them together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

from kimi_lite.errors import KimiLiteError

if TYPE_CHECKING:
    from kimi_lite.apps.chat.chat import Chat

Action = Callable[["Chat", str], None]
Arguments = Literal["file", "session", "setting", "pairs"]  # what completion looks up; else words
_ELSEWHERE = {  # commands of other programs
    "stop": "Ctrl-C stops an answer; /set stop TEXT ends answers at a text.",
    "model": "The model is chosen at the start: kimi-lite chat -m FILE.",
    "models": "The model is chosen at the start: kimi-lite chat -m FILE.",
    "show": "/stats and /ctx show what the conversation holds.",
    "history": "The arrow keys bring back what was typed; /export md FILE writes the conversation.",
    "copy": "/export md FILE writes the conversation.",
    "file": "/read FILE puts a file into the next message.",
    "context": "/ctx shows the context.",
    "compact": "/ctx summarise replaces old exchanges by a summary.",
    "reset": "/clear begins a new conversation.",
    "temp": "/set temp 0.7 sets the temperature.",
}
_COMMAND = re.compile(r"/[A-Za-z?][\w?-]*(\s|$)")


@dataclass(frozen=True, slots=True)
class Command:
    """`names[0]` is the one shown; `usage` is what may follow it, `arguments` how that is completed."""

    names: tuple[str, ...]
    usage: str
    help: str
    arguments: tuple[str, ...] | Arguments
    action: Action


class Registry:
    """Commands by name, in the order of their definition."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    def command(
        self, *names: str, usage: str = "", arguments: Sequence[str] | Arguments = ()
    ) -> Callable[[Action], Action]:
        """Decorator: enter a function under these names."""

        def enter(action: Action) -> Action:
            assert action.__doc__, names
            self.add(
                Command(
                    names, usage, action.__doc__, arguments if isinstance(arguments, str) else tuple(arguments), action
                )
            )
            return action

        return enter

    def add(self, command: Command) -> None:
        """No name may mean two things."""
        assert not set(self.by_name) & set(command.names), command.names
        self.commands.append(command)

    @property
    def by_name(self) -> dict[str, Command]:
        return {name: command for command in self.commands for name in command.names}

    def run(self, chat: Chat, line: str) -> None:
        """Run `/name argument`; KimiLiteError with the nearest name when there is no such command."""
        name, *rest = line.removeprefix("/").split(maxsplit=1)
        known = self.by_name
        if name not in known:
            near = nearest(name, known)
            known_elsewhere = _ELSEWHERE.get(name, "")
            raise KimiLiteError(
                f"unknown command /{name}" + (f" - did you mean /{near}?" if near and not known_elsewhere else ""),
                f"{known_elsewhere or '/help lists them.'} To send the line as it is, start it with a space.",
            )
        known[name].action(chat, rest[0].strip() if rest else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """The one known name that begins so, or the most similar one; "" where none is like it."""
    beginning = sorted({one for one in known if len(name) > 1 and one.startswith(name)})
    similar = get_close_matches(name, [one for one in known if len(one) > 1], n=1, cutoff=0.65)
    return beginning[0] if len(beginning) == 1 else similar[0] if similar else ""


def is_command(line: str) -> bool:
    """Whether a line is a command: `/* a comment */` and `/home/me/picture.png` are messages."""
    return _COMMAND.match(line) is not None


def all_commands() -> Registry:
    """Every command of the chat, in the order of /help."""
    from kimi_lite.apps.chat.commands import answer, context, files, general, sessions, swarm

    registry = Registry()
    for module in (general, answer, swarm, context, files, sessions):
        for command in module.COMMANDS.commands:
            registry.add(command)
    return registry
