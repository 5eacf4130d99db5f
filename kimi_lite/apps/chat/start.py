"""From the parameters of `kimi-lite chat` to a conversation in progress."""

import sys
import textwrap
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from kimi_lite.apps.chat.chat import ChatOptions, chat
from kimi_lite.apps.start import Settings, greeting, open_session
from kimi_lite.apps.tools.start import open_tools, require_place
from kimi_lite.errors import KimiLiteError
from kimi_lite.terminal import Console, show_plain


def start_chat(flags: Mapping[str, Any]) -> None:
    """Load, greet, talk, and let go of everything."""
    if flags["is_continuing"] and flags["session"]:
        raise KimiLiteError("--continue and --session are both given.", "Give one: --session NAME goes on with NAME.")
    sys.stdin.reconfigure(errors="surrogateescape")  # the conversation refuses what is not UTF-8
    settings = replace(Settings.from_flags(flags), is_warm=flags["warm"])
    aside = Console(stderr=not sys.stdout.isatty())
    options = ChatOptions(
        is_quiet=flags["quiet"],
        is_plain=flags["plain"],
        shows_reasoning=not flags["hide_thinking"],
        is_continuing=flags["is_continuing"],
        session_name=flags["session"],
        images=tuple(flags["image"] or ()),
        is_thinking=settings.is_thinking,
        system=settings.system,
        answer=settings.answer,
    )

    def greet() -> None:
        for line in [*greeting(session, settings), *(tools.notes if tools else ())]:
            show_plain(
                aside, textwrap.fill(line, aside.width, subsequent_indent="  ", break_on_hyphens=False), style="dim"
            )
        if aside.is_terminal:
            show_plain(aside, "")

    with ExitStack() as stack:
        tools = open_tools(flags)
        if tools is not None:
            stack.enter_context(tools)
        session = stack.enter_context(closing(open_session(settings, aside)))
        if tools is not None:
            require_place(session)
        chat(session, aside, options, greet, tools)
