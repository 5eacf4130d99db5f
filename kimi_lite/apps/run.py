"""`kimi-lite run`: one prompt, one answer. Only the answer (or one JSON document) goes to stdout, all else to
stderr."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from kimi_lite.apps.chat.attachments import attachments_from, compose
from kimi_lite.apps.chat.render import (
    LEAST_PREFILL_TOKENS,
    AnswerView,
    WorkProgress,
    stats_document,
    stats_line,
)
from kimi_lite.apps.interrupt import on_interrupt
from kimi_lite.apps.model_files import ModelFiles, guard_terminal
from kimi_lite.apps.opening import open_conversation, say_demo
from kimi_lite.apps.piped import read_piped
from kimi_lite.apps.tools.choice import open_tools
from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.turns import Content
from kimi_lite.engine.types import Token
from kimi_lite.engine.vision import NO_TOWER_HINT
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import read_text, require_writable, rescue, whole_file
from kimi_lite.options import Options
from kimi_lite.terminal import Console, show_plain, write

if TYPE_CHECKING:
    from kimi_lite.apps.chat.tool_loop import ToolLoop
    from kimi_lite.apps.tools.box import ToolBox

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class RunOutput:
    """Where the answer goes and what goes with it."""

    path: Path | None = None  # None: stdout
    is_json: bool = False
    is_quiet: bool = False
    is_plain: bool = False
    shows_reasoning: bool = True


def read_prompt(
    argument: str | None, option: str | None, path: Path | None, stdin: TextIO | None, say: Callable[[str], None]
) -> str:
    """The argument or -p, then the file, then what is piped into `stdin`; that is waited for where the file is "-" or
    nothing else is given."""
    if argument is not None and option is not None:
        raise KimiLiteError("The prompt is given twice, as an argument and with -p.", "Give it once.")
    text = argument if argument is not None else option
    if text is not None and text.endswith(".gguf") and os.path.isfile(text):
        raise KimiLiteError(f"The prompt {text!r} is a model's file.", f'Try kimi-lite run -m {text} "PROMPT".')
    is_alone = text is None and path is None and not (stdin is not None and stdin.isatty())
    parts = [] if text is None else [text.removeprefix("\ufeff")]
    if path is not None and str(path) != "-":
        parts.append(read_text(path, "The prompt file"))
    parts.append(read_piped(stdin, is_alone or str(path) == "-", say))
    prompt = "\n\n".join(part for part in parts if part.strip())
    if not prompt:
        raise KimiLiteError(
            "There is no prompt, or it is empty.",
            'Try kimi-lite run "why is the sky blue?", -f FILE, or a pipe into stdin.',
        )
    return prompt


def start_run(
    options: Options, prompt: str | None, prompt_option: str | None, file: Path | None, is_json: bool, path: Path | None
) -> int:
    """`kimi-lite run`; the process's exit code. path: where the answer goes, None for stdout."""
    if path is not None:
        require_writable(path, "The answer")
    stderr = Console(stderr=True)
    say = partial(show_plain, stderr, style="dim")
    text = read_prompt(prompt, prompt_option, file, sys.stdin, say)
    attachments = attachments_from(options)
    output = RunOutput(path, is_json, options.is_quiet, options.is_plain, not options.is_hiding_thinking)
    if options.is_demo and not options.is_quiet:
        say_demo(stderr)
    with ExitStack() as stack:
        tools = open_tools(options)
        if tools is not None:
            stack.enter_context(tools)
        conversation = stack.enter_context(closing(open_conversation(options, stderr)))
        if attachments and not conversation.can_see:
            problem = f"--image and --video need a vision tower; {conversation.info.name} has none here."
            raise KimiLiteError(problem, NO_TOWER_HINT)
        if tools is not None:
            conversation.require_calls()
            for remark in () if output.is_quiet else tools.notes:
                say(remark)
        if conversation.info.path.exists():
            guard_terminal()
        files = ModelFiles(conversation.info.path)
        exit_code = run(conversation, compose(text, attachments), output, tools)
        if warning := files.changes():
            show_plain(stderr, warning, style="red")
        return exit_code


def run(conversation: Conversation, prompt: Content, output: RunOutput, tools: "ToolBox | None" = None) -> int:
    """Answer `prompt`, with the tools there are; the process's exit code. Ctrl-C keeps what was said so far."""
    out, stderr = sys.stdout, Console(stderr=True)
    is_whole = output.is_json or output.path is not None  # written at the end, in one piece
    conversation.is_watched = is_whole or out.isatty()
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        WorkProgress(stderr, least=LEAST_PREFILL_TOKENS) as progress,
        WorkProgress(stderr) as seeing,
    ):
        shows_reasoning = stderr.is_terminal and output.shows_reasoning and not output.is_quiet
        view = AnswerView(nowhere if is_whole else out, stderr, shows_reasoning, output.is_plain, not output.is_quiet)
        ids, failure = [], None

        def report(_: str, done: int, total: int) -> None:
            seeing.close()
            if not output.is_quiet:
                progress("reading the prompt", done, total)

        def report_media(what: str, done: int, total: int) -> None:
            progress.close()
            if not output.is_quiet:
                seeing(what, done, total)

        conversation.on_media = report_media
        if not output.is_quiet:
            progress.wait(f"waiting for {conversation.info.name}")
        loop = None if tools is None else _tool_loop(conversation, tools, view, stderr, output.is_quiet)
        with on_interrupt(loop.cancel if loop else conversation.cancel):
            tokens = conversation.ask(prompt, report, tools.declarations if tools else None)
            try:
                for token in loop.follow(tokens, report) if loop else tokens:
                    progress.close()
                    seeing.close()
                    ids += [] if token.id is None else [token.id]
                    failure = _shown(view, token, nowhere) or failure
            except KimiLiteError as error:
                if is_whole and view.texts["content"]:
                    raise KimiLiteError(error.message, f"What came: {rescue(view.texts['content'])}") from error
                raise
        view.close()
    if failure is not None:
        raise _unwritten("stdout", failure, view.texts["content"]) from failure
    assert view.last is not None, prompt
    if is_whole:
        answer = _document(conversation, view, ids) if output.is_json else _ended(view.texts["content"].lstrip("\n"))
        _write(answer, output.path, out)
    if not output.is_quiet:
        max_tokens, context_length = conversation.settings.params.max_tokens, conversation.context_length
        show_plain(stderr, stats_line(view.last, max_tokens, context_length), style="dim")
    return INTERRUPTED if view.last.finish_reason == "cancelled" else 0


def _shown(view: AnswerView, token: Token, nowhere: TextIO) -> OSError | None:
    """Show a token. Where stdout cannot be written (a full disk), the rest is only kept."""
    try:
        view.show(token)
    except BrokenPipeError:  # its reader has left
        raise
    except OSError as error:
        view.out = nowhere
        return error
    return None


def _unwritten(where: str, error: OSError, text: str) -> KimiLiteError:
    return KimiLiteError(f"The answer cannot be written to {where}: {error.strerror}.", rescue(text))


def _tool_loop(
    conversation: Conversation, tools: "ToolBox", view: AnswerView, stderr: Console, is_quiet: bool
) -> "ToolLoop":
    from kimi_lite.apps.chat.tool_loop import ToolLoop
    from kimi_lite.apps.tools.confirm import asker

    def say(text: str) -> None:
        if not is_quiet:
            show_plain(stderr, text, style="dim")

    return ToolLoop(conversation, tools, asker(say), say, view.close)


def _document(conversation: Conversation, view: AnswerView, ids: list[int]) -> str:
    document = {
        "model": conversation.info.name,
        "text": view.texts["content"],
        "reasoning": view.texts["reasoning"],
        "tool_calls": view.calls,
        "ids": ids,
        "finish_reason": view.last.finish_reason,
        "stats": stats_document(view.last.stats),
    }
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def _write(text: str, path: Path | None, out: TextIO) -> None:
    """To `out`, or to a file that appears only when it is complete; into the folder for temporary files where that
    fails."""
    where = "stdout" if path is None else str(path)
    try:
        if path is None:
            write(out, text)
            return
        with whole_file(path) as file:
            file.write(text)
    except BrokenPipeError:  # its reader has left
        raise
    except OSError as error:
        raise _unwritten(where, error, text) from error
