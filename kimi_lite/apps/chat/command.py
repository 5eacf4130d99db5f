"""`kimi-lite chat`: from its options to a conversation in progress. What can fail early fails before the model is
loaded."""

import os
import sys
from contextlib import ExitStack, closing

from kimi_lite.apps.chat.chat import Chat, run_chat
from kimi_lite.apps.chat.sessions import Autosave, Claim, SessionStore
from kimi_lite.apps.folders import make_private, state_folder
from kimi_lite.apps.model_files import guard_terminal
from kimi_lite.apps.opening import greeting, line_width, open_conversation, wrapped
from kimi_lite.apps.tools.choice import open_tools
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import Options
from kimi_lite.terminal import Console, show_plain


def start_chat(options: Options) -> None:
    """Check, load, greet, talk, and close everything."""
    status = Console(stderr=not sys.stdout.isatty())
    store = SessionStore(state_folder() / "sessions")

    def greet() -> None:
        width = line_width(status)
        remarks = [wrapped(line, width) for line in (tools.notes if tools else ())]
        for line in [*greeting(chat.conversation, options, width), *remarks]:
            show_plain(status, line, style="dim")
        if status.is_terminal:
            show_plain(status, "")

    with ExitStack() as stack:
        claim = claim_session(store, options.is_continuing, options.session_name)
        if claim is not None:
            stack.callback(claim.release)
        problem = prepare_folder(store)
        if problem:
            show_plain(status, f"{problem} The chat goes on unsaved.", style="red")
        tools = open_tools(options)
        if tools is not None:
            stack.enter_context(tools)
        conversation = stack.enter_context(closing(open_conversation(options, status)))
        if tools is not None:
            conversation.require_calls()
        if conversation.info.path.exists():
            guard_terminal("" if problem else "; the conversation is saved: kimi-lite chat --continue")
        chat = Chat(conversation, status, Autosave(conversation, store), options, tools, is_unsaved=bool(problem))
        run_chat(chat, claim, greet)


def claim_session(store: SessionStore, is_continuing: bool, name: str | None) -> Claim | None:
    """The conversation that `--continue` or `--session NAME` asks for, checked and under its lock."""
    if is_continuing and name:
        raise KimiLiteError("--continue and --session are both given.", "Give one: --session NAME goes on with NAME.")
    if is_continuing:
        return Claim.of(store, store.latest())
    return Claim.of(store, name, is_new_allowed=True) if name else None


def prepare_folder(store: SessionStore) -> str:
    """Make the folder for conversations, clean it, and say why none can be saved there ("" where they can)."""
    try:
        make_private(store.folder, is_ours=True)
    except KimiLiteError as error:
        return error.message
    if not os.access(store.folder, os.W_OK | os.X_OK):
        return f"Conversations cannot be saved: the folder {store.folder} is not writable."
    store.clean()
    return ""
