"""`kimi-lite run`: one prompt, one answer. Only the answer (or one JSON document) goes to stdout, all else to
stderr."""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kimi_lite.apps.chat.attachments import compose, read_image
from kimi_lite.apps.chat.interrupt import on_interrupt
from kimi_lite.apps.chat.render import (
    LEAST_PREFILL_TOKENS,
    AnswerView,
    WorkProgress,
    stats_document,
    stats_line,
)
from kimi_lite.apps.start import Settings, open_session, say_demo
from kimi_lite.apps.tools.start import open_tools, require_place
from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.turns import Content
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import whole_file
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


def read_prompt(argument: str | None, option: str | None, path: Path | None, stdin: TextIO) -> str:
    """The prompt from the argument or -p, then the file ("-" is stdin); from stdin alone when neither is given."""
    if argument is not None and option is not None:
        raise KimiLiteError("The prompt is given twice, as an argument and with -p.", "Give it once.")
    text = argument if argument is not None else option
    if text is None and path is None:
        if stdin.isatty():
            raise KimiLiteError(
                "There is no prompt.", 'Try kimi-lite run "why is the sky blue?", -f FILE, or a pipe into stdin.'
            )
        path = Path("-")
    parts = [text] if text is not None else []
    if path is not None:
        parts.append(stdin.read() if str(path) == "-" else _read_file(path))
    prompt = "\n\n".join(parts)
    if not prompt.strip():
        raise KimiLiteError("The prompt is empty.", 'Try kimi-lite run "why is the sky blue?".')
    return prompt


def start_run(flags: Mapping[str, Any]) -> int:
    """`kimi-lite run` with these parameters; the process's exit code."""
    sys.stdin.reconfigure(errors="surrogateescape")  # the conversation refuses what is not UTF-8
    file, path = (None if flags[name] is None else Path(flags[name]) for name in ("file", "output"))
    text = read_prompt(flags["prompt"], flags["prompt_option"], file, sys.stdin)
    attachments = [read_image(name) for name in flags["image"] or ()]
    settings, aside = Settings.from_flags(flags), Console(stderr=True)
    output = RunOutput(path, flags["as_json"], flags["quiet"], flags["plain"], not flags["hide_thinking"])
    if settings.is_demo and not settings.is_quiet:
        say_demo(aside)
    with ExitStack() as stack:
        tools = open_tools(flags)
        if tools is not None:
            stack.enter_context(tools)
        session = stack.enter_context(closing(open_session(settings, aside)))
        if tools is not None:
            require_place(session)
            for note in () if output.is_quiet else tools.notes:
                show_plain(aside, note, style="dim")
        return run(session, compose(text, attachments), output, tools)


def run(session: Conversation, prompt: Content, output: RunOutput, tools: "ToolBox | None" = None) -> int:
    """Answer `prompt`, with the tools there are; the process's exit code. Ctrl-C keeps what was said so far."""
    out, aside = sys.stdout, Console(stderr=True)
    is_whole = output.is_json or output.path is not None  # written at the end, in one piece
    with (
        open(os.devnull, "w") as nowhere,
        WorkProgress(aside, least=LEAST_PREFILL_TOKENS) as progress,
    ):
        shows_reasoning = aside.is_terminal and output.shows_reasoning and not output.is_quiet
        view = AnswerView(nowhere if is_whole else out, aside, shows_reasoning, output.is_plain, not output.is_quiet)
        ids = []
        report = None if output.is_quiet else lambda _, done, total: progress("reading the prompt", done, total)
        loop = None if tools is None else _tool_loop(session, tools, view, aside, output.is_quiet)
        with on_interrupt(loop.cancel if loop else session.cancel):
            tokens = session.ask(prompt, report, tools.declarations if tools else None)
            for token in loop.follow(tokens, report) if loop else tokens:
                progress.close()
                view.show(token)
                ids += [] if token.id is None else [token.id]
        view.close()
    assert view.last is not None, prompt
    if is_whole:
        _write(
            _document(session, view, ids) if output.is_json else _ended(view.texts["content"].lstrip("\n")),
            output.path,
            out,
        )
    if not output.is_quiet:
        show_plain(aside, stats_line(view.last), style="dim")
    return INTERRUPTED if view.last.finish_reason == "cancelled" else 0


def _tool_loop(session: Conversation, tools: "ToolBox", view: AnswerView, aside: Console, is_quiet: bool) -> "ToolLoop":
    from kimi_lite.apps.chat.tool_loop import ToolLoop
    from kimi_lite.apps.tools.confirm import asker

    def say(text: str) -> None:
        if not is_quiet:
            show_plain(aside, text, style="dim")

    return ToolLoop(session, tools, asker(say), say, view.close)


def _document(session: Conversation, view: AnswerView, ids: list[int]) -> str:
    document = {
        "model": session.info.name,
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


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")  # the session refuses what is not UTF-8
    except OSError as error:
        raise KimiLiteError(f"The prompt file {path} cannot be read: {error}.") from error


def _write(text: str, path: Path | None, out: TextIO) -> None:
    """To `out`, or to a file that appears only when it is complete."""
    if path is None:
        write(out, text)
        return
    try:
        with whole_file(path) as file:
            file.write(text)
    except OSError as error:
        raise KimiLiteError(f"The answer cannot be written to {path}: {error}.") from error
