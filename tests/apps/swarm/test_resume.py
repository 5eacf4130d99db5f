"""A run that was killed goes on: what its journal knows is not done again, wherever it ends."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_lite.apps.swarm.events import (
    AgentEnded,
    AgentStarted,
    AgentStep,
    OrchestratorStep,
    RunEnded,
    RunResumed,
    ToolEnded,
    Warned,
)
from kimi_lite.apps.swarm.journal import FILE_NAME, read
from kimi_lite.apps.swarm.permissions import Permissions
from kimi_lite.apps.swarm.plan_file import Plan
from kimi_lite.apps.swarm.settings import Limits, SwarmSettings
from kimi_lite.errors import KimiLiteError
from tests.apps.swarm.scripted import Asked, Say, ScriptedBackend, assign, create, run_swarm

PERMISSIONS = Permissions.from_tables({"default": {"tools": ["board_*"]}}, "test")
SETTINGS = SwarmSettings(max_depth=2, max_parallel=2, result_chars=50, fuller_below=30, agent=Limits(steps=4))


@pytest.fixture(autouse=True, scope="module")
def _no_fsync() -> Iterator[None]:
    """What a kill leaves does not depend on it; only a power cut's does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kimi_lite.apps.swarm.journal.os.fsync", lambda file: None)
        yield


def answer(asked: Asked) -> Say | str:
    """Stages, agents with tools, one that starts another, failures, a follow-up, an own tool of the orchestrator."""
    if asked.settings.is_orchestrator:
        log = ("board_append_file", {"path": "log", "text": "main\n"})
        return (
            Say("I divide it.", (create("a", "You work."), assign("a", "plain"), assign("a", "writes"))),
            Say("", (assign("a", "leads"), log, assign("a", "fails"))),
            Say("", (("agent_swarm", {"agent": "a", "prompt_template": "{{item}}", "items": ["plain", "loops"]}),)),
            Say("", (("read_result", {"reference": "a1", "offset": 10}), assign("nobody", "x"))),
            "the answer after " + str(len(asked.results)),
        )[asked.num_said]
    if asked.prompt == "writes":
        if asked.num_said < 2:
            line = {"path": "log", "text": f"{asked.agent_id} {asked.num_said}\n"}
            return Say("", (("board_append_file", line),))
        return "short" if asked.num_said == 2 else "a longer report of what was done here"
    if asked.prompt == "leads":
        starts = Say("", (assign("a", "writes"),))
        return f"it was led to: {asked.last} and more words than thirty" if asked.num_said else starts
    if asked.prompt == "fails":
        return Say(failure=KimiLiteError("no luck"))
    if asked.prompt == "loops":
        return Say("", (("board_list_files", {}),))
    return "a plain answer that is longer than the fifty characters which the orchestrator gets at once"


def run(folder: Path, seed: int = 0, **more):
    return run_swarm(folder, ScriptedBackend(answer, seed), settings=SETTINGS, permissions=PERMISSIONS, **more)


def told(outcome) -> str:
    """All that the orchestrator said and was told, but for sizes: a cut journal has no board."""
    return re.sub(r"\d+ lines?, \d+ bytes", "", json.dumps(outcome.backend.asked[-1].messages))


def log_of(folder: Path) -> Counter[str]:
    path = folder / "board" / "log"
    return Counter(path.read_text().splitlines() if path.exists() else [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, and the bytes of its journal."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = run(folder)
    assert outcome.ended.outcome == "completed"
    assert {event.outcome for event in outcome.of(AgentEnded)} == {"completed", "failed", "step_limit"}
    assert set(log_of(folder)) == {"main", "a2 0", "a2 1", "a3.1 0", "a3.1 1"}
    return outcome, (folder / FILE_NAME).read_bytes()


def cuts(data: bytes, seed: int) -> list[int]:
    """After every line but those of progress, and somewhere inside every fourth."""
    chance, ends, end = random.Random(seed), [], 0
    for line in data.splitlines(keepends=True):
        end += len(line)
        ends += [] if b"AgentProgress" in line else [end]
    return sorted({0, *ends, *(chance.randrange(1, end) for end in ends[::4])})


def test_a_journal_cut_anywhere_is_gone_on_with_and_nothing_in_it_is_done_again(whole, tmp_path: Path) -> None:
    reference, data = whole
    for cut in cuts(data, 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / FILE_NAME).write_bytes(data[:cut])
        before = read(folder).events
        outcome = run(folder, seed=cut)
        known = {(event.agent_id, event.step) for event in before if isinstance(event, AgentStep)}
        known |= {("orchestrator", event.step) for event in before if isinstance(event, OrchestratorStep)}
        ended = {event.agent_id for event in before if isinstance(event, AgentEnded)}
        calls = {(event.agent_id, event.call_id) for event in before if isinstance(event, ToolEnded)}
        asked = {(asked.agent_id, asked.num_said) for asked in outcome.backend.asked}
        assert not asked & known, cut
        assert not {name for name, _ in asked} & ended, cut
        assert not {event.agent_id for event in outcome.of(AgentEnded)} & ended, cut
        assert not {(event.agent_id, event.call_id) for event in outcome.of(ToolEnded)} & calls, cut
        assert outcome.ended.outcome == "completed"
        assert outcome.ended.answer == reference.ended.answer, cut
        assert outcome.ended.totals.usage == reference.ended.totals.usage, cut
        assert (outcome.ended.totals.steps, outcome.ended.totals.critical_steps) == (
            reference.ended.totals.steps,
            reference.ended.totals.critical_steps,
        ), cut
        if outcome.backend.asked and outcome.backend.asked[-1].settings.is_orchestrator:
            assert told(outcome) == told(reference), cut
        assert outcome.ended.totals.agents == reference.ended.totals.agents, cut
        assert max(log_of(folder).values(), default=0) <= 1


def test_thirty_real_kills_and_nothing_is_done_twice(tmp_path: Path) -> None:
    """A process that kills itself (SIGKILL) at chosen events, again and again until its run is done; `killed` checks
    every journal."""
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "tests.apps.swarm.killed", str(tmp_path), "30"]
    environment = os.environ | {"PYTHONPATH": str(root), "KIMI_LITE_STATE": str(tmp_path / "state")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["kills"] >= 30


def test_a_run_that_was_stopped_goes_on_and_repeats_only_what_was_not_done(tmp_path: Path) -> None:
    def first(asked: Asked) -> Say | str:
        if not asked.settings.may_call:
            return "what is there"
        slow = asked.agent_id == "a2" and asked.num_said == 1
        return Say("half", hangs=True) if slow else answer(asked)

    backend = ScriptedBackend(first)
    outcome = run_swarm(
        tmp_path,
        backend,
        settings=SETTINGS,
        permissions=PERMISSIONS,
        on_event=lambda run, event: setattr(backend, "on_hang", run.stop),
    )
    assert (outcome.ended.outcome, outcome.ended.answer) == ("cancelled", "what is there")
    again = run(tmp_path)
    assert (again.ended.outcome, again.ended.answer) == ("completed", "the answer after 9")
    asked = [(asked.agent_id, asked.num_said) for asked in again.backend.asked]
    assert ("a1", 0) not in asked
    assert ("a2", 0) not in asked
    assert asked[0] == ("a2", 1)
    assert len(again.of(RunResumed)) == 1
    assert max(log_of(tmp_path).values()) == 1


def test_what_is_determined_otherwise_now_is_asked_again_and_so_is_what_followed_from_it(tmp_path: Path) -> None:
    run(tmp_path)

    def otherwise(asked: Asked) -> Say | str:
        is_same = asked.settings.is_orchestrator or asked.prompt != "plain"
        return answer(asked) if is_same else "otherwise " * 9

    changed = ScriptedBackend(otherwise)
    changed.identity = "another model"
    outcome = run_swarm(tmp_path, changed, settings=SETTINGS, permissions=PERMISSIONS)
    assert outcome.ended.outcome == "completed"
    assert [event.agent_id for event in outcome.of(AgentStarted)][:2] == ["a1", "a2"]
    asked = [(asked.agent_id, asked.num_said) for asked in changed.asked]
    assert ("orchestrator", 0) not in asked  # said before the first agent
    assert ("orchestrator", 1) in asked
    assert "otherwise" in told(outcome)


def test_a_call_that_was_cut_off_is_made_again_and_told(whole, tmp_path: Path) -> None:
    _, data = whole
    lines = data.splitlines(keepends=True)
    begun = next(i for i, line in enumerate(lines) if b'"ToolStarted"' in line)
    ended = next(i for i, line in enumerate(lines) if b'"ToolEnded"' in line)
    assert begun < ended
    (tmp_path / FILE_NAME).write_bytes(b"".join(lines[: begun + 1]))
    outcome = run(tmp_path)
    assert [event.text for event in outcome.of(Warned)] == [
        "a2 calls board_append_file again: the run ended before, and what came of it is not known"
    ]


def test_a_plans_run_is_resumed_without_its_finished_agents(tmp_path: Path) -> None:
    document = {
        "agents": {"r": {"system_prompt": "You read.", "tools": []}},
        "stages": [
            {"tasks": [{"agent": "r", "prompt": "{{item}}", "items": ["x", "y"], "name": "first"}]},
            {"tasks": [{"agent": "r", "prompt": "join {{first}}"}]},
        ],
    }
    plan = Plan.from_document(document, "plan")
    say = lambda asked: f"<{asked.prompt}>" if not asked.settings.is_orchestrator else asked.last  # noqa: E731
    reference = run_swarm(tmp_path / "whole", ScriptedBackend(say), plan=plan)
    assert reference.ended.answer == "<join <x>\n\n<y>>"
    lines = (tmp_path / "whole" / FILE_NAME).read_bytes().splitlines(keepends=True)
    for number in range(len(lines) + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / FILE_NAME).write_bytes(b"".join(lines[:number]))
        ended = {event.agent_id for event in read(folder).events if isinstance(event, AgentEnded)}
        outcome = run_swarm(folder, ScriptedBackend(say), plan=plan)
        assert outcome.ended.answer == reference.ended.answer
        assert outcome.ended.totals.critical_steps == reference.ended.totals.critical_steps == 3
        assert not ended & {asked.agent_id for asked in outcome.backend.asked}
        assert isinstance(read(folder).events[-1], RunEnded)
