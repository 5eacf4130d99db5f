"""A run's timeline as SVG: a row for each agent, its states as bars over the seconds, the critical path marked.

The picture is complete in itself: no script, no style sheet, no link. Whatever an agent is called is text in it.
"""

from collections.abc import Iterator
from html import escape
from itertools import count

from rich.cells import cell_len, set_cell_size

from kimi_lite.apps.swarm.events import ORCHESTRATOR, State
from kimi_lite.apps.swarm.overview import Agent, Overview, Span
from kimi_lite.apps.swarm.view import CRITICAL_PATH, duration, outcome_name
from kimi_lite.units import one_line

COLOURS: dict[State, str] = {"queued": "#d5d9e0", "reading": "#5b8dd9", "generating": "#43a871", "tool": "#e0a02f"}
_WIDTH, _LEFT, _RIGHT, _TOP = 960, 220, 110, 46  # pixels
_ROW, _BAR = 20, 12
_LABEL_CELLS = 30
_BAD, _MARK, _INK, _PALE = "#c0392b", "#b03060", "#222222", "#667085"
_MOST_TICKS = 10
_WAITING: tuple[State, ...] = ("queued", "tool")  # of the orchestrator: its tools are the agents


def timeline(overview: Overview) -> str:
    """The SVG, whole, as a file or in a page."""
    agents = overview.all_agents
    end_s = max(overview.now_s, 1e-3)
    height = _TOP + _ROW * len(agents) + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="timeline of the run">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        *_axis(end_s, height),
        *_stages(overview, end_s),
    ]
    critical = set(overview.critical_path.values())
    for number, agent in enumerate(agents):
        parts += _row(agent, number, end_s, is_critical=agent.id in critical)
    parts += _marks(overview, end_s, height)
    return "\n".join([*parts, *_legend(height), "</svg>", ""])


def _axis(end_s: float, height: int) -> Iterator[str]:
    step = tick_step(end_s)
    for i in count():
        if i * step > end_s:
            return
        x = _x(i * step, end_s)
        yield f'<line x1="{x}" y1="{_TOP - 6}" x2="{x}" y2="{height - 40}" stroke="#e4e7ec"/>'
        yield _text(x, _TOP - 12, _tick_label(i * step), fill=_PALE, anchor="middle")


def tick_step(end_s: float) -> float:
    """Seconds between two ticks: 1, 2 or 5 times a power of ten, or whole minutes and hours."""
    steps = [m * 10.0**e for e in range(-4, 1) for m in (1, 2, 5)]
    steps += [10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200]
    return next((step for step in steps if end_s / step <= _MOST_TICKS), end_s / _MOST_TICKS)


def _tick_label(t_s: float) -> str:
    return f"{t_s:g} s" if t_s < 100 else duration(t_s)


def _stages(overview: Overview, end_s: float) -> Iterator[str]:
    """What belongs together, from its beginning to its end."""
    for stage in overview.stages.values():
        begin, end = _x(stage.begin_s, end_s), _x(stage.ended.t_s if stage.ended is not None else end_s, end_s)
        height = _ROW * (len(overview.agents) + 1)
        yield (
            f'<rect x="{begin}" y="{_TOP}" width="{max(end - begin, 0):.1f}" height="{height}" fill="#f2f4f7"/>'
            + _text(begin + 3, 14, f"stage {stage.index + 1}", fill=_PALE)
        )


def _row(agent: Agent, number: int, end_s: float, is_critical: bool) -> Iterator[str]:
    y = _TOP + _ROW * number
    mark = f' font-weight="bold" fill="{_MARK}"' if is_critical else f' fill="{_INK}"'
    yield f'<text x="8" y="{y + 14}"{mark}>{_shown("● " * is_critical + _cut(agent.label))}</text>'
    for span in agent.spans:
        yield _bar(agent, span, y, end_s, is_critical, is_thin=agent.id == ORCHESTRATOR and span.state in _WAITING)
    if agent.ended is not None:
        x, outcome = _x(agent.ended.t_s, end_s), agent.ended.outcome
        is_good = outcome == "completed"
        text = "" if is_good else outcome_name(outcome)
        yield _text(x + 4, y + 14, "✓" if is_good else f"✗ {text}", fill="#43a871" if is_good else _BAD)


def _bar(agent: Agent, span: Span, y: int, end_s: float, is_critical: bool, is_thin: bool) -> str:
    last_s = end_s if span.end_s is None else span.end_s
    x, width = _x(span.begin_s, end_s), max(_x(last_s, end_s) - _x(span.begin_s, end_s), 0.5)
    outline = f' stroke="{_MARK}" stroke-width="1.5"' if is_critical and span.state != "queued" else ""
    title = f"{agent.id}: {span.state}, {duration(span.begin_s)} to {duration(last_s)}"
    height, colour = (2, COLOURS["queued"]) if is_thin else (_BAR, COLOURS.get(span.state, _PALE))
    return (
        f'<rect x="{x}" y="{y + (_ROW - height) // 2}" width="{width:.1f}" height="{height}" '
        f'fill="{colour}"{outline}><title>{_shown(title)}</title></rect>'
    )


def _marks(overview: Overview, end_s: float, height: int) -> Iterator[str]:
    """Where the run was resumed, and where a write was refused."""
    for resumed in overview.resumed:
        x = _x(resumed.t_s, end_s)
        yield f'<line x1="{x}" y1="{_TOP}" x2="{x}" y2="{height - 40}" stroke="{_BAD}" stroke-dasharray="4 3"/>'
        yield _text(x + 3, height - 42, "resumed", fill=_BAD)
    numbers = {agent.id: number for number, agent in enumerate(overview.all_agents)}
    for conflict in overview.conflicts:
        number = numbers.get(conflict.agents[0] if conflict.agents else "")
        if number is not None:
            x, y = _x(conflict.t_s, end_s), _TOP + _ROW * number + _ROW // 2
            title = f"<title>{_shown(f'write refused: {conflict.path}')}</title>"
            yield f'<path d="M{x} {y - 7}l6 7l-6 7l-6 -7z" fill="{_BAD}" stroke="#ffffff">{title}</path>'


def _legend(height: int) -> Iterator[str]:
    x, y = 8, height - 18
    for state, colour in COLOURS.items():
        yield f'<rect x="{x}" y="{y - 10}" width="{_BAR}" height="{_BAR}" fill="{colour}"/>' + _text(x + 18, y, state)
        x += 88
    yield _text(x, y, f"● {CRITICAL_PATH}", fill=_MARK)
    yield _text(x + 330, y, "◆ a write was refused", fill=_BAD)


def _x(t_s: float, end_s: float) -> float:
    share = min(max(t_s / end_s, 0.0), 1.0)
    return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)


def _text(x: float, y: float, text: str, fill: str = _INK, anchor: str = "start") -> str:
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" fill="{fill}"{where}>{_shown(text)}</text>'


def _shown(text: str) -> str:
    return escape(one_line(text, 200))


def _cut(text: str) -> str:
    text = one_line(text, 4 * _LABEL_CELLS)
    return text if cell_len(text) <= _LABEL_CELLS else set_cell_size(text, _LABEL_CELLS - 1) + "…"
