"""The prompt of `kimi-lite chat`: an editable line of many lines, with history, completion, pastes of any size and an
editor.

A large paste stands in the line as `[pasted 1,234 lines #1]` and becomes the text when the message is sent.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.styles import Style

from kimi_lite.apps.chat.completion import ChatCompleter
from kimi_lite.apps.chat.input_pipe import is_open_block, unquote_block
from kimi_lite.apps.folders import make_private
from kimi_lite.errors import KimiLiteError
from kimi_lite.terminal import open_prompt
from kimi_lite.units import counted

if TYPE_CHECKING:
    from kimi_lite.apps.chat.chat import Chat

SHOWN_PASTE_LINES, SHOWN_PASTE_CHARS = 24, 2000  # of a paste that is shown as it is
MAX_HISTORY_CHARS = 20_000  # of one entry
MENU_ROWS = 6
_EDITORS = ("editor", "nano", "pico", "vi", "emacs")
_STYLE = Style.from_dict({"rprompt": "fg:ansibrightblack", "prompt": "bold", "files": "fg:ansibrightblack"})


class Pastes:
    """Large pastes by the words that stand for them."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def stand_in(self, text: str) -> str:
        """What to show for `text`: itself where it is small."""
        num_lines = text.count("\n") + 1
        if num_lines <= SHOWN_PASTE_LINES and len(text) <= SHOWN_PASTE_CHARS:
            return text
        size = f"{num_lines:,} lines" if num_lines > 1 else f"{len(text):,} characters"
        words = f"[pasted {size} #{len(self._texts) + 1}]"
        self._texts[words] = text
        return words

    def collapse(self, text: str) -> str:
        """`expand` backwards, for a message that comes back."""
        for words, full in self._texts.items():
            text = text.replace(full.strip(), words)
        return text

    def expand(self, text: str) -> str:
        for words, full in self._texts.items():
            text = text.replace(words, full)
        return text


class PrivateHistory(FileHistory):
    """What was typed, in a file for its owner only. OSError where there can be none."""

    def __init__(self, path: Path, pastes: Pastes) -> None:
        make_private(path.parent)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        os.chmod(path, 0o600)
        self._pastes = pastes
        super().__init__(path)

    def store_string(self, string: str) -> None:
        text = self._pastes.expand(string)
        if len(text) <= MAX_HISTORY_CHARS:
            with suppress(OSError):  # a full disk: what was typed stays in memory
                super().store_string(text)


def open_history(path: Path, pastes: Pastes) -> History:
    """In memory where no file can be written."""
    try:
        return PrivateHistory(path, pastes)
    except (OSError, KimiLiteError):
        return InMemoryHistory()


class TerminalInput:
    """Reads messages from the keyboard."""

    is_interactive = True

    def __init__(self, chat: Chat, history_path: Path) -> None:
        self._chat, self._pastes = chat, Pastes()
        is_command = Condition(lambda: self._session.default_buffer.text.startswith("/"))
        self._session = open_prompt(
            self._prompt,
            rprompt=self._mode,
            style=_STYLE,
            key_bindings=self._keys(),
            completer=ChatCompleter(chat),
            complete_while_typing=is_command,
            reserve_space_for_menu=MENU_ROWS,
            history=open_history(history_path, self._pastes),
            prompt_continuation="  ",
            enable_suspend=True,
            tempfile_suffix=".md",
        )
        self._question = open_prompt()

    def read(self, draft: str) -> str:
        return unquote_block(self._pastes.expand(self._session.prompt(default=self._pastes.collapse(draft))))

    def choose(self, question: str, answers: str, default: str = "") -> str:
        question = textwrap.fill(question, shutil.get_terminal_size().columns - 2) + " "
        while True:
            try:
                answer = self._question.prompt(question).strip().lower()[:1] or default
            except (KeyboardInterrupt, EOFError):
                return answers[-1]
            if answer and answer in answers:
                return answer

    def _prompt(self) -> FormattedText:
        files = f"{counted(len(self._chat.attachments), 'file')} " if self._chat.attachments else ""
        return FormattedText([("class:files", files), ("class:prompt", "❯ ")])

    def _mode(self) -> str:
        """At the right edge, where there is a choice; gone when the line is sent."""
        if get_app().is_done:
            return ""
        if self._chat.is_editing:
            return "editing the last message"
        return (
            {True: "thinking", False: "instant"}[self._chat.conversation.settings.is_thinking]
            if self._chat.can_think
            else ""
        )

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("enter", filter=Condition(lambda: is_open_block(self._session.default_buffer.text)))
        def _go_on(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add(Keys.BracketedPaste)
        def _paste(event: KeyPressEvent) -> None:
            text = event.data.replace("\r\n", "\n").replace("\r", "\n")
            event.current_buffer.insert_text(self._pastes.stand_in(text))

        @keys.add("c-g")
        def _edit(event: KeyPressEvent) -> None:
            if any(os.environ.get(name) for name in ("VISUAL", "EDITOR")) or any(map(shutil.which, _EDITORS)):
                event.current_buffer.text = self._pastes.expand(event.current_buffer.text)
                event.current_buffer.open_in_editor()
            else:
                run_in_terminal(lambda: self._chat.say("there is no editor: name one in $EDITOR"))

        @keys.add("c-v")
        def _paste_image(event: KeyPressEvent) -> None:
            run_in_terminal(self._chat.paste_image)

        @keys.add("escape", "t")
        def _toggle(event: KeyPressEvent) -> None:
            if self._chat.can_think:
                self._chat.conversation.set_thinking(not self._chat.conversation.settings.is_thinking)

        return keys
