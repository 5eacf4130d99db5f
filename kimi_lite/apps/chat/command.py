"""`kimi-lite chat`: from its options to a conversation in progress."""

import sys
import textwrap
from contextlib import ExitStack, closing

from kimi_lite.apps.chat.chat import ChatOptions, chat
from kimi_lite.apps.opening import greeting, open_session
from kimi_lite.apps.tools.choice import open_tools, require_place
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import Options
from kimi_lite.terminal import Console, show_plain


def start_chat(options: Options) -> None:
    """Load, greet, talk, and let go of everything."""
    if options.is_continuing and options.session_name:
        raise KimiLiteError("--continue and --session are both given.", "Give one: --session NAME goes on with NAME.")
    sys.stdin.reconfigure(errors="surrogateescape")  # the conversation refuses what is not UTF-8
    aside = Console(stderr=not sys.stdout.isatty())
    chat_options = ChatOptions(
        is_quiet=options.is_quiet,
        is_plain=options.is_plain,
        shows_reasoning=not options.is_hiding_thinking,
        is_continuing=options.is_continuing,
        session_name=options.session_name,
        images=options.images,
        is_thinking=options.is_thinking,
        system=options.system,
        answer=AnswerSettings.from_options(options),
    )

    def greet() -> None:
        for line in [*greeting(session, options), *(tools.notes if tools else ())]:
            show_plain(
                aside, textwrap.fill(line, aside.width, subsequent_indent="  ", break_on_hyphens=False), style="dim"
            )
        if aside.is_terminal:
            show_plain(aside, "")

    with ExitStack() as stack:
        tools = open_tools(options)
        if tools is not None:
            stack.enter_context(tools)
        session = stack.enter_context(closing(open_session(options, aside)))
        if tools is not None:
            require_place(session)
        chat(session, aside, chat_options, greet, tools)
