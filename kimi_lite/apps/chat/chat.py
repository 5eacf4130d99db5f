"""`kimi-lite chat`: read a message, stream the answer, say how fast it was; again.

At a terminal messages come from an editable prompt (`apps.input`). From a pipe every line is a message; then the
answers go to stdout and everything else to stderr. What begins with / is a command (`apps.commands`). Every turn is
saved (`apps.sessions`).
"""

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kimi_lite.apps.chat.attachments import Attachment, compose, counted, dropped_images, read_image
from kimi_lite.apps.chat.commands.registry import all_commands, is_command
from kimi_lite.apps.chat.context import make_room, warn_when_nearly_full
from kimi_lite.apps.chat.interrupt import Forced, as_exit, on_interrupt, silent_keys
from kimi_lite.apps.chat.render import LEAST_PREFILL_TOKENS, AnswerView, WorkProgress, stats_line
from kimi_lite.apps.chat.sessions import Autosave, SessionStore
from kimi_lite.apps.folders import state_folder
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.conversation import Conversation, OnPrefill
from kimi_lite.engine.turns import Content
from kimi_lite.engine.types import Token
from kimi_lite.errors import KimiLiteError
from kimi_lite.terminal import Console, show_plain

if TYPE_CHECKING:
    from kimi_lite.apps.chat.tool_loop import ToolLoop
    from kimi_lite.apps.tools.box import ToolBox
    from kimi_lite.apps.tools.confirm import Permission, Question

Answering = Callable[[OnPrefill], Generator[Token, None, None]]
_INDENT = "  "


class Input(Protocol):
    """Where messages come from."""

    is_interactive: bool

    def read(self, draft: str) -> str:
        """The next message; KeyboardInterrupt for Ctrl-C, EOFError for the end."""

    def choose(self, question: str, answers: str, default: str = "") -> str:
        """One of the letters; the last one for Ctrl-C, `default` for an empty line (without one it asks again)."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the command line says about the chat itself."""

    is_quiet: bool = False
    is_plain: bool = False
    shows_reasoning: bool = True
    is_continuing: bool = False
    session_name: str | None = None
    images: tuple[str, ...] = ()
    is_thinking: bool | None = None
    system: str = ""
    answer: AnswerSettings = field(
        default_factory=AnswerSettings
    )  # what of it is not the default goes before what was saved


class Chat:
    """A conversation at a terminal or a pipe."""

    def __init__(
        self,
        session: Conversation,
        aside: Console,
        autosave: Autosave,
        options: ChatOptions,
        tools: "ToolBox | None" = None,
    ) -> None:
        self.session, self.aside, self.autosave, self.options, self.tools = session, aside, autosave, options, tools
        self.commands = all_commands()
        self.can_think = session.can_think  # asked at every key
        self.shows_reasoning = options.shows_reasoning and aside.is_terminal
        self.attachments: list[Attachment] = [read_image(path) for path in options.images]
        self.draft = ""  # what the prompt begins with
        self.is_editing = False  # the next message replaces the last one
        self.is_over = False
        self._input: Input | None = None
        self._has_said_how_to_leave = False

    @property
    def is_interactive(self) -> bool:
        return self._input is not None and self._input.is_interactive

    def begin(self) -> None:
        """Take up what the command line names. What it says beside that goes before what was saved."""
        if self.attachments and not self.session.can_see:
            raise KimiLiteError(
                f"--image needs a model with a vision tower; {self.session.info.name} has none here.",
                "Leave it out, or use --endpoint URL of a server whose model sees.",
            )
        if self.options.is_continuing:
            self.take_up(self.autosave.store.latest())
        elif self.options.session_name:
            self.take_up(self.options.session_name, is_new_allowed=True)
        self.session.settings = self.session.settings.overridden(self.options.answer)
        if self.options.is_thinking is not None:
            self.session.set_thinking(self.options.is_thinking)
        self.session.system = self.options.system or self.session.system

    def loop(self, source: Input) -> None:
        """Until the user leaves."""
        self._input = source
        while not self.is_over:
            draft, self.draft = self.draft, ""
            try:
                line = source.read(draft)
            except KeyboardInterrupt:
                self._on_cleared_line()
            except EOFError:
                self.is_over = True
            else:
                self._handle(line)

    def say(self, text: str) -> None:
        """A remark of the program's own, wrapped between words; whole lines into a pipe."""
        self._say(text, "dim")

    def _say(self, text: str, style: str) -> None:
        if not self.aside.is_terminal or not text:
            show_plain(self.aside, text, style=style)
            return
        body = text.lstrip(" ")
        self.aside.print(
            Padding(Text(body), (0, 0, 0, len(text) - len(body)), expand=False), style=style, highlight=False
        )

    def say_table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Names and what belongs to them, in two columns."""
        table = Table.grid(padding=(0, 2, 0, 0), expand=False)
        table.add_column(max_width=max(self.aside.width // 3, 20))
        table.add_column()
        for name, text in rows:
            table.add_row(Text(name), Text(text))
        self.aside.print(Padding(table, (0, 0, 0, len(_INDENT))), style="dim")

    def say_flow(self, words: Sequence[str]) -> None:
        """Words in lines as long as the screen is wide."""
        line = _INDENT
        for word in words:
            if len(line) + len(word) + 2 > self.aside.width and line.strip():
                self.say(line)
                line = _INDENT
            line += word + "  "
        self.say(line)

    def choose(self, question: str, answers: str, default: str = "") -> str:
        assert self._input is not None
        return self._input.choose(question, answers, default)

    def ask(self, text: str, settings: AnswerSettings | None = None) -> None:
        """Send a message with its attachments; what is refused comes back into the prompt."""
        declarations = self.tools.declarations if self.tools else ()
        num_turns = len(self.session.turns)
        try:
            content = compose(text, [*self.attachments, *self._dropped(text)])
            if self._has_room(content):
                self.answer(lambda report: self.session.ask(content, report, declarations, settings), settings)
        finally:
            if len(self.session.turns) > num_turns:
                self.attachments.clear()
            else:
                self.draft = text

    def _has_room(self, content: Content) -> bool:
        try:
            return make_room(self, content)
        except KeyboardInterrupt:
            self.say("not sent")
            return False

    def replace(self, text: str) -> None:
        """Ask `text` in place of the last message, which stays when `text` is refused."""
        before = list(self.session.turns)
        self.session.undo()
        num_turns = len(self.session.turns)
        try:
            self.ask(text)
        finally:
            if len(self.session.turns) == num_turns:
                self.session.turns = before

    def answer(self, answering: Answering, settings: AnswerSettings | None = None) -> None:
        """Show an answer, and those that follow from its tool calls; whatever happens it is saved."""
        try:
            last = self.stream(answering, settings)
        finally:
            with on_interrupt(lambda: None):  # a Ctrl-C that comes too late for the answer
                self.autosave.save()
        warn_when_nearly_full(self, last.stats.prompt_tokens + last.stats.generated_tokens)

    def stream(self, answering: Answering, settings: AnswerSettings | None = None) -> Token:
        """Show an answer of the model; its last token."""
        view = AnswerView(sys.stdout, self.aside, self.shows_reasoning, self.options.is_plain, think_hint="/think show")
        loop = self._tool_loop(view)
        with (
            silent_keys(),
            WorkProgress(self.aside, least=LEAST_PREFILL_TOKENS) as progress,
            on_interrupt(loop.cancel if loop else self.session.cancel) as interrupt,
        ):

            def report(request_id: str, done: int, total: int) -> None:
                interrupt.again()
                if not self.options.is_quiet:
                    progress("reading the prompt", done, total)

            tokens = answering(report)
            tokens = loop.follow(tokens, report, settings=settings) if loop else tokens
            try:
                for token in tokens:
                    interrupt.again()
                    progress.close()
                    view.show(token)
            finally:
                tokens.close()  # at once: what was said becomes a turn before it is saved
                progress.close()
                view.close()
        assert view.last is not None
        if not self.options.is_quiet:
            self.say(f"{_INDENT}{stats_line(view.last)}")
            if view.last.finish_reason == "cancelled" and not view.last.stats.generated_tokens:
                self.say(f"{_INDENT}the message stays in the conversation: /undo takes it back, /edit changes it")
            if self.is_interactive:
                self.say("")
        return view.last

    def take_up(self, name: str, is_new_allowed: bool = False) -> None:
        """Go on with a saved conversation, and say where it stands."""
        if not self.autosave.open(name, is_new_allowed):
            self.say(f"{name} is a new conversation")
            return
        session = self.session
        self.say(f"{name}: {counted(len(session.exchanges), 'exchange')}{self._last_words()}")
        if self.autosave.made_by != session.info.name:
            self.say(f"it was held with {self.autosave.made_by}; {session.info.name} reads all of it anew")

    def _handle(self, line: str) -> None:
        """A mistake in one line must not end the conversation, so its error is shown here and not by `cli`."""
        is_editing, self.is_editing = self.is_editing, False
        try:
            if is_command(line):
                self.commands.run(self, line.strip())
            elif line.strip():
                (self.replace if is_editing else self.ask)(line.strip())
        except Forced:
            raise
        except KeyboardInterrupt:  # between the answer and the prompt: nothing is left to stop
            self.say("")
        except KimiLiteError as error:
            self._say(error.message, "red")
            if error.hint:
                self._say(error.hint, "")
            if not self.is_interactive:
                self.draft = ""

    def _on_cleared_line(self) -> None:
        if self.is_editing:
            self.say("the last message stays as it was")
        elif not self._has_said_how_to_leave:
            self.say("(Ctrl-D or /exit to leave)")
            self._has_said_how_to_leave = True
        self.is_editing = False

    def _dropped(self, text: str) -> list[Attachment]:
        """Images whose paths stand in the message."""
        paths = dropped_images(text)
        if paths and not self.session.can_see:
            self.say(
                f"{self.session.info.name} has no vision tower here: {paths[0]} is sent as a name, not as an image"
            )
            return []
        return [read_image(path) for path in paths]

    def _tool_loop(self, view: AnswerView) -> "ToolLoop | None":
        if self.tools is None:
            return None
        from kimi_lite.apps.chat.tool_loop import ToolLoop

        return ToolLoop(self.session, self.tools, self._permit, self.say, view.close)

    def _permit(self, question: "Question") -> "Permission":
        """Ask the user about a tool call; a pipe cannot be asked."""
        from kimi_lite.apps.tools.confirm import ANSWERS, forget_typed_ahead, refuse

        if not self.is_interactive:
            return refuse(question, self.say)
        for line in question.lines:
            self.say(line)
        forget_typed_ahead()
        return ANSWERS[self.choose(question.prompt, "".join(ANSWERS), question.default)]

    def _last_words(self) -> str:
        text = next((" ".join(turn.text.split()) for turn in reversed(self.session.turns) if turn.role == "user"), "")
        width = max(self.aside.width - 40, 20)
        return f", the last about: {text[:width]}" if text else ""


def chat(
    session: Conversation,
    aside: Console,
    options: ChatOptions,
    greet: Callable[[], None],
    tools: "ToolBox | None" = None,
) -> None:
    """Talk until the user leaves. `greet` shows what the conversation begins with."""
    autosave = Autosave(session, SessionStore(state_folder() / "sessions"))
    conversation = Chat(session, aside, autosave, options, tools)
    with as_exit("SIGTERM", "SIGHUP"):
        try:
            if not options.is_quiet:
                greet()
            conversation.begin()
            conversation.loop(_make_input(conversation))
        finally:
            autosave.save()
            autosave.close()


def _make_input(conversation: Chat) -> Input:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        from kimi_lite.apps.chat.input_pipe import PipeInput

        return PipeInput(sys.stdin)
    from kimi_lite.apps.chat.input import TerminalInput

    return TerminalInput(conversation, state_folder() / "history")
