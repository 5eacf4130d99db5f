"""A run as one watches it: a tree that changes on a terminal, or lines that are only ever added.

    with open_view(console) as view:  # a listener of events
        ...

On a terminal what is over stays as a line (an agent's end, what the orchestrator says, a conflict) and below the tree
shows what runs: the busiest agents, as many as fit, and the others counted. Where the cursor cannot be moved, and with
`is_plain`, every event but progress is a line.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from kimi_lite.apps.markdown.live import LiveRows
from kimi_lite.apps.markdown.rows import Row
from kimi_lite.apps.swarm.events import (
    ORCHESTRATOR,
    AgentCreated,
    AgentEnded,
    AgentStarted,
    AgentStep,
    Event,
    FileConflict,
    OrchestratorStep,
    RunEnded,
    RunResumed,
    RunStarted,
    StageStarted,
    State,
    ToolEnded,
    ToolStarted,
    Totals,
    Usage,
    Warned,
)
from kimi_lite.apps.swarm.overview import Agent, Overview
from kimi_lite.terminal import Console, can_redraw
from kimi_lite.units import counted, one_line

LONGEST_LINE = 200  # characters of a line that is added, where no terminal says how wide it is
DRAW_S = 0.1  # between two drawings; more often than that cannot be read
TICK_S = 0.25  # without events: for the seconds that pass
MOST_ROWS = 30  # of the tree, on a high screen

_BUSIEST: tuple[State, ...] = ("generating", "tool", "reading", "queued", "done")
STYLES: Mapping[State, str] = {"queued": "dim", "reading": "blue", "generating": "green", "tool": "yellow", "done": ""}
CRITICAL_PATH = "critical path: the agent that each stage waited for"
OUTCOMES = {
    "completed": "completed",
    "failed": "failed",
    "step_limit": "step limit",
    "token_limit": "token limit",
    "time_limit": "time limit",
    "looping": "looping",
    "cancelled": "stopped",
}


class View(Protocol):
    """A listener that shows what it hears."""

    def __call__(self, event: Event) -> None: ...

    def __enter__(self) -> "View": ...

    def __exit__(self, *exception: object) -> None: ...


def open_view(console: Console, is_plain: bool = False, recorded: Iterable[Event] = ()) -> View:
    """`recorded`: what a run that is resumed has behind it; it is known, and not shown again."""
    kind = TreeView if can_redraw(console) and not is_plain else LogView
    return kind(console, recorded)


class LogView:
    """Adds a line for every event but progress."""

    def __init__(self, console: Console, recorded: Iterable[Event] = ()) -> None:
        self._console, self._overview, self._lock = console, Overview(recorded), threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._overview.take(event)
            line = log_line(event, self._overview)
            if line is not None:
                _print(self._console, line, LONGEST_LINE)

    def __enter__(self) -> "LogView":
        return self

    def __exit__(self, *exception: object) -> None: ...


class TreeView:
    """The tree, below the lines of what is over. A thread shows that time passes."""

    def __init__(self, console: Console, recorded: Iterable[Event] = ()) -> None:
        self._console, self._overview, self._lock = console, Overview(recorded), threading.Lock()
        self._live = LiveRows(console, MOST_ROWS)
        self._is_over = threading.Event()
        self._clock_s = self._drawn_s = time.monotonic()  # of the last event; of the last drawing
        self._ticker = threading.Thread(target=self._tick, name="swarm view", daemon=True)

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._overview.take(event)
            self._clock_s = time.monotonic()
            line = log_line(event, self._overview) if _stays(event) else None
            with self._console:  # one write
                if line is not None:
                    self._live.erase()
                    is_whole = isinstance(event, AgentEnded | FileConflict | Warned | RunEnded)  # why it went wrong
                    _print(self._console, line, 2 * LONGEST_LINE if is_whole else self._console.width)
                if line is not None or self._clock_s - self._drawn_s >= DRAW_S:
                    self._draw()

    def __enter__(self) -> "TreeView":
        self._ticker.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._ticker.join()
        with self._lock:
            self._live.erase()

    def _tick(self) -> None:
        while not self._is_over.wait(TICK_S):
            with self._lock:
                if time.monotonic() - self._drawn_s >= DRAW_S and not self._is_over.is_set():
                    self._draw()

    def _draw(self) -> None:
        self._drawn_s = time.monotonic()
        if self._overview.started is None or self._overview.ended is not None:
            self._live.erase()
            return
        now_s = self._overview.now_s + self._drawn_s - self._clock_s
        width, most = self._console.width, self._live.limit
        self._live.next_draw_s = 0.0  # DRAW_S is its limit
        self._live.draw(lambda: [self._row(text) for text in tree(self._overview, now_s, width, most)])

    def _row(self, text: Text) -> Row:
        return [segment for segment in text.render(self._console, end="") if segment.text]


def tree(overview: Overview, now_s: float, width: int, most_rows: int) -> list[Text]:
    """The run as it is, in at most so many rows of at most `width` cells: the task, the orchestrator, the agents that
    run, and what is counted only."""
    task = overview.started.task if overview.started is not None else ""
    seconds = f" {duration(now_s)}"
    head = _fitted(f"swarm: {one_line(task, 4 * width)}", width - len(seconds))
    first = overview.first
    shown, others = _chosen(overview.running, first, most_rows - 3)
    name_width = min(
        max([len(ORCHESTRATOR) - 3, *(cell_len(one_line(agent.label, 80)) for agent in shown)]), max(width // 3, 8)
    )
    rows = [
        Text(set_cell_size(head, width - len(seconds)), "bold").append(seconds, "dim"),
        _agent_row(overview.orchestrator, "", name_width + 3, width, _waits_for(overview)),
        *(_agent_row(agent, "├● " if agent is first else "├─ ", name_width, width) for agent in shown),
        Text(_fitted("└─ " + " · ".join([*_counts(overview, others), *["● goes first"] * bool(first)]), width), "dim"),
    ]
    for row in rows:
        row.truncate(width)
    return rows[-max(most_rows, 1) :]


def _chosen(running: list[Agent], first: Agent | None, most: int) -> tuple[list[Agent], list[Agent]]:
    """The first and the busiest, in the order of their start; and the others."""

    def place(i: int) -> tuple[bool, int, int]:
        return running[i] is not first, _BUSIEST.index(running[i].state), i

    shown = set(sorted(range(len(running)), key=place)[: max(most, 0)])
    return [running[i] for i in sorted(shown)], [agent for i, agent in enumerate(running) if i not in shown]


def _agent_row(agent: Agent, branch: str, name_width: int, width: int, idle: str = "") -> Text:
    """`├─ a3 researcher   step 2   1,204 tok   generating 212 tok 6.2 t/s`; narrow ones leave the middle out."""
    style = STYLES[agent.state]
    row = Text(f"{branch}", "dim").append(
        set_cell_size(_fitted(one_line(agent.label, 4 * width), name_width), name_width)
    )
    if width >= 72:
        row.append(f"  {counted(agent.num_steps, 'step'):>8}  {agent.num_generated:>7,} tok", "dim")
    row.append("  ")
    row.append(_fitted(idle if idle else _doing(agent), max(width - row.cell_len, 0)), style)
    return row


def _waits_for(overview: Overview) -> str:
    """Of the orchestrator, while agents run."""
    is_idle = overview.orchestrator.state not in ("reading", "generating")
    return f"waits for {counted(len(overview.running), 'agent')}" if is_idle and overview.running else ""


def _doing(agent: Agent) -> str:
    """What it is at, with numbers where there are any."""
    progress, call = agent.progress, agent.call
    if agent.state == "tool" and call is not None:
        return f"→ {one_line(f'{call.started.tool} {call.started.arguments}', LONGEST_LINE)}"
    if progress is None or agent.state != progress.state:
        return agent.state
    if agent.state == "reading" and progress.prompt_tokens:
        return f"reading {progress.prompt_tokens_done:,} / {progress.prompt_tokens:,} tok"
    if agent.state == "generating":
        speed = f" {progress.decode_tok_s:,.1f} t/s" if progress.decode_tok_s else ""
        return f"generating {progress.generated_tokens:,} tok{speed}"
    return agent.state


def _counts(overview: Overview, others: list[Agent]) -> list[str]:
    """What the tree does not name, and the run's sums."""
    parts = []
    if others:
        states = Counter(agent.state for agent in others)
        parts.append(f"{len(others):,} more ({', '.join(f'{states[s]:,} {s}' for s in _BUSIEST if states[s])})")
    ends = Counter(agent.ended.outcome for agent in overview.agents.values() if agent.ended is not None)
    parts += [f"{num:,} {outcome_name(outcome)}" for outcome, num in sorted(ends.items())]
    generating = [agent.progress for agent in overview.all_agents if agent.state == "generating" and agent.progress]
    speed = sum(progress.decode_tok_s or 0.0 for progress in generating)
    num_generated = sum(agent.num_generated for agent in overview.all_agents)
    parts.append(f"{num_generated:,} tok" + (f" {speed:,.1f} t/s" if speed else ""))
    return parts


def _stays(event: Event) -> bool:
    """Whether the line of it stays above the tree: all but what the tree shows."""
    return not isinstance(event, ToolStarted | ToolEnded | AgentStep | AgentStarted)


def log_line(event: Event, overview: Overview) -> Text | None:
    """The line of an event; None where it has none. `overview` knows the event already."""
    told = _told(event, overview)
    if told is None:
        return None
    text, style = told
    return Text(f"{duration(event.t_s):>8}  ", "dim").append(one_line(text, 2 * LONGEST_LINE), style)


def _told(event: Event, overview: Overview) -> tuple[str, str] | None:
    """What a line says, and how it looks."""
    match event:
        case RunStarted():
            return f"run {event.run_id}: {event.task}", "bold"
        case RunResumed():
            num_ended = sum(agent.ended is not None for agent in overview.agents.values())
            return f"resumed: {counted(num_ended, 'agent')} had ended", "bold"
        case StageStarted():
            return f"stage {event.index + 1}: {counted(len(event.agents), 'agent')}", "bold"
        case AgentCreated():
            return f"new kind of agent: {event.name}: {event.system_prompt}", "dim"
        case AgentStarted():
            return f"{event.agent_id} {event.name} begins: {event.prompt}", ""
        case AgentStep():
            only_calls = called(event.message) and not event.message.get("content")  # the tools' lines tell it
            return None if only_calls else (f"{event.agent_id} {_step(event)}", "dim")
        case OrchestratorStep():
            return f"{ORCHESTRATOR} {_step(event)}", ""
        case ToolStarted():
            return f"{event.agent_id} → {event.tool} {event.arguments}", "dim"
        case ToolEnded():
            result = event.result if event.outcome == "completed" else f"{event.outcome}: {event.result}"
            style = "red" if event.outcome == "failed" else "dim"
            return f"{event.agent_id} ← {event.tool} ({duration(event.seconds)}) {result}", style
        case FileConflict():
            return conflict(event), "yellow"
        case AgentEnded():
            return _ended(event, overview.agent(event.agent_id)), "green" if event.outcome == "completed" else "red"
        case Warned():
            return f"warning: {event.text}", "yellow"
        case RunEnded():
            reason = f": {event.reason}" if event.reason else ""
            what = outcome_name(event.outcome)
            return f"{what}{reason} · {totals(event.totals)}", "bold" if event.outcome == "completed" else "bold red"
    return None


def _step(event: AgentStep | OrchestratorStep) -> str:
    """`step 2: calls assign_task x 3, read_result · says ...`"""
    calls = Counter(name for name, _ in called(event.message))
    names = ", ".join(name if num == 1 else f"{name} x {num}" for name, num in calls.items())
    content = event.message.get("content")
    says = f"says {content}" if isinstance(content, str) and content.strip() else ""
    return f"step {event.step + 1}: " + " · ".join(filter(None, [names and f"calls {names}", says or event.error]))


def _ended(event: AgentEnded, agent: Agent) -> str:
    what = outcome_name(event.outcome) + (f": {event.reason}" if event.reason else "")
    amount = f"{counted(event.steps, 'step')}, {event.usage.generated_tokens:,} tok"
    return f"{agent.label} · {duration(event.t_s - agent.begin_s)}, {amount} · {what}"


def called(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The calls of a message as (tool, arguments), as far as it has the form that it should have."""
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [(str(one.get("name")), str(one.get("arguments") or "")) for one in functions if isinstance(one, dict)]


def outcome_name(outcome: str) -> str:
    """`step limit`; what only a newer version knows, as it is written."""
    return OUTCOMES.get(outcome, one_line(outcome, 20))


def conflict(event: FileConflict) -> str:
    """A sentence on it."""
    refused, *writers = event.agents or ("an agent",)
    by = f"{writers[0]} had written it" if writers else "it was changed from outside"
    return f"conflict: {refused} was not let write {event.path}: {by}"


def totals(of: Totals) -> str:
    """`8 agents · 24 steps (9 critical) · 12,345 tok read ... · 41.0 s; own times add up to 1:43, 2.5 x as much`"""
    own = ""
    if of.speed_up is not None and of.agents > 1:
        own = f"; own times add up to {duration(of.sequential_s)}, {of.speed_up:.1f} x as much"
    steps = f"{counted(of.steps, 'step')} ({of.critical_steps:,} critical)"
    return " · ".join([counted(of.agents, "agent"), steps, usage(of.usage), duration(of.seconds) + own])


def usage(of: Usage) -> str:
    """`12,000 tok read (8,000 cached), 345 generated`"""
    cached = f" ({of.cached_tokens:,} cached)" if of.cached_tokens else ""
    return f"{of.prompt_tokens:,} tok read{cached}, {of.generated_tokens:,} generated"


def duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `3:07`, `1:02:03`"""
    if seconds < 10:
        return f"{max(seconds, 0.0):.2f} s"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _fitted(text: str, cells: int) -> str:
    """At most so many cells; the last is `…` where some are missing."""
    if cell_len(text) <= cells:
        return text
    return set_cell_size(text, max(cells - 1, 0)).rstrip() + "…" * (cells > 0)


def _print(console: Console, line: Text, most: int) -> None:
    """One line, cut where it would be longer."""
    line.truncate(most, overflow="ellipsis")
    console.print(line, soft_wrap=True, highlight=False)
