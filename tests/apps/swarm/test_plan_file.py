"""A decomposition from a file: what it may say, and what a run makes of it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.apps.swarm.agent import calls_of
from kimi_lite.apps.swarm.events import AgentEnded, OrchestratorStep, StageStarted
from kimi_lite.apps.swarm.plan_file import Plan
from kimi_lite.apps.swarm.settings import Limits, SwarmSettings
from kimi_lite.errors import KimiLiteError
from tests.apps.swarm.scripted import Asked, Say, ScriptedBackend, run_swarm

AGENTS = {"r": {"system_prompt": "You read."}, "w": {"system_prompt": "You write.", "tools": []}}
TOML = """
task = "Compare them."
context = "All of it is about Foo."
synthesis = "Write a table."
[agents.r]
system_prompt = "You read."
[[stages]]
tasks = [
  { agent = "r", prompt = "Read {{item}}.", items = ["a", "b"], name = "notes" },
  { agent = "r", prompt = "Read c.", name = "c" },
]
[[stages]]
tasks = [{ agent = "r", prompt = "Join {{notes}} with {{ c }}, not {{item}}s.", items = ["1", "2"] }]
"""


def plan_of(*stages: list[dict], **more) -> Plan:
    return Plan.from_document({"agents": AGENTS, "stages": [{"tasks": tasks} for tasks in stages], **more}, "p")


def say(asked: Asked) -> Say | str:
    return "the table" if asked.settings.is_orchestrator else f"<{asked.prompt}>"


def test_stages_run_one_after_the_other_and_results_go_on_to_later_ones(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(TOML)
    plan = Plan.read(tmp_path / "plan.toml")
    outcome = run_swarm(tmp_path / "run", ScriptedBackend(say), plan.task, plan=plan)
    assert (outcome.ended.outcome, outcome.ended.answer) == ("completed", "the table")
    assert [event.agents for event in outcome.of(StageStarted)] == [("a1", "a2", "a3"), ("a4", "a5")]
    results = {event.agent_id: event.result for event in outcome.of(AgentEnded)}
    joined = "<Join <Read a.>\n\n<Read b.> with <Read c.>, not {}s.>"
    assert (results["a4"], results["a5"]) == (joined.format(1), joined.format(2))
    final = outcome.backend.asked[-1]
    assert final.prompt == "Compare them.\n\nWrite a table."
    assert not final.settings.may_call
    assert [asked.settings.is_orchestrator for asked in outcome.backend.asked].count(True) == 1
    assert all("All of it is about Foo.\n\nYou read." in asked.system for asked in outcome.backend.asked[:-1])
    assert [event.finish_reason for event in outcome.of(OrchestratorStep)] == ["plan", "plan", "stop"]
    assert (outcome.ended.totals.steps, outcome.ended.totals.critical_steps) == (6, 3)


def test_without_a_synthesis_the_last_results_are_the_answer(tmp_path: Path) -> None:
    plan = plan_of([{"agent": "r", "prompt": "x"}], [{"agent": "w", "prompt": p} for p in "yz"], synthesis=False)
    outcome = run_swarm(tmp_path, ScriptedBackend(say), plan=plan)
    assert outcome.ended.answer == "<y>\n\n<z>"
    assert not any(asked.settings.is_orchestrator for asked in outcome.backend.asked)


def test_a_model_that_knows_no_tools_gets_the_results_as_a_message(tmp_path: Path) -> None:
    plan = plan_of([{"agent": "r", "prompt": p} for p in "xy"])
    outcome = run_swarm(tmp_path, ScriptedBackend(say, can_call=False), plan=plan)
    final = outcome.backend.asked[-1]
    assert [message["role"] for message in final.messages] == ["system", "user", "user"]
    assert final.last == "<x>\n\n<y>"
    assert not any(asked.tools for asked in outcome.backend.asked)


def test_a_task_that_fails_leaves_its_place_empty_and_the_plan_goes_on(tmp_path: Path) -> None:
    def fails(asked: Asked) -> Say | str:
        return Say(failure=KimiLiteError("no luck")) if asked.prompt == "bad" else say(asked)

    plan = plan_of([{"agent": "r", "prompt": "bad", "name": "n"}], [{"agent": "r", "prompt": "has '{{n}}'"}])
    outcome = run_swarm(tmp_path, ScriptedBackend(fails), plan=plan)
    assert outcome.of(AgentEnded)[-1].result == "<has ''>"
    assert "no luck" in outcome.backend.asked[-1].results[0]


@given(st.text(), st.text())
def test_a_result_is_put_in_as_it_is(result: str, around: str) -> None:
    around = around.replace("{", "(")
    plan = plan_of([{"agent": "r", "prompt": "x", "name": "n"}], [{"agent": "r", "prompt": f"a{around}{{{{n}}}}"}])
    (call,) = calls_of(plan.message(1, {"n": result}.__getitem__))
    assert json.loads(call.arguments)["prompt"] == f"a{around}{result}"


TASK = {"agent": "r", "prompt": "x"}


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ([], "must be a table"),
        ({"agents": AGENTS}, "has no stages"),
        ({"agents": AGENTS, "stages": []}, "has no stages"),
        ({"agents": AGENTS, "stages": [TASK]}, "Stage 1 of the plan p sets agent, prompt, which is not known"),
        ({"agents": AGENTS, "stages": [{"tasks": []}]}, "Stage 1 of the plan p has no tasks"),
        ({"agents": AGENTS, "stages": [{"tasks": ["x"]}]}, "Task 1 of stage 1 of the plan p is 'x'"),
        ({"agents": AGENTS, "steps": []}, "sets steps, which is not known"),
        ({"agents": AGENTS, "stages": [{"tasks": [TASK]}], "synthesis": 3}, "sets synthesis to 3"),
        ({"agents": AGENTS, "stages": [{"tasks": [TASK]}], "task": 3}, "sets task to 3"),
        ({"agents": {"r": {"tolls": []}}, "stages": [{"tasks": [TASK]}]}, "sets tolls"),
    ],
)
def test_what_is_wrong_in_a_plan_is_named(document: object, told: str) -> None:
    with pytest.raises(KimiLiteError, match=told.replace("(", r"\(")):
        Plan.from_document(document, "p")


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"agent": "x", "prompt": "x"}, "the agent 'x', which is not in the plan"),
        ({"agent": "r"}, "has no prompt"),
        ({"agent": "r", "prompt": "x", "items": ["a", "b"]}, "needs both items and"),
        ({"agent": "r", "prompt": "{{item}}"}, "needs both items and"),
        ({"agent": "r", "prompt": "{{item}}", "items": ["a"]}, "2 to 128"),
        ({"agent": "r", "prompt": "{{item}}", "items": ["a", "a"]}, "all different"),
        ({"agent": "r", "prompt": "{{item}}", "items": "ab"}, "must be a list"),
        ({"agent": "r", "prompt": "{{later}}"}, "takes the result 'later'; earlier stages have: first"),
        ({"agent": "r", "prompt": "x", "name": "first"}, "names a task 'first', which is taken"),
        ({"agent": "r", "prompt": "x", "name": "item"}, "names a task 'item'"),
        ({"agent": "r", "prompt": 3}, "sets prompt to 3"),
    ],
)
def test_what_is_wrong_with_a_task_is_named(task: dict, told: str) -> None:
    with pytest.raises(KimiLiteError, match=told):
        plan_of([{"agent": "r", "prompt": "x", "name": "first"}], [task])


@pytest.mark.parametrize(("name", "text"), [("p.toml", "stages = ["), ("p.json", "{"), ("p.json", "[" * 100_000)])
def test_a_file_that_is_none_is_told(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(KimiLiteError, match="cannot be read"):
        Plan.read(tmp_path / name)


def test_a_plan_may_have_more_stages_than_the_orchestrator_steps_and_the_same_ones(tmp_path: Path) -> None:
    plan = plan_of(*([{"agent": "r", "prompt": "x"}] for _ in range(7)))
    few = SwarmSettings(orchestrator=Limits(steps=1))
    outcome = run_swarm(tmp_path, ScriptedBackend(say), plan=plan, settings=few)
    assert (outcome.ended.outcome, outcome.ended.answer) == ("completed", "the table")
    assert len(outcome.of(StageStarted)) == 7
