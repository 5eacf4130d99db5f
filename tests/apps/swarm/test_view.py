"""What one sees of a run: on terminals of all sizes, in a log, with any text in any event."""

import io
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from kimi_lite.apps.swarm import view
from kimi_lite.apps.swarm.events import (
    AgentEnded,
    AgentProgress,
    AgentStarted,
    AgentStep,
    Event,
    FileConflict,
    OrchestratorStep,
    RunEnded,
    RunResumed,
    RunStarted,
    StageEnded,
    ToolEnded,
    ToolStarted,
    Totals,
    Usage,
    Warned,
)
from kimi_lite.apps.swarm.overview import Overview
from kimi_lite.apps.swarm.view import LogView, TreeView, duration, log_line, open_view, tree
from kimi_lite.terminal import Console
from tests.apps.screen import Screen
from tests.apps.swarm.made import HOSTILE, events
from tests.apps.swarm.plausible import Run

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def started(agent_id: str, t_s: float = 1.0, name: str = "writer", stage: int = 0) -> AgentStarted:
    return AgentStarted(t_s, agent_id, name, "Write.", stage, f"call-{agent_id}", "orchestrator", "key")


BEGUN = RunStarted(0.0, "run", "Compare them", {}, "0.1")


def rows(*given_events: Event, now_s: float = 10.0, width: int = 100, most: int = 20) -> list[str]:
    return [text.plain.rstrip() for text in tree(Overview(given_events), now_s, width, most)]


def logged(*given_events: Event) -> list[str]:
    out = io.StringIO()
    with LogView(Console(file=out, width=80)) as log:
        for event in given_events:
            log(event)
    return out.getvalue().splitlines()


def test_the_tree_says_what_each_agent_does() -> None:
    assert rows(
        BEGUN,
        *(started(f"a{i}") for i in range(1, 6)),
        AgentStep(2.0, "a1", 0, {"role": "assistant", "content": "x"}, Usage(100, 0, 1200)),
        AgentProgress(2.0, "a1", "generating", 100, 100, 0, 34, 6.25),
        AgentProgress(2.0, "a2", "reading", 512, 4096),
        ToolStarted(2.0, "a3", "c", "read_file", '{"path": "x"}'),
        AgentEnded(3.0, "a4", "completed", "", "done", Usage(10, 0, 100), 2),
    ) == [
        "swarm: Compare them" + 75 * " " + "10.0 s",
        "orchestrator   0 steps        0 tok  waits for 4 agents",
        "├─ a1 writer    1 step    1,234 tok  generating 34 tok 6.2 t/s",
        "├─ a2 writer   0 steps        0 tok  reading 512 / 4,096 tok",
        '├─ a3 writer   0 steps        0 tok  → read_file {"path": "x"}',
        "├─ a5 writer   0 steps        0 tok  queued",
        "└─ 1 completed · 1,334 tok 6.2 t/s",
    ]


def test_of_many_agents_the_busiest_are_shown_and_the_others_counted() -> None:
    many = [started(f"a{i}") for i in range(100)]
    busy = [AgentProgress(2.0, f"a{i}", "generating", 9, 9, 0, 1, 2.0) for i in (97, 3)]
    reading = [AgentProgress(2.0, f"a{i}", "reading") for i in range(50, 70)]
    shown = rows(BEGUN, *many, *reading, *busy, most=9)
    assert [row.split()[1] for row in shown[2:-1]] == ["a3", "a50", "a51", "a52", "a53", "a97"]
    assert shown[-1] == "└─ 94 more (16 reading, 78 queued) · 2 tok 4.0 t/s"


def test_the_agent_that_goes_first_is_marked_and_shown() -> None:
    many = [started(f"a{i}") for i in range(30)]
    first = AgentProgress(2.0, "a20", "queued", priority=900)
    others = [AgentProgress(2.0, f"a{i}", "generating", priority=i + 1) for i in range(10)]
    shown = rows(BEGUN, *many, *others, first, most=6)
    assert [row.split("  ")[0].rstrip() for row in shown[2:-1]] == ["├─ a0 writer", "├─ a1 writer", "├● a20 writer"]
    assert shown[-1].endswith("· ● goes first")
    assert "●" not in "".join(rows(BEGUN, many[0], AgentProgress(2.0, "a0", "queued", priority=9)))  # alone


def test_a_narrow_terminal_leaves_numbers_out() -> None:
    shown = rows(
        BEGUN, started("a1", name="a reviewer of everything"), AgentProgress(2, "a1", "reading", 1, 9), width=40
    )
    assert shown[1:] == ["orchestrator      waits for 1 agent", "├─ a1 a reviewe…  reading 1 / 9 tok", "└─ 0 tok"]


@settings(max_examples=60, deadline=None)
@given(
    happened=st.lists(events, max_size=25),
    width=st.integers(1, 200),
    most=st.integers(1, 12),
    is_whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_events_in_any_order_give_rows_that_fit(
    happened: list[Event], width: int, most: int, is_whole: bool, seed: int
) -> None:
    mixed = [*Run(3, 1, seed).events(is_whole), *happened]
    overview = Overview()
    for event in mixed:
        overview.take(event)
        line = log_line(event, overview)
        assert line is None or "\n" not in line.plain
    shown = tree(overview, overview.now_s, width, most)
    assert len(shown) <= most and all(row.cell_len <= width and "\n" not in row.plain for row in shown)
    assert not any(CONTROL.search(row.plain) for row in shown)
    numbers = overview.totals
    assert numbers.seconds >= 0 and numbers.sequential_s >= 0
    for agent in overview.all_agents:
        assert agent.busy_s(overview.now_s) >= 0 and all((span.end_s or 1e9) >= span.begin_s for span in agent.spans)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("is_plain", [False, True])
def test_text_of_strangers_is_harmless_on_the_terminal(text: str, is_plain: bool) -> None:
    screen = Screen(width=70, height=12)
    with open_view(screen.console, is_plain) as watched:
        for event in Run(4, 1, names=(text, "b"), text=text).events():
            watched(event)
    screen.update()
    written = screen.raw.getvalue()
    ours = re.sub(r"\x1b\[[0-9;]*[mKA]|\r", "", written)
    assert not CONTROL.search(ours)
    assert "alert(1)" not in text or "<script>alert(1)" in written  # as it is: no markup of ours
    assert all(cell_len(row) <= 70 for row in screen.text.split("\n"))


def test_what_is_over_stays_above_and_the_tree_is_gone_at_the_end() -> None:
    screen = Screen(width=100, height=14)
    with TreeView(screen.console) as watched:
        for event in Run(5, 2).events(is_whole=False):
            watched(event)
        watched(RunEnded(99.0, "completed", "All said.", Totals(10, 26, 8, Usage(1000, 200, 300), 99.0, 247.5)))
    whole = screen.text
    lines = whole.split("\n")
    assert not any(row.startswith(("├─", "└─", "swarm:")) for row in lines)
    assert sum(" · completed" in row or "limit: " in row or "looping" in row or "failed" in row for row in lines) == 10
    assert "300 generated · 99.0 s; own times add up to 4:08, 2.5 x as much" in whole.replace("\n", "")


def test_time_passes_without_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "TICK_S", 0.005)
    monkeypatch.setattr(view, "DRAW_S", 0.0)
    screen = Screen(width=60)
    with TreeView(screen.console) as watched:
        watched(BEGUN)
        before = len(screen.raw.getvalue())
        for _ in range(2000):
            if len(screen.raw.getvalue()) > before:
                break
            view.time.sleep(0.005)
    assert len(screen.raw.getvalue()) > before


def test_the_log_has_a_line_for_every_event_but_progress() -> None:
    call = {"id": "c", "function": {"name": "assign_task", "arguments": "{}"}}
    calls_two = {"content": "I ask.", "tool_calls": [call, call]}
    assert logged(
        BEGUN,
        RunResumed(0.5, "0.1"),
        OrchestratorStep(1.0, 0, calls_two, Usage()),
        started("a1"),
        AgentProgress(1.1, "a1", "queued"),
        AgentStep(1.2, "a1", 0, {"content": None, "tool_calls": [call]}, Usage()),
        ToolStarted(1.5, "a1", "c", "read_file", '{"path":\n"x"}'),
        ToolEnded(2.0, "a1", "c", "read_file", "failed", "there is no 'x'", 0.5),
        AgentStep(3.0, "a1", 1, {"content": "Done."}, Usage()),
        FileConflict(3.5, "board/x", ("a1", "a2")),
        FileConflict(3.5, "x", ("a1",)),
        AgentEnded(65.0, "a1", "step_limit", "3 steps", "x", Usage(10, 5, 1000), 3),
        StageEnded(66.0, 0, ("a1",), 4),
        Warned(70.0, "slow"),
        RunEnded(7300.0, "failed", "", Totals(2, 4, 4, Usage(9, 0, 1), 7300.0, 14600.0), "no answer"),
    ) == [
        "  0.00 s  run run: Compare them",
        "  0.50 s  resumed: 0 agents had ended",
        "  1.00 s  orchestrator step 1: calls assign_task x 2 · says I ask.",
        "  1.00 s  a1 writer begins: Write.",
        '  1.50 s  a1 → read_file {"path": "x"}',
        "  2.00 s  a1 ← read_file (0.50 s) failed: there is no 'x'",
        "  3.00 s  a1 step 2: says Done.",
        "  3.50 s  conflict: a1 was not let write board/x: a2 had written it",
        "  3.50 s  conflict: a1 was not let write x: it was changed from outside",
        "  65.0 s  a1 writer · 64.0 s, 3 steps, 1,000 tok · step limit: 3 steps",
        "  70.0 s  warning: slow",
        " 2:01:40  failed: no answer · 2 agents · 4 steps (4 critical) · 9 tok read, 1 generated · 2:01:40; "
        "own times add up to 4:03:20, 2.0 x as much",
    ]


@pytest.mark.parametrize(
    "message", [{}, {"tool_calls": None}, {"tool_calls": [3, {"function": None}, {}]}, {"content": [{"type": "text"}]}]
)
def test_messages_of_other_forms_are_shown_as_far_as_they_are_known(message: dict[str, object]) -> None:
    assert logged(OrchestratorStep(1.0, 0, message, Usage())) == ["  1.00 s  orchestrator step 1:"]


@pytest.mark.parametrize("is_plain", [False, True])
def test_no_terminal_and_plain_are_a_log(is_plain: bool) -> None:
    assert isinstance(open_view(Console(file=io.StringIO())), LogView)
    assert isinstance(open_view(Screen().console, is_plain), LogView if is_plain else TreeView)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.00 s"), (-1, "0.00 s"), (9.994, "9.99 s"), (12.34, "12.3 s"), (187, "3:07"), (3723.4, "1:02:03")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def resumed_run() -> Sequence[Event]:
    step = AgentStep(2.0, "a1", 0, {"content": "one"}, Usage(10, 0, 5))
    return [
        BEGUN,
        started("a1"),
        started("a2"),
        step,
        ToolStarted(2.5, "a1", "c", "read_file", ""),
        AgentEnded(3.0, "a2", "completed", "", "x", Usage(1, 1, 1), 1),
        RunResumed(3.0, "0.1"),
        replace(started("a1"), t_s=3.1),
        replace(step, t_s=4.0, step=1),
        AgentEnded(9.0, "a1", "completed", "", "y", Usage(20, 0, 10), 2),
    ]


def test_a_resumed_run_counts_nothing_twice() -> None:
    overview = Overview(resumed_run())
    assert list(overview.agents) == ["a1", "a2"] and len(overview.agents["a1"].steps) == 2
    assert overview.agents["a1"].call is None and overview.agents["a1"].begin_s == 1.0
    assert overview.totals.usage == Usage(21, 1, 11) and overview.totals.agents == 2
    assert overview.critical_path == {0: "a1"}
