"""From options to a run and its answer: backend, tools, journal, view, signals; what a run is resumed with.

Stdout carries the answer and nothing else; the view and all remarks go to stderr.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from kimi_lite.apps.interrupt import PATIENCE_S
from kimi_lite.apps.model_path import find_model
from kimi_lite.apps.opening import check_before_loading, line_width, refuse_to_preserve, say_demo, wrapped
from kimi_lite.apps.piped import read_piped
from kimi_lite.apps.progress import LoadProgress
from kimi_lite.apps.swarm.backend import Backend
from kimi_lite.apps.swarm.endpoints import parse_endpoints, without_password
from kimi_lite.apps.swarm.events import Emitter, RunEnded, Warned
from kimi_lite.apps.swarm.journal import Journal, read
from kimi_lite.apps.swarm.local import LocalBackend
from kimi_lite.apps.swarm.permissions import Permissions
from kimi_lite.apps.swarm.plan_file import Plan
from kimi_lite.apps.swarm.remote import RemoteBackend
from kimi_lite.apps.swarm.replay import Replay
from kimi_lite.apps.swarm.run import Assignment, SwarmRun
from kimi_lite.apps.swarm.runs import RunStore
from kimi_lite.apps.swarm.settings import SwarmSettings
from kimi_lite.apps.swarm.toolshed import Toolshed
from kimi_lite.apps.swarm.view import View, open_view
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.engine import Engine, OnProgress
from kimi_lite.engine.loader import load
from kimi_lite.engine.planning import situation_of
from kimi_lite.engine.turns import require_utf8
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import OPTIONS, Options, Situation, unused_options
from kimi_lite.terminal import Console, echo, show_plain

INTERRUPTED = 130
_NOT_KEPT = ("api_key", "is_plain", "is_quiet")  # of the options: a key is no part of a run
OpenBackend = Callable[[Options, Console, Callable[[str], None]], Backend]


def start_run(
    options: Options, task: str | None, open_backend: "OpenBackend | None" = None, stdin: TextIO | None = None
) -> int:
    """`kimi-lite swarm`; the process's exit code. open_backend: another one than the options'. What is piped into
    `stdin` is appended to the task."""
    if options.plan_file is not None and options.agents_file is not None:
        raise KimiLiteError("--plan and --agents both say which agents there are.", "Put the agents into the plan.")
    plan = None if options.plan_file is None else Plan.read(options.plan_file)
    permissions = plan.permissions if plan is not None else _permissions(options)
    task = task if task is not None else ("" if plan is None else plan.task)
    is_missing = plan is None and not task.strip()
    say = partial(show_plain, Console(stderr=True), style="dim")
    piped = read_piped(stdin, is_missing and not (stdin is not None and stdin.isatty()), say)
    task = "\n\n".join(part for part in (task, piped) if part.strip())
    if not task and plan is None:
        raise KimiLiteError("There is no task.", 'Try kimi-lite swarm "TASK", or --plan FILE.')
    require_utf8(task, "The task")
    record = {
        "options": options_to_json(options),
        "permissions": permissions.to_tables(),
        "plan": None if plan is None else plan.document,
    }
    assignment = _assignment("", task, options, permissions.with_allowed(options.allowed_tools), plan, record)
    return _run(options, assignment, None, open_backend or open_backend_of)


def resume_run(typed: Options, name: str, open_backend: "OpenBackend | None" = None) -> int:
    """`kimi-lite swarm resume`; the process's exit code."""
    folder = RunStore().find(name)
    replay = Replay(read(folder).events)
    if replay.started is None:
        raise KimiLiteError(f"The run {folder.name} ended before it began.", "Start it anew.")
    if replay.ended is not None and replay.ended.outcome == "completed":
        show_plain(Console(stderr=True), f"the run {folder.name} is complete; this is its answer", style="dim")
        _print_answer(replay.ended)
        return 0
    for name in ("plan_file", "agents_file"):
        if typed.given.get(name, "").startswith("-"):
            flag = OPTIONS[name].long_flag
            raise KimiLiteError(f"{flag} has no effect here: a run goes on with what it began with.", "Start it anew.")
    record = replay.started.settings
    try:
        options = options_from_json(record["options"], typed)
        document = record["plan"]
        plan = None if document is None else Plan.from_document(document, f"of the run {folder.name}")
        permissions = Permissions.from_tables(record["permissions"], f"the run {folder.name}")
    except (KeyError, TypeError, ValueError) as error:
        raise KimiLiteError(
            f"The run {folder.name} was started by kimi-lite {replay.started.version}, and cannot be read by this one.",
            "Start it anew.",
        ) from error
    permissions = permissions.with_allowed(options.allowed_tools)
    assignment = _assignment(folder.name, replay.started.task, options, permissions, plan, record)
    return _run(options, assignment, folder, open_backend or open_backend_of)


def open_backend_of(options: Options, status: Console, warn: Callable[[str], None]) -> Backend:
    """The endpoints, or the model in this process; not open yet."""
    if options.endpoints:
        _remark(unused_options(options, Situation(is_endpoint=True)), options, status)
        return RemoteBackend(parse_endpoints(options.endpoints, options.model), options.api_key, on_warning=warn)
    here = replace(options, num_sequences=options.max_parallel)
    return LocalBackend(lambda on_progress: _load(here, status, on_progress))


def options_to_json(options: Options) -> dict[str, Any]:
    """What was said, for a run that is resumed; the rest are defaults then too."""
    kept = {name: getattr(options, name) for name in options.given if name not in _NOT_KEPT}
    if "endpoints" in kept:
        kept["endpoints"] = tuple(map(without_password, options.endpoints))
    if "model" in kept and os.path.exists(str(options.model)):
        kept["model"] = os.path.abspath(str(options.model))  # a run may be resumed from another folder
    return {name: _plain(value) for name, value in kept.items()}


def options_from_json(kept: Mapping[str, Any], typed: Options) -> Options:
    """The options of a run, but for those that are typed now."""
    is_typed = {name for name, source in typed.given.items() if source.startswith("-")}
    kinds = {field.name: field.type for field in fields(Options)}
    taken = kept.keys() & OPTIONS.keys() - is_typed - set(_NOT_KEPT)
    return replace(typed, **{name: _unplain(kinds[name], kept[name]) for name in taken})


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    return list(value) if isinstance(value, tuple) else value


def _unplain(kind: Any, value: Any) -> Any:
    if value is None:
        return None
    if kind in (Path, Path | None):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def _permissions(options: Options) -> Permissions:
    return Permissions() if options.agents_file is None else Permissions.read(options.agents_file)


def _assignment(
    run_id: str,
    task: str,
    options: Options,
    permissions: Permissions,
    plan: Plan | None,
    record: Mapping[str, Any],
) -> Assignment:
    answer = AnswerSettings.from_options(options)
    if options.is_thinking is not None:
        answer = answer.with_thinking(options.is_thinking)
    settings = SwarmSettings.from_options(options)
    return Assignment(run_id, task, settings, answer, permissions, plan, options.system, record)


def _run(options: Options, assignment: Assignment, folder: Path | None, open_backend: OpenBackend) -> int:
    """In a folder of its own; `folder`: the one of a run that is resumed."""
    status = Console(stderr=True)
    check_before_loading(options)
    if options.is_demo and not options.is_quiet:
        say_demo(status)
    done = carry_out(options, assignment, status, open_backend, folder)
    return INTERRUPTED if done.ended is None else _tell(done.ended, done.run_id)


class Done(NamedTuple):
    """A run that is over. `ended` is None where it was stopped before it began."""

    run_id: str
    ended: RunEnded | None


def carry_out(
    options: Options,
    assignment: Assignment,
    status: Console,
    open_backend: OpenBackend,
    folder: Path | None = None,
    ends: "Ends | None" = None,
) -> Done:
    """A run with its journal, tools, view and signals. folder: of a run that is resumed. ends: which signals end it,
    and how; else SIGINT and SIGTERM, at last the process with it."""
    store = RunStore()
    is_new = folder is None
    folder = store.create() if folder is None else folder
    assignment = replace(assignment, run_id=folder.name)
    try:
        with ExitStack() as stack:
            journal = stack.enter_context(Journal(folder))
            recorded = read(folder).events
            replay = Replay(recorded)
            shown_on = Console(quiet=True) if options.is_quiet else status
            view = stack.enter_context(open_view(shown_on, options.is_plain, recorded))
            emitter = Emitter([journal, view], replay.last_s)
            toolshed = Toolshed(emitter, folder, assignment.permissions, options.work_folder, options.mcp_config)
            stack.callback(toolshed.close)

            def warn(text: str) -> None:
                emitter.emit(lambda t_s: Warned(t_s, text))

            backend = open_backend(options, status, warn)
            run = SwarmRun(assignment, backend, toolshed, emitter, replay)
            ended = asyncio.run(
                _serve(run, backend, ends or Ends((signal.SIGINT, signal.SIGTERM), _exit_at_once(view)))
            )
    except BaseException:
        if is_new and not read(folder).events:
            store.delete(folder)
        raise
    if ended is None and is_new:
        store.delete(folder)
    return Done(folder.name, ended)


class Ends(NamedTuple):
    """The signals that end a run gently, and what one of them does that comes `PATIENCE_S` after the first."""

    signals: Sequence[int]
    at_once: Callable[[int], None]


def _exit_at_once(view: View) -> Callable[[int], None]:
    """The process ends as it is: the journal has all that is done."""

    def end(number: int) -> None:
        view.__exit__(None, None, None)
        os._exit(128 + number)

    return end


async def _serve(run: SwarmRun, backend: Backend, ends: Ends) -> RunEnded | None:
    """The run's end; None where Ctrl-C came before it began."""
    loop, opening = asyncio.get_running_loop(), asyncio.ensure_future(backend.open())
    ending = _Ending(run, opening, ends)
    for number in ends.signals:
        with suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, ending.on_signal, number)
    try:
        with suppress(asyncio.CancelledError):
            await opening
            ending.has_begun = True
            return await run.run()
        return None
    finally:
        await backend.close()


class _Ending:
    """What signals do: the first ends the run gently."""

    def __init__(self, run: SwarmRun, opening: asyncio.Future, ends: Ends) -> None:
        self._run, self._opening, self._ends = run, opening, ends
        self.has_begun = False
        self._came_s: float | None = None

    def on_signal(self, number: int) -> None:
        now_s = time.monotonic()
        if self._came_s is not None:
            if now_s - self._came_s >= PATIENCE_S:
                self._ends.at_once(number)
            return
        self._came_s = now_s
        if self.has_begun:
            self._run.stop()
        else:
            self._opening.cancel()


def _load(options: Options, status: Console, on_progress: OnProgress) -> Engine:
    with LoadProgress(Console(quiet=True) if options.is_quiet else status) as progress:

        def report(stage: str, done: int, total: int) -> None:
            progress(stage, done, total)
            on_progress(stage, done, total)

        engine = load(find_model(options, progress), options, report)
    try:
        if not engine.template.facts.can_preserve:
            refuse_to_preserve(options, engine.info.name)
    except BaseException:
        engine.close()
        raise
    if engine.plan is not None:
        _remark([*engine.plan.warnings, *unused_options(options, situation_of(engine.plan, options))], options, status)
    return engine


def _remark(lines: Sequence[str], options: Options, status: Console) -> None:
    for line in () if options.is_quiet else lines:
        show_plain(status, wrapped(line, line_width(status)), style="dim")


def _tell(ended: RunEnded, run_id: str) -> int:
    _print_answer(ended)
    resume = f"kimi-lite swarm resume {run_id} goes on."
    if ended.outcome == "cancelled":
        return INTERRUPTED
    if ended.outcome == "failed" or not ended.answer:
        raise KimiLiteError(f"The run ended without the orchestrator's answer: {ended.reason or ended.outcome}", resume)
    if ended.outcome != "completed":
        echo(f"kimi-lite: not complete ({ended.outcome}): {ended.reason}; {resume}", to_stderr=True)
    return 0


def _print_answer(ended: RunEnded) -> None:
    sys.stderr.flush()
    if ended.answer:
        echo(ended.answer)
