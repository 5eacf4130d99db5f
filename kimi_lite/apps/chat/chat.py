"""`kimi-lite chat`: read a message, stream the answer, say how fast it was; again.

At a terminal messages come from an editable prompt (`chat.input`). From a pipe every line is a message; then the
answers go to stdout and everything else to stderr. What begins with / is a command (`chat.commands`). The conversation
is saved before and after every answer (`chat.sessions`); where that is impossible the chat goes on.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kimi_lite.apps.chat.attachments import (
    Attachment,
    attachment_of,
    attachments_from,
    compose,
    dropped_files,
    image_of,
)
from kimi_lite.apps.chat.clipboard import clipboard_image
from kimi_lite.apps.chat.commands.registry import all_commands, is_command
from kimi_lite.apps.chat.context import ensure_fits, warn_when_nearly_full
from kimi_lite.apps.chat.render import LEAST_PREFILL_TOKENS, AnswerView, WorkProgress, stats_line
from kimi_lite.apps.chat.sessions import Autosave, Claim, HeldElsewhere, NotWritable
from kimi_lite.apps.chat.thumbnail import show_thumbnail
from kimi_lite.apps.folders import state_folder
from kimi_lite.apps.interrupt import Forced, Interrupt, as_exit, on_interrupt, silent_keys
from kimi_lite.apps.model_files import ModelFiles
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.turns import require_utf8
from kimi_lite.engine.types import Stats, Token
from kimi_lite.engine.vision import NO_TOWER_HINT
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import rescue
from kimi_lite.options import Options
from kimi_lite.terminal import Console, show_plain
from kimi_lite.units import counted, shortened

if TYPE_CHECKING:
    from kimi_lite.apps.chat.tool_loop import ToolLoop
    from kimi_lite.apps.tools.box import ToolBox
    from kimi_lite.apps.tools.confirm import Permission, Question

_INDENT = "  "


class Input(Protocol):
    """Where messages come from."""

    is_interactive: bool

    def read(self, draft: str) -> str:
        """The next message; KeyboardInterrupt for Ctrl-C, EOFError for the end."""

    def choose(self, question: str, answers: str, default: str = "") -> str:
        """One of the letters; the last one for Ctrl-C, `default` for an empty line (without one it asks again)."""


class Chat:
    """A conversation at a terminal or a pipe. `status` shows everything but the answers."""

    def __init__(
        self,
        conversation: Conversation,
        status: Console,
        autosave: Autosave,
        options: Options,
        tools: "ToolBox | None" = None,
        is_unsaved: bool = False,
    ) -> None:
        """is_unsaved: it was said that conversations cannot be saved."""
        self.conversation, self.status, self.autosave = conversation, status, autosave
        self.options, self.tools = options, tools
        self.commands = all_commands()
        self.can_think = conversation.can_think  # asked at every key
        self.shows_reasoning = not options.is_hiding_thinking and status.is_terminal
        self.attachments: list[Attachment] = attachments_from(options)
        self.draft = ""  # what the prompt begins with
        self.is_editing = False  # the next message replaces the last one
        self.is_over = False
        self._input: Input | None = None
        self._has_said_how_to_leave = False
        self._is_unsaved = is_unsaved  # and it was said
        self._files = ModelFiles(conversation.info.path)
        self._progress = WorkProgress(status, least=LEAST_PREFILL_TOKENS)
        self._seeing = WorkProgress(status)
        conversation.on_media = self.on_media
        self._interrupt = Interrupt(lambda: None)  # of the answer in progress
        self._num_read = 0  # tokens of its prompt

    @property
    def is_interactive(self) -> bool:
        return self._input is not None and self._input.is_interactive

    def begin(self, claim: Claim | None = None) -> None:
        """Open what the command line names. What else it says has precedence over what was saved."""
        if self.attachments:
            self.require_sight("--image and --video need")
            self.attachments = [self.looked_at(one) for one in self.attachments]
        if claim is not None:
            self._open(claim)
        self.conversation.settings = self.conversation.settings.overridden(AnswerSettings.from_options(self.options))
        if self.options.is_thinking is not None:
            self.conversation.set_thinking(self.options.is_thinking)
        self.conversation.system = self.options.system or self.conversation.system

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

    def warn(self, text: str) -> None:
        """Something is wrong, and the chat goes on."""
        self._say(text, "red")

    def _say(self, text: str, style: str) -> None:
        if not self.status.is_terminal or not text:
            show_plain(self.status, text, style=style)
            return
        body = text.lstrip(" ")
        indented = Padding(Text(body), (0, 0, 0, len(text) - len(body)), expand=False)
        self.status.print(indented, style=style, highlight=False)

    def say_table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Names and what belongs to them, in two columns."""
        table = Table.grid(padding=(0, 2, 0, 0), expand=False)
        table.add_column(max_width=max(self.status.width // 3, 20), overflow="fold")
        table.add_column()
        for name, text in rows:
            table.add_row(Text(name), Text(text))
        self.status.print(Padding(table, (0, 0, 0, len(_INDENT))), style="dim")

    def say_flow(self, words: Sequence[str]) -> None:
        """Words in lines as long as the screen is wide."""
        line = _INDENT
        for word in words:
            if len(line) + len(word) + 2 > self.status.width and line.strip():
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
        num_turns = len(self.conversation.turns)
        try:
            require_utf8(text)
            self.require_files()
            content = compose(text, [*self.attachments, *self._dropped(text)])
            self._seeing.close()
            if ensure_fits(self, content):
                tokens = self.conversation.ask(content, self.on_prefill, declarations, settings)
                self.answer(tokens, settings, saves_first=True)  # whatever ends the program while the model answers
        finally:
            if len(self.conversation.turns) > num_turns:
                self.attachments.clear()
            else:
                self.draft = text

    def replace(self, text: str) -> None:
        """Ask `text` in place of the last message, which stays when `text` is refused."""
        before = list(self.conversation.turns)
        self.conversation.undo()
        num_turns = len(self.conversation.turns)
        try:
            self.ask(text)
        finally:
            if len(self.conversation.turns) == num_turns:
                self.conversation.turns = before
                self.save()

    def answer(
        self, tokens: Iterator[Token], settings: AnswerSettings | None = None, saves_first: bool = False
    ) -> None:
        """Show an answer, and those that follow from its tool calls; whatever happens it is saved."""
        try:
            last = self.stream(tokens, settings, saves_first)
        finally:
            with on_interrupt(lambda: None):  # a Ctrl-C that comes too late for the answer
                self.save()
        self.require_files()  # for what happened meanwhile
        warn_when_nearly_full(self, last.stats.prompt_tokens + last.stats.generated_tokens)

    def stream(
        self, tokens: Iterator[Token], settings: AnswerSettings | None = None, saves_first: bool = False
    ) -> Token:
        """Show an answer of the model, asked with `on_prefill`; its last token. saves_first: the message, before it."""
        view = AnswerView(
            sys.stdout, self.status, self.shows_reasoning, self.options.is_plain, think_hint="/think show"
        )
        loop = self._tool_loop(view)
        tokens = loop.follow(tokens, self.on_prefill, settings=settings) if loop else tokens
        self._num_read = 0
        with (
            silent_keys(has_editor=self.is_interactive),
            self._progress,
            on_interrupt(loop.cancel if loop else self.conversation.cancel) as interrupt,
        ):
            self._interrupt = interrupt
            if saves_first:
                self.save()
            if not self.options.is_quiet:
                self._progress.wait(f"waiting for {self.conversation.info.name}")
            try:
                for token in tokens:
                    interrupt.again()
                    self._progress.close()
                    self._seeing.close()
                    view.show(token)
            finally:
                tokens.close()  # at once: what was said becomes a turn before it is saved
                self._progress.close()
                self._seeing.close()
                view.close()
        assert view.last is not None
        self._say_statistics(view.last, settings or self.conversation.settings)
        return view.last

    def show_text(self, text: str) -> None:
        """An answer that is there already, as answers are shown."""
        view = AnswerView(sys.stdout, self.status, self.shows_reasoning, self.options.is_plain)
        view.show(Token("", None, text, "content", "stop", Stats(0, 0, 0.0, 0, 0.0, 0.0)))
        view.close()

    def require_files(self) -> None:
        """Refuse to work with a model whose file has become shorter; warn where it was written."""
        if warning := self._files.changes():
            self.warn(warning)

    def require_sight(self, what: str) -> None:
        """Refuse what needs a vision tower where there is none."""
        if not self.conversation.can_see:
            raise KimiLiteError(f"{what} a vision tower; {self.conversation.info.name} has none here.", NO_TOWER_HINT)

    def attach(self, one: Attachment) -> None:
        """Put a file into the next message; KimiLiteError where it cannot be read."""
        self.attachments.append(self.looked_at(one))
        self.say(f"{self.attachments[-1].describe()} goes with your next message")

    def paste_image(self) -> None:
        """Put the clipboard's image into the next message, or say why not."""
        try:
            self.require_sight("An image needs")
            self.attach(image_of(clipboard_image(self.options.image_bytes), "clipboard"))
        except KimiLiteError as error:
            self.warn(error.message)
            self._say(error.hint, "")

    def looked_at(self, one: Attachment) -> Attachment:
        """The attachment with what is known of it; what it shows is shown here, too."""
        if not one.url:
            return one
        look = self.conversation.look_at(one.part)
        self._seeing.close()
        if look is None:
            return one
        if not self.options.is_quiet and self.is_interactive:
            show_thumbnail(self.status, look.thumbnail)
        return replace(one, details=", ".join(filter(None, [counted(look.num_tokens, "token"), look.remark])))

    def on_media(self, what: str, done: int, total: int) -> None:
        """So much of an image or a video is read or seen."""
        self._interrupt.again()
        if not self.options.is_quiet:
            self._progress.close()
            self._seeing(what, done, total)

    def on_prefill(self, request_id: str, done: int, total: int) -> None:
        """So much of the prompt is read."""
        self._interrupt.again()
        self._seeing.close()
        self._num_read = done
        if not self.options.is_quiet:
            self._progress("reading the prompt", done, total)

    def _say_statistics(self, last: Token, settings: AnswerSettings) -> None:
        if self.options.is_quiet:
            return
        max_tokens, context_length = settings.params.max_tokens, self.conversation.context_length
        self.say(f"{_INDENT}{stats_line(last, max_tokens, context_length, self._num_read)}")
        if last.finish_reason == "cancelled" and not last.stats.generated_tokens:
            self.say(f"{_INDENT}the message stays in the conversation: /undo takes it back, /edit changes it")
        if self.is_interactive:
            self.say("")

    def save(self) -> None:
        """Write the conversation down. Where that is impossible it is said once and the chat goes on."""
        try:
            self.autosave.save()
        except (HeldElsewhere, NotWritable) as error:
            if not self._is_unsaved:
                self.warn(f"{error.message} The chat goes on unsaved.")
                self.warn(error.hint)
            self._is_unsaved = True
        else:
            if self._is_unsaved and self.conversation.turns:
                self.say("the conversation is saved again")
            self._is_unsaved = self._is_unsaved and not self.conversation.turns

    def leave(self) -> None:
        """Save the conversation for good, into the folder for temporary files where it can be nowhere else."""
        try:
            self.autosave.save()
        except (HeldElsewhere, NotWritable) as error:
            if self.conversation.turns:
                self.warn(f"{error.message} {rescue(self.autosave.text(), '.json')}")

    def start_new(self) -> str:
        """Leave this conversation for a new one; the name of this one, "" where it has no name or is not saved."""
        self.leave()
        old = self.autosave.name if self.autosave.is_saved else ""
        self.autosave.start_new()
        return old

    def load(self, name: str) -> None:
        """Leave this conversation for a saved one."""
        name = self.autosave.store.find(name)
        if name == self.autosave.name and self.autosave.is_saved:
            raise KimiLiteError(f"{name!r} is the conversation you are in.", "/sessions lists the others.")
        claim = Claim.of(self.autosave.store, name)
        self.leave()
        self._open(claim)

    def _open(self, claim: Claim) -> None:
        """Go on with a claimed conversation, and say where it stands."""
        if not self.autosave.open(claim):
            self.say(f"{claim.name} is a new conversation")
            return
        conversation = self.conversation
        self.say(f"{claim.name}: {counted(len(conversation.exchanges), 'exchange')}{self._last_words()}")
        if conversation.turns and conversation.turns[-1].role == "user":
            self.say("the last message has no answer: /regen asks again")
        if self.autosave.made_by != conversation.info.name:
            self.say(f"it was held with {self.autosave.made_by}; {conversation.info.name} reads all of it again")

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
        except BrokenPipeError:  # the reader of the answers has left
            raise
        except OSError as error:
            self.warn(f"The answer cannot be shown: {error.strerror or error}.")
            self.say("the conversation has it: /export md FILE writes it")
        except KimiLiteError as error:
            self.warn(error.message)
            if error.hint:
                self._say(error.hint, "")
            if not self.is_interactive:
                self.draft = ""

    def _on_cleared_line(self) -> None:
        if self.is_editing:
            self.attachments.clear()
            self.say("the last message stays as it was")
        elif not self._has_said_how_to_leave:
            self.say("(Ctrl-D or /exit to leave)")
            self._has_said_how_to_leave = True
        self.is_editing = False

    def _dropped(self, text: str) -> list[Attachment]:
        """Images and videos whose paths stand in the message."""
        found = dropped_files(text)
        if found and not self.conversation.can_see:
            name, (kind, path) = self.conversation.info.name, found[0]
            self.say(f"{name} has no vision tower here: {path} is sent as a name, not as {_A[kind]}")
            return []
        files = [self.looked_at(attachment_of(kind, path, self.options)) for kind, path in found]
        for one in files:
            self.say(f"{one.describe()} goes with this message")
        return files

    def _tool_loop(self, view: AnswerView) -> "ToolLoop | None":
        if self.tools is None:
            return None
        from kimi_lite.apps.chat.tool_loop import ToolLoop

        def pause() -> None:
            view.close()
            self.save()  # a tool may end us, too

        return ToolLoop(self.conversation, self.tools, self._permit, self.say, pause)

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
        texts = [turn.text for turn in self.conversation.turns if turn.role == "user"]
        text = " ".join(texts[-1].split()) if texts else ""
        return f", the last about: {shortened(text, max(self.status.width - 40, 20))}" if text else ""


_A = {"image": "an image", "video": "a video"}


def run_chat(chat: Chat, claim: Claim | None, greet: Callable[[], None]) -> None:
    """Talk until the user leaves. `greet` shows what the conversation begins with."""
    with as_exit("SIGTERM", "SIGHUP"):
        try:
            if not chat.options.is_quiet:
                greet()
            chat.begin(claim)
            chat.loop(_make_input(chat))
        finally:
            chat.leave()
            chat.autosave.close()


def _make_input(chat: Chat) -> Input:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        from kimi_lite.apps.chat.input_pipe import PipeInput

        return PipeInput(sys.stdin)
    from kimi_lite.apps.chat.input import TerminalInput

    return TerminalInput(chat, state_folder() / "history")
