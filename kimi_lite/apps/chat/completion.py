"""Completion at the prompt: commands by the registry, and behind them files, conversations, settings or words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from kimi_lite.apps.chat.commands.registry import Command
from kimi_lite.apps.chat.parameters import PARAMETERS

if TYPE_CHECKING:
    from kimi_lite.apps.chat.chat import Chat

_PATH_BEGINNINGS = ("/", "./", "../", "~")


class ChatCompleter(Completer):
    """Completes the line before the cursor."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        name, blank, argument = line.partition(" ")
        if line.startswith("/") and not blank:
            yield from self._commands(line)
        command = self._chat.commands.by_name.get(name.removeprefix("/")) if line.startswith("/") else None
        if command is not None and blank:
            yield from self._arguments(command, argument, complete_event)
        elif command is None and complete_event.completion_requested:
            word = document.get_word_before_cursor(WORD=True)
            if word.startswith(_PATH_BEGINNINGS) and "/" in word[1:]:
                yield from self._files(word, complete_event)

    def _commands(self, line: str) -> Iterator[Completion]:
        for command in self._chat.commands.commands:
            for name in command.names:
                if f"/{name}".startswith(line):
                    yield Completion(f"/{name}", -len(line), display_meta=command.help)

    def _arguments(self, command: Command, argument: str, event: CompleteEvent) -> Iterator[Completion]:
        if command.arguments == "file":
            yield from self._files(argument, event)
            return
        words, start = self._words(command, argument)
        for word in words:
            if word.startswith(start):
                yield Completion(word, -len(start))

    def _words(self, command: Command, argument: str) -> tuple[list[str], str]:
        """What may stand at the cursor, and what of it does already."""
        last = argument.rpartition(" ")[2]
        names = [parameter.name for parameter in PARAMETERS]
        if command.arguments == "session":
            return [one.name for one in self._chat.autosave.store.summaries() if not one.error], argument
        if command.arguments == "pairs":
            return [f"{name}=" for name in names], last
        if command.arguments == "setting":
            return (names, argument) if " " not in argument else ([], "")
        return (list(command.arguments), argument) if " " not in argument else ([], "")

    def _files(self, word: str, event: CompleteEvent) -> Iterator[Completion]:
        yield from self._paths.get_completions(Document(word), event)
