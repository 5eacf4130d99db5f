"""/swarm: a task for many agents, in the middle of a conversation."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from kimi_lite.apps.chat.commands.registry import Registry
from kimi_lite.apps.interrupt import Forced, on_interrupt, silent_keys
from kimi_lite.engine.session import Session
from kimi_lite.engine.turns import require_utf8
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import OPTIONS, Options

if TYPE_CHECKING:
    from kimi_lite.apps.chat.chat import Chat
    from kimi_lite.apps.swarm.backend import Backend
    from kimi_lite.apps.swarm.run import Assignment
    from kimi_lite.terminal import Console

COMMANDS = Registry()


@COMMANDS.command("swarm", usage="TASK")
def _swarm(chat: Chat, argument: str) -> None:
    """let agents work on a task at the same time; task and answer go into the conversation"""
    if not argument:
        raise KimiLiteError("There is no task.", "It is /swarm TASK; kimi-lite swarm --help tells more.")
    require_utf8(argument, "The task")
    if not chat.conversation.can_call:
        raise KimiLiteError(
            f"{chat.conversation.info.name} takes no tools, so it cannot start agents.",
            "kimi-lite swarm --plan FILE lets agents work on parts that you name.",
        )
    chat.require_files()
    from kimi_lite.apps.swarm.start import Ends, carry_out

    options = _options(chat.options, chat.conversation.info.name)
    ends = Ends((signal.SIGINT,), _force)
    with silent_keys(has_editor=chat.is_interactive), on_interrupt(lambda: None), _parallel(chat, options.max_parallel):
        done = carry_out(options, _assignment(chat, options, argument), chat.status, _opener(chat), ends=ends)
    ended = done.ended
    if ended is None or not ended.answer:
        reason = "it was stopped" if ended is None else ended.reason or ended.outcome
        raise KimiLiteError(f"The swarm has no answer: {reason}", f"kimi-lite swarm show {done.run_id} tells more.")
    chat.conversation.add_exchange(argument, ended.answer)
    chat.show_text(ended.answer)
    chat.save()
    if ended.outcome != "completed":
        chat.warn(f"The task is not complete: {ended.reason or ended.outcome}")
    chat.say(f"  kimi-lite swarm show {done.run_id} tells who did what")


def _options(options: Options, model: str) -> Options:
    """The chat's, as `kimi-lite swarm` calls them; agents use the folder of the chat's tools."""
    given = {name: source for name, source in options.given.items() if "swarm" in OPTIONS[name].commands}
    changes: dict[str, object] = {}
    if options.tools_folder is not None:
        changes["work_folder"], given["work_folder"] = options.tools_folder, "--tools"
    if options.endpoint is not None:
        changes |= {"endpoints": (options.endpoint,), "model": model}
        given |= {"endpoints": "--endpoint", "model": "--model"}
    return replace(options, **changes, given=given)


def _assignment(chat: Chat, options: Options, task: str) -> Assignment:
    """With the settings and the system prompt of the conversation."""
    from kimi_lite.apps.swarm.permissions import Permissions
    from kimi_lite.apps.swarm.run import Assignment
    from kimi_lite.apps.swarm.settings import SwarmSettings
    from kimi_lite.apps.swarm.start import options_to_json

    permissions = Permissions().with_allowed(options.allowed_tools)
    record = {"options": options_to_json(options), "permissions": Permissions().to_tables(), "plan": None}
    return Assignment(
        run_id="",
        task=task,
        settings=SwarmSettings.from_options(options),
        answer=chat.conversation.settings,
        permissions=permissions,
        system=chat.conversation.system,
        record=record,
    )


def _opener(chat: Chat) -> Callable[[Options, Console, Callable[[str], None]], Backend]:
    """The conversation's engine, in a thread of its own while the agents work; or its endpoint."""
    conversation = chat.conversation
    if isinstance(conversation, Session):
        from kimi_lite.apps.swarm.local import LocalBackend

        return lambda options, status, warn: LocalBackend(lambda on_progress: conversation.engine, is_owner=False)
    from kimi_lite.apps.swarm.start import open_backend_of

    return open_backend_of


@contextmanager
def _parallel(chat: Chat, num_sequences: int) -> Iterator[None]:
    """Inside the block the engine of the conversation, which has one sequence, takes more, which share its context; not
    with --reproducible."""
    if not isinstance(chat.conversation, Session):
        yield
        return
    engine = chat.conversation.engine
    if engine.plan and engine.plan.situation.is_one_by_one:
        yield
        return
    scheduler = engine.scheduler
    before, scheduler.max_running = scheduler.max_running, num_sequences
    try:
        yield
    finally:
        scheduler.max_running = before


def _force(number: int) -> None:
    raise Forced
