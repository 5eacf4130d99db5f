"""From options to a conversation: find the model or build the demo, load it with progress, say what it is."""

import sys
import textwrap
from dataclasses import replace

from kimi_lite import __version__
from kimi_lite.apps.interrupt import on_interrupt, silent_keys
from kimi_lite.apps.model_path import find_model, require_model_name
from kimi_lite.apps.progress import LoadProgress
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.loader import load
from kimi_lite.engine.planning import situation_of
from kimi_lite.engine.session import Session
from kimi_lite.engine.types import ModelInfo
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import require_writable
from kimi_lite.options import Options, Situation, unused_options
from kimi_lite.terminal import Console, show_plain
from kimi_lite.units import gib

DEMO_REMARKS = (
    "no -m given: this is the demo, a 135 M model in Kimi K2.5's architecture",
    "the real one: -m FOLDER, a GGUF from elsewhere or by kimi-lite quantize",
)
_WHOLE_LINE = 10_000  # columns


def open_conversation(options: Options, status: Console) -> Conversation:
    """Load the model, or reach the endpoint, and begin a conversation. Progress and remarks go to `status`."""
    check_before_loading(options)
    answer = AnswerSettings.from_options(options)
    conversation = _open_remote(options, answer) if options.endpoint else _open_local(options, answer, status)
    conversation.set_thinking(conversation.can_think if options.is_thinking is None else options.is_thinking)
    if options.thinking_budget is not None:
        conversation.require_budget()
    if not conversation.can_preserve:
        refuse_to_preserve(options, conversation.info.name)
    remarks = [*(conversation.plan.warnings if conversation.plan else ())]
    remarks += unused_options(options, _situation(conversation, options, status))
    for line in () if options.is_quiet else remarks:
        show_plain(status, wrapped(line, line_width(status)), style="dim")
    return conversation


def check_before_loading(options: Options) -> None:
    """What can be known to fail before minutes of loading. Raises KimiLiteError."""
    if options.routing_trace:
        require_writable(options.routing_trace, "The record of routing")
    if options.endpoint or options.endpoints:
        return
    if options.model:
        require_model_name(options.model)


def refuse_to_preserve(options: Options, name: str) -> None:
    """For a model, `name`, whose template cannot keep past reasoning in the prompt."""
    if options.preserve_thinking:
        raise KimiLiteError(f"The chat template of {name} always drops past reasoning.", "Remove --preserve-thinking.")


def _situation(conversation: Conversation, options: Options, status: Console) -> Situation:
    found = Situation(is_endpoint=True) if conversation.plan is None else situation_of(conversation.plan, options)
    is_terminal = status.is_terminal or sys.stdout.isatty()
    return replace(found, can_think=conversation.can_think, is_terminal=is_terminal)


def greeting(conversation: Conversation, options: Options, width: int) -> list[str]:
    """The lines before the first prompt, of at most `width` columns: model, recipe, where things lie, context, mode,
    speed."""
    settings = conversation.settings
    mode = conversation.mode if conversation.can_think else f"no thinking mode ({settings.describe_sampling()})"
    if conversation.plan is None:
        info, length = conversation.info, conversation.context_length
        context = "" if length is None else f" · context {length:,}"
        place = f"  {_public(options.endpoint)}" if options.endpoint else f"  {describe_model(info)}"
        lines = [f"kimi-lite {__version__} · {info.name}", f"{place}{context}", f"  {mode} · /help for help"]
    else:
        from kimi_lite.plan.view import start_panel

        lines = start_panel(conversation.plan, mode, "/help for help", width=width)
    lines += [f"  {line}" for line in DEMO_REMARKS if options.is_demo]
    return [wrapped(line, width) for line in lines]


def describe_model(info: ModelInfo) -> str:
    """`IQ2_XXS 87 %, Q8_0 12 % · 255.6 GiB`: the types that hold at least a hundredth of the bytes."""
    total = sum(num_bytes for _, num_bytes in info.bytes_by_type)
    shares = [(name, round(100 * num_bytes / total)) for name, num_bytes in info.bytes_by_type]
    types = ", ".join(f"{name} {share} %" for name, share in shares if share >= 1)
    return f"{types} · {gib(info.total_bytes)}"


def wrapped(line: str, width: int) -> str:
    """At most `width` columns, broken between words; what follows is indented."""
    return textwrap.fill(line, width, subsequent_indent="    ", break_on_hyphens=False)


def line_width(console: Console) -> int:
    """Columns of a terminal; a pipe takes whole lines."""
    return console.width if console.is_terminal else _WHOLE_LINE


def _public(endpoint: str) -> str:
    """The address without a password."""
    from kimi_lite.apps.remote.endpoint import address_of

    return address_of(endpoint).url


def _open_remote(options: Options, answer: AnswerSettings) -> Conversation:
    from kimi_lite.apps.remote.session import RemoteSession

    return RemoteSession.open(options.endpoint, options.api_key, options.model, options.system, answer)


def _open_local(options: Options, answer: AnswerSettings, status: Console) -> Session:
    with silent_keys(), LoadProgress(status if not options.is_quiet else Console(quiet=True)) as progress:
        path = find_model(options, progress)
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
    from kimi_lite.engine.warming import warm_model

    path = engine.info.path
    if not path.is_file() or not situation_of(engine.plan, options).is_warmed:
        return
    with on_interrupt(lambda: None) as interrupt:
        warm_model(
            path,
            engine.plan,
            lambda done, total: progress("reading weights", done, total),
            lambda: interrupt.has_come,
        )


def say_demo(status: Console) -> None:
    """For `run`, which has no panel."""
    for line in DEMO_REMARKS:
        show_plain(status, wrapped(line, line_width(status)), style="dim")
