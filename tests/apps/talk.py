"""A chat in this process with a scripted model and scripted input, for tests of commands."""

import io
from pathlib import Path

import pytest

from kimi_lite.apps.chat.chat import Chat
from kimi_lite.apps.chat.sessions import Autosave, SessionStore
from kimi_lite.engine.session import Session
from kimi_lite.options import Options
from kimi_lite.terminal import Console
from tests.apps.fake_main import repeat
from tests.engine.fakes import fake_engine, scripted_logits


class ScriptedInput:
    """Lines in order; KeyboardInterrupt where a line is None; `answers` to questions."""

    def __init__(self, lines: list[str | None], answers: str, is_interactive: bool) -> None:
        self.lines, self.answers, self.is_interactive = lines, list(answers), is_interactive
        self.drafts: list[str] = []
        self.questions: list[str] = []

    def read(self, draft: str) -> str:
        self.drafts.append(draft)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if line is None:
            raise KeyboardInterrupt
        return line

    def choose(self, question: str, answers: str, default: str = "") -> str:
        self.questions.append(question)
        answer = self.answers.pop(0)
        assert answer in answers
        return answer


class Talk:
    """`say(*lines)` types them and returns what the program remarked; answers are in `answers`."""

    def __init__(
        self, folder: Path, capture: pytest.CaptureFixture[str], context_length: int = 2048, **options: object
    ) -> None:
        engine = fake_engine(context_length=context_length)
        engine.model.next_logits = scripted_logits(engine.tokenizer, repeat)
        self.session, self._status, self._capture = Session(engine), io.StringIO(), capture
        self.store = SessionStore(folder)
        console = Console(file=self._status, width=100)
        self.chat = Chat(self.session, console, Autosave(self.session, self.store), Options(**options))
        self.answers = ""
        self.input = ScriptedInput([], "", True)

    def say(self, *lines: str | None, answers: str = "", is_interactive: bool = True) -> str:
        self.input = ScriptedInput(list(lines), answers, is_interactive)
        self._status.truncate(0)
        self._status.seek(0)
        self.chat.is_over = False
        self.chat.loop(self.input)
        self.answers = self._capture.readouterr().out
        return self._status.getvalue()
