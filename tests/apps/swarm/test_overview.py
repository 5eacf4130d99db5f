"""What the views know of runs as the swarm really emits them."""

from pathlib import Path

import pytest

from kimi_lite.apps.swarm import journal
from kimi_lite.apps.swarm.events import AgentProgress, FileConflict, RunEnded, RunResumed
from kimi_lite.apps.swarm.overview import Overview
from kimi_lite.apps.swarm.view import called, log_line, tree
from tests.apps.swarm.scripted import Asked, Say, ScriptedBackend, assign, create, run_swarm

WRITE = ("board_write_file", {"path": "plan.md", "text": "by me"})
READ = ("board_read_file", {"path": "plan.md"})


def answer(asked: Asked) -> Say | str:
    """An orchestrator with two stages of two agents; all of them write one file, and read it where that is refused."""
    if asked.settings.is_orchestrator:
        turns = [
            Say("I divide it.", (create("writer"), assign("writer", "one"), assign("writer", "two"))),
            Say("", (assign("writer", "three"), assign("writer", "four"))),
        ]
        return turns[asked.num_said] if asked.num_said < 2 else "All is written."
    if not asked.results:
        return Say("", (WRITE,))
    if "was not written" in asked.results[-1]:
        return Say("", (READ,))
    return Say("", (WRITE,)) if len(asked.results) == 2 else f"written by {asked.prompt}"


@pytest.mark.parametrize("seed", range(4))
def test_the_sums_of_the_events_are_those_of_the_run(tmp_path: Path, seed: int) -> None:
    outcome = run_swarm(tmp_path, ScriptedBackend(answer, seed))
    overview = Overview(event for event in outcome.events if not isinstance(event, RunEnded))
    before, after = overview.totals, outcome.ended.totals
    assert (before.agents, before.steps, before.usage) == (after.agents, after.steps, after.usage)
    assert not overview.running and overview.orchestrator.num_steps == 3
    assert list(overview.stages) == [0, 1] and [len(stage.agent_ids) for stage in overview.stages.values()] == [2, 2]
    assert list(overview.critical_path) == [0, 1]
    for agent in overview.agents.values():
        num_called = sum(len(called(step.message)) for step in agent.steps.values())
        assert agent.state == "done" and agent.call is None and len(agent.calls) == num_called > 0
        assert {"reading", "generating", "tool"} <= {span.state for span in agent.spans}


@pytest.mark.parametrize("seed", range(4))
def test_a_write_over_what_another_agent_wrote_is_refused_told_and_seen(tmp_path: Path, seed: int) -> None:
    outcome = run_swarm(tmp_path, ScriptedBackend(answer, seed))
    conflicts = outcome.of(FileConflict)
    assert len(conflicts) >= 3 and {conflict.path for conflict in conflicts} == {"board/plan.md"}
    for conflict in conflicts:
        refused, writer = conflict.agents
        assert refused != writer and {refused, writer} <= {"a1", "a2", "a3", "a4"}
    told = [text for asked in outcome.backend.asked for text in asked.results if "was not written" in text]
    assert told and all("wrote it" in text and "Read it with board_read_file" in text for text in told)
    assert Overview(outcome.events).conflicts == conflicts


def test_at_any_moment_of_a_run_the_tree_shows_who_runs(tmp_path: Path) -> None:
    outcome, overview = run_swarm(tmp_path, ScriptedBackend(answer)), Overview()
    for event in outcome.events[:-1]:
        overview.take(event)
        rows = [row.plain for row in tree(overview, overview.now_s, 80, 12)]
        assert [row.split()[1] for row in rows if row.startswith(("├─", "├●"))] == [one.id for one in overview.running]
        assert (log_line(event, overview) is None) <= (
            type(event).__name__ in ("AgentProgress", "StageEnded", "AgentStep")
        )
    assert any(isinstance(event, AgentProgress) and event.priority for event in outcome.events)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_resumed_run_is_one_run(tmp_path: Path, share: float) -> None:
    whole = run_swarm(tmp_path, ScriptedBackend(answer)).ended.totals
    path = tmp_path / journal.FILE_NAME
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    run_swarm(tmp_path, ScriptedBackend(answer))
    events = journal.read(tmp_path).events
    overview = Overview(event for event in events if not isinstance(event, RunEnded))
    assert len(overview.resumed) == 1 == sum(isinstance(event, RunResumed) for event in events)
    assert list(overview.agents) == ["a1", "a2", "a3", "a4"] and not overview.running
    assert overview.totals.agents == whole.agents and overview.orchestrator.num_steps == 3
