"""From options to a conversation: find the model or build the demo, load it with progress, say what it is."""

from pathlib import Path

import psutil

from kimi_lite import __version__
from kimi_lite.apps.chat.interrupt import on_interrupt, silent_keys
from kimi_lite.apps.chat.render import describe_model
from kimi_lite.apps.progress import LoadProgress
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.loader import load
from kimi_lite.engine.session import Session
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import Options
from kimi_lite.terminal import Console, show_plain

DEMO_REMARKS = (
    "no -m given: this is the demo, a 135 M model in Kimi K2.5's architecture",
    "the real one: -m FOLDER, a GGUF from elsewhere or by kimi-lite quantize",
)
_RAM_SHARE = 0.9  # of the free memory that a model's files may fill


def open_session(options: Options, aside: Console) -> Conversation:
    """Load the model, or reach the endpoint, and begin a conversation. Progress goes to `aside`."""
    answer = AnswerSettings.from_options(options)
    session = _open_remote(options, answer) if options.endpoint else _open_local(options, answer, aside)
    session.set_thinking(session.can_think if options.is_thinking is None else options.is_thinking)
    if options.thinking_budget is not None:
        session.require_budget()
    if options.preserve_thinking and not session.can_preserve:
        raise KimiLiteError(
            f"The chat template of {session.info.name} always drops past reasoning.", "Leave --preserve-thinking out."
        )
    return session


def greeting(session: Conversation, options: Options) -> list[str]:
    """The lines before the first prompt: model, recipe, where things lie, context, mode, ceiling."""
    plan = getattr(getattr(session, "engine", None), "plan", None)
    mode = session.mode if session.can_think else f"no thinking mode ({session.settings.describe_sampling()})"
    if plan is None:
        context = "" if session.context_length is None else f" · context {session.context_length:,}"
        place = f"  {options.endpoint}" if options.endpoint else f"  {describe_model(session.info)}"
        lines = [f"kimi-lite {__version__} · {session.info.name}", f"{place}{context}", f"  {mode} · /help for help"]
    else:
        from kimi_lite.plan.view import start_panel

        lines = start_panel(plan, mode, "/help for help")
    return [*lines, *(f"  {line}" for line in DEMO_REMARKS if options.is_demo)]


def _open_remote(options: Options, answer: AnswerSettings) -> Conversation:
    from kimi_lite.apps.remote.session import RemoteSession

    return RemoteSession.open(options.endpoint, options.api_key, options.model, options.system, answer)


def _open_local(options: Options, answer: AnswerSettings, aside: Console) -> Session:
    with silent_keys(), LoadProgress(aside if not options.is_quiet else Console(quiet=True)) as progress:
        path = Path(options.model).expanduser() if options.model else _demo_path(progress)
        engine = load(path, options, None if options.is_quiet else progress)
        try:
            if options.is_warm:
                _warm(engine, options, progress)
            return Session(engine, options.system, answer)
        except BaseException:
            engine.close()
            raise


def _warm(engine: Engine, options: Options, progress: LoadProgress) -> None:
    """Read the model into memory where it fits; Ctrl-C leaves the rest for later."""
    from kimi_lite.experts.warm import warm
    from kimi_lite.gguf.shards import find_shards

    path = engine.info.path
    if options.ram_bytes is not None or not path.is_file():
        return
    if engine.info.total_bytes > _RAM_SHARE * psutil.virtual_memory().available:
        return
    with on_interrupt(lambda: None) as interrupt:
        warm(
            find_shards(path), lambda done, total: progress("reading weights", done, total), lambda: interrupt.has_come
        )


def _demo_path(progress: LoadProgress) -> Path:
    """No model was named: the small demo model."""
    from kimi_lite.demo.build import ensure_demo_model

    return ensure_demo_model(progress)


def say_demo(aside: Console) -> None:
    """For `run`, which has no panel."""
    for line in DEMO_REMARKS:
        show_plain(aside, line, style="dim")
