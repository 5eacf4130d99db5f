"""`kimi-lite chat`: read a message, stream the answer, say how fast it was; again.

At a terminal messages come from an editable prompt. From a pipe every line is a message; then the answers go to stdout and
everything else to stderr.
"""

import sys
from collections.abc import Callable

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from kimi_lite import __version__
from kimi_lite.apps.commands import COMMANDS
from kimi_lite.apps.interrupt import on_interrupt
from kimi_lite.apps.render import (
    LEAST_PREFILL_TOKENS,
    AnswerView,
    WorkProgress,
    describe_model,
    show_error,
    show_plain,
    stats_line,
)
from kimi_lite.engine.session import Session
from kimi_lite.errors import KimiLiteError


class Chat:
    """A session at a terminal or a pipe."""

    def __init__(self, session: Session, aside: Console, is_quiet: bool) -> None:
        self.session, self.aside, self.is_quiet = session, aside, is_quiet
        self.is_over = False

    def loop(self, read: Callable[[], str]) -> None:
        """Until the user leaves. `read` raises KeyboardInterrupt for Ctrl-C and EOFError for Ctrl-D."""
        while not self.is_over:
            try:
                line = read().strip()
            except KeyboardInterrupt:
                self.say("(Ctrl-D or /exit to leave)")
            except EOFError:
                self.is_over = True
            else:
                self._handle(line)

    def say(self, text: str) -> None:
        """A remark of the program's own."""
        show_plain(self.aside, text, style="dim")

    def greet(self) -> None:
        info, context = self.session.info, self.session.context_length
        self.say(f"kimi-lite {__version__} · {info.name}")
        self.say(f"  {describe_model(info)} · context {context:,}")
        self.say(f"  {self.session.mode} · /help for help")

    def _handle(self, line: str) -> None:
        """A mistake in one line must not end the conversation, so its error is shown here and not by `cli`."""
        try:
            if line.startswith("/"):
                COMMANDS.run(self, line)
            elif line:
                self._answer(line)
        except KimiLiteError as error:
            show_error(self.aside, error)

    def _answer(self, text: str) -> None:
        view = AnswerView(sys.stdout, self.aside, shows_reasoning=self.aside.is_terminal)
        with WorkProgress(self.aside, least=LEAST_PREFILL_TOKENS) as progress, on_interrupt(self.session.cancel):
            for token in self.session.ask(text, lambda _, done, total: progress("reading the prompt", done, total)):
                progress.close()
                view.show(token)
            view.close()
        if not self.is_quiet:
            self.say(f"  {stats_line(view.last)}")


def chat(session: Session, aside: Console, is_quiet: bool = False) -> None:
    """Talk until the user leaves."""
    conversation = Chat(session, aside, is_quiet)
    if not is_quiet:
        conversation.greet()
    conversation.loop(make_prompt() if sys.stdin.isatty() and sys.stdout.isatty() else read_line)


def read_line() -> str:
    """The next line of a pipe."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def make_prompt() -> Callable[[], str]:
    """An editable prompt: Enter sends, Alt-Enter starts a new line, commands complete."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    names = {f"/{name}": command.help for command in COMMANDS.commands for name in command.names}
    completer = WordCompleter(list(names), meta_dict=names, sentence=True)
    session: PromptSession[str] = PromptSession("❯ ", key_bindings=keys, completer=completer, complete_while_typing=False)
    return session.prompt
