"""From the parameters of `kimi-lite chat` to a conversation in progress. Called by `cli`."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kimi_lite.apps.chat import ChatOptions, chat
from kimi_lite.apps.render import show_plain
from kimi_lite.apps.start import Settings, greeting, open_session
from kimi_lite.errors import KimiLiteError

if TYPE_CHECKING:
    from kimi_lite.apps.tools.box import ToolBox


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
    )

    def greet() -> None:
        for line in [*greeting(session, settings), *(tools.notes if tools else ())]:
            show_plain(aside, line, style="dim")

    with ExitStack() as stack:
        tools = _open_tools(flags)
        if tools is not None:
            stack.enter_context(tools)
        session = stack.enter_context(closing(open_session(settings, aside)))
        if tools is not None and not session.can_call:
            raise KimiLiteError(f"The chat template of {session.info.name} has no place for tools.", "Leave --tools out.")
        chat(session, aside, options, greet, tools)


def _open_tools(flags: Mapping[str, Any]) -> "ToolBox | None":
    """The tools that the flags ask for; None where they ask for none."""
    folder, config = (None if flags[name] is None else Path(flags[name]) for name in ("tools", "mcp_config"))
    if folder is None and config is None:
        return None
    from kimi_lite.apps.tools.box import ToolBox

    return ToolBox.open(folder, config, flags["allow"] or ())
