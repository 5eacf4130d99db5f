"""What became of a run, for people: `kimi-lite swarm show RUN` and `kimi-lite swarm list`.

On a terminal the task, who did what and when, what went wrong, the totals and the answer; `--svg FILE` writes the
timeline, `--html FILE` a page with all of it and every agent's work.
"""

from datetime import datetime
from pathlib import Path

from rich.table import Table
from rich.text import Text

from kimi_lite.apps.swarm import journal
from kimi_lite.apps.swarm.board import BOARD
from kimi_lite.apps.swarm.events import Usage
from kimi_lite.apps.swarm.journal import Recorded
from kimi_lite.apps.swarm.overview import Agent, Overview
from kimi_lite.apps.swarm.page import page
from kimi_lite.apps.swarm.runs import RunStore, RunSummary, summarise
from kimi_lite.apps.swarm.timeline import timeline
from kimi_lite.apps.swarm.view import CRITICAL_PATH, conflict, duration, outcome_name, totals
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import require_writable, whole_file
from kimi_lite.terminal import Console, echo, show_plain, width
from kimi_lite.units import counted, one_line

_COLUMNS = (  # of the table, for wide terminals and narrower ones
    ("agent", "stage", "outcome", "began", "took", "steps", "tokens read", "generated"),
    ("agent", "outcome", "took", "steps", "generated"),
    ("agent", "outcome", "took"),
)
_MOST_FILES = 50  # of the board, that are named
_GAP, _LEAST_NAME = 2, 24  # cells between columns; of a name, before columns are left out


def show_run(beginning: str, svg: Path | None = None, html: Path | None = None) -> None:
    """The report of the run whose id begins so (the last run's, for ""); to files where they are named. KimiLiteError
    where there is no such run."""
    for path, what in ((svg, "The timeline"), (html, "The page")):
        if path is not None:
            require_writable(path, what)
    folder = RunStore().find(beginning)
    recorded, summary = journal.read(folder), summarise(folder)
    overview = Overview(recorded.events)
    if svg is not None:
        _write(svg, timeline(overview), "timeline")
    if html is not None:
        _write(html, page(summary, overview, problems(recorded)), "page")
    if svg is None and html is None:
        print_report(Console(width=width()), summary, overview, problems(recorded))
        board = folder / BOARD
        files = sorted(str(path.relative_to(board)) for path in board.rglob("*") if path.is_file())
        if files:
            echo(f"\nThe board has {counted(len(files), 'file')}, in {board}:")
            echo("\n".join(one_line(name, 200) for name in files[:_MOST_FILES]))


def list_runs() -> None:
    """A line for each run, the last first."""
    found = RunStore().summaries()
    if not found:
        echo(f"There is no run in {RunStore().folder}.", to_stderr=True)
        return
    console, wide = Console(width=width()), width()
    for one in found:
        when = datetime.fromtimestamp(one.updated_s).strftime("%d %b %H:%M")
        line = Text(one.run_id).append(f"  {when}  ", "dim").append(f"{state_of(one):<11}", _style_of(one))
        line.append(f"  {one_line(one.task, wide)}", "dim")
        line.truncate(wide, overflow="ellipsis")
        console.print(line, soft_wrap=True, highlight=False)


def delete_runs(beginnings: list[str]) -> None:
    """Remove runs with their boards; KimiLiteError, before anything is removed, where one is not there or goes on."""
    store = RunStore()
    folders = [store.find(beginning) for beginning in beginnings]
    going_on = [folder.name for folder in folders if journal.is_running(folder)]
    if going_on:
        raise KimiLiteError(f"The run {', '.join(going_on)} is going on.", "Stop it first; nothing was deleted.")
    for folder in dict.fromkeys(folders):
        store.delete(folder)
        echo(f"deleted {folder.name}", to_stderr=True)


def state_of(one: RunSummary) -> str:
    """`completed`, `step limit`; `running`, `interrupted`, `damaged`"""
    if one.state != "finished" or one.ended is None:
        return one.state
    return outcome_name(one.ended.outcome)


def problems(recorded: Recorded) -> list[str]:
    """What the journal did not tell."""
    found = []
    if recorded.damaged:
        numbers = ", ".join(map(str, recorded.damaged[:9]))
        found.append(f"{counted(len(recorded.damaged), 'line')} of the journal damaged and left out: {numbers}")
    if recorded.num_unknown:
        found.append(f"{counted(recorded.num_unknown, 'event')} of a newer version left out; update kimi-lite")
    return found


def print_report(console: Console, summary: RunSummary, overview: Overview, journal_problems: list[str]) -> None:
    """All of it, on one console."""
    head = Text(summary.run_id, "bold").append("  ").append(state_of(summary), _style_of(summary))
    if overview.ended is not None and overview.ended.reason:
        head.append(f": {one_line(overview.ended.reason, 400)}")
    console.print(head, highlight=False)
    _print_part(console, "Task", overview.started.task if overview.started is not None else summary.task)
    if overview.agents:
        show_plain(console, "")
        console.print(_table(overview, console.width))
        if overview.critical_path:
            show_plain(console, f"● {CRITICAL_PATH}", style="dim")
    wrong = went_wrong(overview) + journal_problems
    if wrong:
        show_plain(console, "\nWhat went wrong", style="bold")
        for line in wrong:
            show_plain(console, f"- {one_line(line, 2000)}")
    show_plain(console, f"\n{totals(overview.totals)}")
    if overview.ended is not None:
        _print_part(console, "Answer", overview.ended.answer)
    elif summary.state == "interrupted":
        show_plain(console, f"\nIt can go on: kimi-lite swarm resume {summary.run_id}", style="dim")


def went_wrong(overview: Overview) -> list[str]:
    """Agents that did not complete and why, conflicts, warnings."""
    ends = [agent for agent in overview.agents.values() if agent.ended is not None]
    failed = [agent for agent in ends if agent.ended.outcome != "completed"]
    return [
        *(f"{agent.label}: {outcome_name(agent.ended.outcome)}: {agent.ended.reason}" for agent in failed),
        *(f"{duration(one.t_s)}: {conflict(one)}" for one in overview.conflicts),
        *(f"{duration(one.t_s)}: {one.text}" for one in overview.warnings),
    ]


def _table(overview: Overview, columns: int) -> Table:
    """An agent a row. Numbers are never cut: narrow terminals get fewer columns."""
    critical = set(overview.critical_path.values())
    rows = [_row(agent, overview, is_critical=agent.id in critical) for agent in overview.all_agents]
    for names in _COLUMNS:
        widths = {name: max(len(name), *(row[name].cell_len for row in rows)) for name in names}
        left = columns - sum(width + _GAP for name, width in widths.items() if name != "agent")
        if left >= min(widths["agent"], _LEAST_NAME):
            break
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
    for name in names:
        table.add_column(name, justify="left" if name in ("agent", "outcome") else "right", no_wrap=True)
    for row in rows:
        row["agent"].truncate(max(left - _GAP, 1), overflow="ellipsis")
        table.add_row(*(row[name] for name in names))
    return table


def _row(agent: Agent, overview: Overview, is_critical: bool) -> dict[str, Text]:
    """By the names of columns."""
    is_agent = agent is not overview.orchestrator
    end_s = agent.ended.t_s if agent.ended is not None else overview.now_s
    what = "" if not is_agent else agent.state if agent.ended is None else outcome_name(agent.ended.outcome)
    is_bad = agent.ended is not None and agent.ended.outcome != "completed"
    used = agent.usage
    return {
        "agent": Text("● " if is_critical else "  ", "magenta").append(one_line(agent.label, 40)),
        "stage": Text(str(agent.started.stage + 1) if agent.started is not None else ""),
        "outcome": Text(what, "red" if is_bad else ""),
        "began": Text(duration(agent.begin_s)),
        "took": Text(duration(end_s - agent.begin_s)),
        "steps": Text(f"{agent.num_steps:,}"),
        "tokens read": Text(f"{used.prompt_tokens:,}{cached_share(used)}"),
        "generated": Text(f"{used.generated_tokens:,}"),
    }


def cached_share(used: Usage) -> str:
    """` (33 % cached)`, or nothing."""
    if not used.cached_tokens or not used.prompt_tokens:
        return ""
    return f" ({100 * used.cached_tokens / used.prompt_tokens:.0f} % cached)"


def _print_part(console: Console, name: str, text: str) -> None:
    """A heading and a text of many lines, as it is."""
    show_plain(console, f"\n{name}", style="bold")
    show_plain(console, text.strip() or "(none)")


def _style_of(one: RunSummary) -> str:
    is_good = one.ended is not None and one.ended.outcome == "completed"
    return (
        "green" if is_good else "cyan" if one.state == "running" else "yellow" if one.state == "interrupted" else "red"
    )


def _write(path: Path, text: str, what: str) -> None:
    with whole_file(path) as file:
        file.write(text)
    echo(f"{what} written to {path}", to_stderr=True)
