"""Runs of a swarm on a model by script: stages, failures, limits, malformed calls, an end by hand."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_lite.apps.swarm.events import (
    AgentCreated,
    AgentEnded,
    AgentStarted,
    OrchestratorStep,
    StageEnded,
    StageStarted,
    ToolEnded,
    Warned,
)
from kimi_lite.apps.swarm.permissions import Permissions
from kimi_lite.apps.swarm.settings import Limits, SwarmSettings
from kimi_lite.errors import KimiLiteError
from tests.apps.swarm.scripted import Asked, Say, ScriptedBackend, assign, create, run_swarm


@pytest.fixture(autouse=True, scope="module")
def _no_fsync() -> Iterator[None]:
    """What a kill leaves does not depend on it; only a power cut's does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kimi_lite.apps.swarm.journal.os.fsync", lambda file: None)
        yield


def leader(*turns: Say | str, agents=lambda asked: f"done: {asked.prompt}"):
    """The orchestrator says these turns, one after the other; agents answer by `agents`."""

    def answer(asked: Asked) -> Say | str:
        return turns[asked.num_said] if asked.settings.is_orchestrator else agents(asked)

    return answer


def look(asked: Asked, text: str = "", tokens: int = 10) -> Say:
    """A call of a tool that is another each time."""
    return Say(text, (("board_list_files", {"depth": 1 + asked.num_said}),), tokens=tokens)


def test_the_calls_of_a_turn_run_at_once_and_their_results_come_in_order(tmp_path: Path) -> None:
    turns = (
        Say("I divide it.", (create("reader", "You read."), create("writer", "You write."))),
        Say("", (assign("writer", "one"), assign("reader", "two"), assign("writer", "three"))),
        Say("", (assign("reader", "four"),)),
        "the answer",
    )
    outcome = run_swarm(tmp_path, ScriptedBackend(leader(*turns)))
    assert (outcome.ended.outcome, outcome.ended.answer) == ("completed", "the answer")
    assert outcome.backend.most_at_once == 3
    final = outcome.backend.asked[-1]
    assert final.results == [
        "Created reader. There are: reader.",
        "Created writer. There are: reader, writer.",
        *("done: one", "done: two", "done: three", "done: four"),
    ]
    assert [message["role"] for message in final.messages] == [
        *("system", "user", "assistant", "tool", "tool"),
        *("assistant", "tool", "tool", "tool", "assistant", "tool"),
    ]
    assert [event.agents for event in outcome.of(StageStarted)] == [("a1", "a2", "a3"), ("a4",)]
    assert [(event.name, event.stage, event.call_id) for event in outcome.of(AgentStarted)] == [
        ("writer", 0, "functions.assign_task:2"),
        ("reader", 0, "functions.assign_task:3"),
        ("writer", 0, "functions.assign_task:4"),
        ("reader", 1, "functions.assign_task:5"),
    ]
    assert [event.name for event in outcome.of(AgentCreated)] == ["reader", "writer"]


def test_agents_get_their_own_system_prompt_after_what_all_have_in_common_and_no_tools_to_spawn(tmp_path) -> None:
    turns = (
        Say("", (create("x", "You are X."), create("y", "You are Y."))),
        Say("", (assign("x", "1"), assign("y", "2"))),
    )
    outcome = run_swarm(tmp_path, ScriptedBackend(leader(*turns, "ok")))
    first, second = [asked for asked in outcome.backend.asked if not asked.settings.is_orchestrator]
    assert first.system.removesuffix("You are X.") == second.system.removesuffix("You are Y.")
    assert [message["role"] for message in first.messages] == ["system", "user"]
    assert not {"create_subagent", "assign_task", "agent_swarm", "read_result"} & set(first.tools)
    assert {"board_read_file", "board_write_file"} <= set(first.tools)
    orchestrator = outcome.backend.asked[0]
    assert {"create_subagent", "assign_task", "agent_swarm", "read_result", "board_read_file"} <= set(
        orchestrator.tools
    )


def test_the_published_tools_are_declared_as_published(tmp_path: Path) -> None:
    from kimi_lite.apps.swarm.orchestrator import ASSIGN, CREATE

    for tool, names in ((CREATE, ["name", "system_prompt"]), (ASSIGN, ["agent", "prompt"])):
        function = tool.declaration["function"]
        assert sorted(function["parameters"]["required"]) == names
        assert {name: each["type"] for name, each in function["parameters"]["properties"].items()} == dict.fromkeys(
            names, "string"
        )
    assert CREATE.description == "Create a custom subagent with specific system prompt and name for reuse."
    assert ASSIGN.description.startswith("Launch a new agent.")


@pytest.mark.parametrize(
    ("calls", "told"),
    [
        ((assign("nobody", "x"),), "there is no agent 'nobody'; there are: a"),
        ((assign("a", "  "),), "the prompt is empty"),
        ((create("a"),), "there is an agent 'a' already"),
        ((create(" "),), "the name is empty"),
        ((("assign_task", {"agent": "a"}),), "missing: prompt"),
        ((("assign_task", "{not json"),), "not valid JSON"),
        ((("assign_task", "[1]"),), "not a JSON object"),
        ((("no_such_tool", {}),), "there is no tool 'no_such_tool'"),
        ((("read_result", {"reference": "a9"}),), "there is no result 'a9'"),
        ((("agent_swarm", {"agent": "a", "prompt_template": "x", "items": ["1", "2"]}),), "has no {{item}}"),
        ((("agent_swarm", {"agent": "a", "prompt_template": "{{item}}", "items": ["1"]}),), "2 to 128"),
        ((("agent_swarm", {"agent": "a", "prompt_template": "{{item}}", "items": ["1", "1"]}),), "each one different"),
        ((("agent_swarm", {"agent": "a", "prompt_template": "{{item}}", "items": ["1", 2]}),), "must be texts"),
    ],
)
def test_a_call_that_cannot_be_used_is_told_and_the_orchestrator_goes_on(tmp_path: Path, calls, told: str) -> None:
    turns = (Say("", (create("a"),)), Say("", (*calls, assign("a", "good"))), "went on")
    outcome = run_swarm(tmp_path, ScriptedBackend(leader(*turns)))
    bad, good = outcome.backend.asked[-1].results[-2:]
    assert bad.startswith("Error: ")
    assert told in bad
    assert good == "done: good"
    assert outcome.ended.answer == "went on"


def test_one_template_with_many_items(tmp_path: Path) -> None:
    def agents(asked: Asked) -> Say | str:
        return Say(failure=KimiLiteError("no luck")) if "<b>" in asked.prompt else f"read {asked.prompt}"

    swarm = ("agent_swarm", {"agent": "r", "prompt_template": "Read {{item}}!", "items": ["a", "<b>", 'c"&']})
    turns = (Say("", (create("r"),)), Say("", (swarm,)), "ok")
    outcome = run_swarm(tmp_path, ScriptedBackend(leader(*turns, agents=agents)))
    assert outcome.backend.asked[-1].last == (
        "<agent_swarm_result>\n<summary>completed: 2, failed: 1</summary>\n"
        '<subagent agent_id="a1" item="a" outcome="completed">read Read a!</subagent>\n'
        '<subagent agent_id="a2" item="&lt;b&gt;" outcome="failed">The agent did not complete its task (failed): '
        "no luck. It said nothing.</subagent>\n"
        '<subagent agent_id="a3" item=\'c"&amp;\' outcome="completed">read Read c"&amp;!</subagent>\n'
        "</agent_swarm_result>"
    )


def test_a_long_result_is_shortened_and_read_on_demand(tmp_path: Path) -> None:
    text = "".join(f"{i:05d}" for i in range(1000))
    read = ("read_result", {"reference": "a1", "offset": 2000})
    rest = ("read_result", {"reference": "a1", "offset": 4000})
    beyond = ("read_result", {"reference": "a1", "offset": 5000})
    turns = (Say("", (create("a"),)), Say("", (assign("a", "x"),)), Say("", (read, rest, beyond)), "ok")
    outcome = run_swarm(
        tmp_path, ScriptedBackend(leader(*turns, agents=lambda asked: text)), settings=SwarmSettings(result_chars=2000)
    )
    _, first, second, third, none = outcome.backend.asked[-1].results
    assert first.startswith(
        text[:2000] + '\n[The first 2,000 of 5,000 characters; read_result(reference="a1", offset=2000)'
    )
    assert second.startswith(text[2000:4000] + "\n")
    assert "offset=4000" in second
    assert third == text[4000:]
    assert "has 5,000 characters" in none
    assert outcome.of(AgentEnded)[0].result == text


CALL = ("board_list_files", {})


@pytest.mark.parametrize(
    ("said", "limits", "outcome", "reason"),
    [
        (
            Say("w", (("board_list_files", {"depth": 1}),)),
            Limits(steps=3),
            "step_limit",
            "within 3 steps; split its task",
        ),
        (Say("w", (CALL,), tokens=60), Limits(tokens=100), "token_limit", "120 tokens of 100"),
        (Say("w", (CALL,)), Limits(), "looping", "board_list_files again and again"),
        (Say("on and on", finish_reason="repetition"), Limits(), "looping", "repeats itself"),
        (Say("cut", finish_reason="length"), Limits(), "token_limit", "cut off"),
        (Say("w", error="no such tool"), Limits(), "failed", "3 calls in a row could not be used: no such tool"),
        (Say(failure=KimiLiteError("The prompt is too long.", "Shorten it.")), Limits(), "failed", "too long"),
        (Say("", finish_reason="stop"), Limits(), "failed", "it said nothing"),
        (Say("partly", hangs=True), Limits(seconds=0.5), "time_limit", "0.5 s"),
        (Say("odd", finish_reason="error"), Limits(), "failed", "'error'"),
    ],
)
def test_an_agent_that_does_not_complete_says_why_and_the_orchestrator_goes_on(
    tmp_path: Path, said: Say, limits: Limits, outcome: str, reason: str
) -> None:
    turns = (Say("", (create("a"),)), Say("", (assign("a", "bad"), assign("a", "good"))), "went on")

    def agents(asked: Asked) -> Say | str:
        return said if asked.prompt == "bad" else "fine"

    result = run_swarm(tmp_path, ScriptedBackend(leader(*turns, agents=agents)), settings=SwarmSettings(agent=limits))
    bad, good = result.backend.asked[-1].results[-2:]
    ended = next(event for event in result.of(AgentEnded) if event.agent_id == "a1")
    assert (ended.outcome, good, result.ended.answer) == (outcome, "fine", "went on")
    assert reason in ended.reason
    assert bad.startswith(f"The agent did not complete its task ({outcome}): {ended.reason}.")
    assert ended.result == said.text
    assert (f"What it said last:\n{said.text}" in bad) == bool(said.text)


def test_a_call_that_could_not_be_read_is_told_and_made_again(tmp_path: Path) -> None:
    def agents(asked: Asked) -> Say | str:
        return Say(error="its arguments are no JSON") if asked.num_said == 0 else f"told: {asked.last}"

    turns = (Say("", (create("a"),)), Say("", (assign("a", "x"),)), "ok")
    outcome = run_swarm(tmp_path, ScriptedBackend(leader(*turns, agents=agents)))
    assert "could not be used. its arguments are no JSON" in outcome.of(AgentEnded)[0].result


def test_a_short_report_of_long_work_is_asked_for_in_full_once(tmp_path: Path) -> None:
    def agents(asked: Asked) -> Say | str:
        if asked.num_said == 0 and asked.prompt == "works":
            return Say("", (CALL,))
        return "done" if asked.num_said < 2 else "did this and that"

    turns = (Say("", (create("a"),)), Say("", (assign("a", "works"), assign("a", "answers"))), "ok")
    outcome = run_swarm(tmp_path, ScriptedBackend(leader(*turns, agents=agents)))
    ended = {event.agent_id: event for event in outcome.of(AgentEnded)}
    assert (ended["a1"].result, ended["a1"].steps) == ("did this and that", 3)
    assert (ended["a2"].result, ended["a2"].steps) == ("done", 1)
    off = run_swarm(
        tmp_path / "off", ScriptedBackend(leader(*turns, agents=agents)), settings=SwarmSettings(fuller_below=0)
    )
    assert {event.agent_id: event.steps for event in off.of(AgentEnded)} == {"a1": 2, "a2": 1}


def test_no_more_agents_than_allowed_and_no_more_at_once(tmp_path: Path) -> None:
    many = ("agent_swarm", {"agent": "a", "prompt_template": "{{item}}", "items": [str(i) for i in range(7)]})
    turns = (Say("", (create("a"),)), Say("", (many,)), Say("", (assign("a", "1"), assign("a", "2"))), "ok")
    limits = SwarmSettings(max_parallel=3, max_agents=8)
    outcome = run_swarm(tmp_path, ScriptedBackend(leader(*turns)), settings=limits)
    assert outcome.backend.most_at_once == 3
    assert outcome.backend.asked[-1].results[-2] == "done: 1"
    assert "8 of the run's 8 were" in outcome.backend.asked[-1].results[-1]
    assert outcome.ended.totals.agents == 8


def test_agents_begin_with_the_longest_prompt_and_one_that_has_begun_keeps_its_place(tmp_path: Path) -> None:
    def agents(asked: Asked) -> Say | str:
        return look(asked) if asked.num_said < 2 else "x" * 300

    tasks = tuple(assign("a", "long " * number) for number in (90, 10, 50, 50, 70))
    turns = (Say("", (create("a"),)), Say("", tasks), "ok")
    one = SwarmSettings(max_parallel=1)
    outcome = run_swarm(tmp_path, ScriptedBackend(leader(*turns, agents=agents)), settings=one)
    order = [asked.agent_id for asked in outcome.backend.asked if not asked.settings.is_orchestrator]
    assert order == [name for name in ("a1", "a5", "a3", "a4", "a2") for _ in range(3)]
    priorities = [asked.settings.priority for asked in outcome.backend.asked if asked.agent_id == "a2"]
    assert priorities == sorted(priorities)


def test_critical_steps_are_the_orchestrators_and_the_slowest_of_each_stage(tmp_path: Path) -> None:
    def agents(asked: Asked) -> Say | str:
        return look(asked) if asked.num_said < int(asked.prompt) else "x" * 300

    turns = (Say("", (create("a"),)), Say("", (assign("a", "0"), assign("a", "3"))), Say("", (assign("a", "1"),)), "ok")
    outcome = run_swarm(tmp_path, ScriptedBackend(leader(*turns, agents=agents)))
    assert [(event.critical_steps, event.slowest) for event in outcome.of(StageEnded)] == [(4, "a2"), (6, "a3")]
    totals = outcome.ended.totals
    assert (totals.steps, totals.critical_steps, totals.agents) == (4 + 1 + 4 + 2, 4 + 4 + 2, 3)
    assert totals.usage.generated_tokens == 10 * totals.steps


def test_agents_may_start_agents_where_the_depth_allows_it(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Say | str:
        if asked.settings.is_orchestrator:
            return [Say("", (create("boss"),)), Say("", (assign("boss", "lead"),)), "the end"][asked.num_said]
        if asked.prompt == "lead":
            assert "assign_task" in asked.tools
            return [Say("", (assign("boss", "leaf"), assign("boss", "leaf too"))), "r " + "; ".join(asked.results)][
                asked.num_said
            ]
        assert "assign_task" not in asked.tools
        return f"{asked.prompt} done"

    outcome = run_swarm(
        tmp_path, ScriptedBackend(answer), settings=SwarmSettings(max_depth=2, max_parallel=1, fuller_below=0)
    )
    started = {event.agent_id: event.parent for event in outcome.of(AgentStarted)}
    assert started == {"a1": "orchestrator", "a1.1": "a1", "a1.2": "a1"}
    assert outcome.backend.asked[-1].results[-1] == "r leaf done; leaf too done"
    assert outcome.ended.totals.critical_steps == 3 + 2 + 1


def test_the_orchestrators_last_step_is_followed_by_an_answer_from_what_is_there(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Say | str:
        if not asked.settings.may_call:
            return f"from what is there: {asked.results[-1]}"
        if asked.settings.is_orchestrator:
            return Say("", (create(f"a{asked.num_said}"), assign(f"a{asked.num_said}", f"task {asked.num_said}")))
        return "found"

    outcome = run_swarm(tmp_path, ScriptedBackend(answer), settings=SwarmSettings(orchestrator=Limits(steps=2)))
    assert outcome.ended.outcome == "step_limit"
    assert outcome.ended.answer == "from what is there: found"
    assert "You have no more steps" in outcome.backend.asked[-1].last
    assert len(outcome.of(OrchestratorStep)) == 2


def test_the_runs_tokens_end_it_with_an_answer(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Say | str:
        if asked.settings.is_orchestrator:
            return [Say("", (create("a"), assign("a", "1"), assign("a", "2"))), "last word"][min(asked.num_said, 1)]
        return look(asked, "found", tokens=30)

    outcome = run_swarm(tmp_path, ScriptedBackend(answer), settings=SwarmSettings(tokens=100))
    assert {event.outcome for event in outcome.of(AgentEnded)} == {"token_limit"}
    assert (outcome.ended.outcome, outcome.ended.answer) == ("token_limit", "last word")


def test_the_runs_time_ends_it_with_an_answer(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Say | str:
        if asked.settings.is_orchestrator:
            return "last word" if asked.num_said else Say("", (create("a"), assign("a", "1"), assign("a", "2")))
        return Say("half a sent", hangs=True)

    outcome = run_swarm(tmp_path, ScriptedBackend(answer), settings=SwarmSettings(seconds=0.2))
    assert [event.outcome for event in outcome.of(AgentEnded)] == ["cancelled", "cancelled"]
    assert (outcome.ended.outcome, outcome.ended.answer) == ("time_limit", "last word")


def test_an_orchestrator_that_fails_leaves_the_results(tmp_path: Path) -> None:
    turns = (
        Say("", (create("a"), assign("a", "1"), assign("a", "2"))),
        Say(failure=KimiLiteError("The server is gone.")),
    )
    outcome = run_swarm(tmp_path, ScriptedBackend(leader(*turns)))
    assert (outcome.ended.outcome, outcome.ended.reason) == ("failed", "The server is gone.")
    assert outcome.ended.answer == "## a1\ndone: 1\n\n## a2\ndone: 2"


def test_a_model_that_starts_no_agent_answers_alone_and_the_run_says_so(tmp_path: Path) -> None:
    outcome = run_swarm(tmp_path, ScriptedBackend(lambda asked: "by myself"))
    assert (outcome.ended.outcome, outcome.ended.answer) == ("completed", "by myself")
    assert "started no agent" in outcome.of(Warned)[0].text


def test_stopped_while_agents_work_it_answers_from_what_is_there(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Say | str:
        if asked.settings.is_orchestrator:
            return (
                "summary of " + " | ".join(asked.results[1:])
                if asked.num_said
                else Say("", (create("a"), assign("a", "quick"), assign("a", "slow")))
            )
        return "quick result" if asked.prompt == "quick" else Say("half a res", hangs=True)

    def on_event(run, event) -> None:
        if isinstance(event, AgentEnded) and event.agent_id == "a1":
            run.stop()

    outcome = run_swarm(tmp_path, ScriptedBackend(answer), on_event=on_event)
    assert outcome.ended.outcome == "cancelled"
    assert outcome.ended.answer.startswith("summary of quick result | The agent did not complete its task (cancelled)")
    assert "half a res" in outcome.ended.answer
    assert not outcome.backend.asked[-1].settings.may_call
    assert len(outcome.of(OrchestratorStep)) == 1


def test_stopped_in_its_answer_the_orchestrator_keeps_what_it_said(tmp_path: Path) -> None:
    turns = (Say("", (create("a"), assign("a", "1"))), Say("The answer is", hangs=True))
    backend = ScriptedBackend(leader(*turns))
    outcome = run_swarm(tmp_path, backend, on_event=lambda run, event: setattr(backend, "on_hang", run.stop))
    assert (outcome.ended.outcome, outcome.ended.answer) == ("cancelled", "The answer is")


def test_stopped_twice_the_results_are_the_answer(tmp_path: Path) -> None:
    turns = (Say("", (create("a"), assign("a", "1"))), Say("", hangs=True), Say("", hangs=True))
    backend = ScriptedBackend(leader(*turns))
    backend_run = []

    def on_event(run, event) -> None:
        backend_run[:] = [run]
        backend.on_hang = lambda: backend_run[0].stop()

    outcome = run_swarm(tmp_path, backend, on_event=on_event)
    assert (outcome.ended.outcome, outcome.ended.answer) == ("cancelled", "## a1\ndone: 1")


def test_stopped_before_anything_was_said(tmp_path: Path) -> None:
    backend = ScriptedBackend(lambda asked: Say("", hangs=True))
    outcome = run_swarm(tmp_path, backend, on_event=lambda run, event: setattr(backend, "on_hang", run.stop))
    assert (outcome.ended.outcome, outcome.ended.answer) == ("cancelled", "")


def test_agents_hand_over_files_on_the_board_and_a_conflict_is_told(tmp_path: Path) -> None:
    def agents(asked: Asked) -> Say | str:
        if asked.num_said == 0:
            return Say("", (("board_write_file", {"path": f"{asked.prompt}.txt", "text": f"by {asked.prompt}"}),))
        return f"{asked.results[-1]} " + "x" * 300

    turns = (
        Say("", (create("a"), assign("a", "p"), assign("a", "q"))),
        Say("", (("board_read_file", {"path": "p.txt"}),)),
        "ok",
    )
    outcome = run_swarm(tmp_path, ScriptedBackend(leader(*turns, agents=agents)))
    assert outcome.backend.asked[-1].results[-1] == "by p"
    assert [(event.tool, event.outcome) for event in outcome.of(ToolEnded)][-1] == ("board_read_file", "completed")
    assert (tmp_path / "board" / "q.txt").read_text() == "by q"


def test_an_agents_tools_are_those_it_is_allowed(tmp_path: Path) -> None:
    permissions = Permissions.from_tables(
        {
            "default": {"tools": ["board_read_file"]},
            "agents": {"w": {"system_prompt": "You write.", "tools": ["board_*"], "max_steps": 2}},
        },
        "agents.toml",
    )
    turns = (Say("", (create("a"), assign("a", "1"), assign("w", "2"))), "ok")

    def agents(asked: Asked) -> Say | str:
        if asked.prompt == "1":
            return [
                Say("", (("board_write_file", {"path": "x", "text": "y"}),)),
                asked.results[-1] if asked.results else "",
            ][asked.num_said]
        return look(asked)

    outcome = run_swarm(
        tmp_path,
        ScriptedBackend(leader(*turns, agents=agents)),
        permissions=permissions,
        settings=SwarmSettings(fuller_below=0),
    )
    ended = {event.agent_id: event for event in outcome.of(AgentEnded)}
    assert ended["a1"].result == "Error: there is no tool 'board_write_file'; there are: board_read_file"
    assert (ended["a2"].outcome, ended["a2"].steps) == ("step_limit", 2)
    assert "configurations are there already: w" in outcome.backend.asked[0].system


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    seed=st.integers(0, 10**6),
    max_parallel=st.integers(1, 5),
    numbers=st.lists(st.integers(0, 3), min_size=1, max_size=6),
)
def test_whatever_the_interleaving_the_orchestrator_sees_the_same(
    tmp_path_factory, seed: int, max_parallel: int, numbers
) -> None:
    def agents(asked: Asked) -> Say | str:
        if asked.num_said < int(asked.prompt.split()[0]):
            return look(asked)
        return f"{asked.prompt} done " + "x" * 200

    calls = tuple(assign("a", f"{number} {i}") for i, number in enumerate(numbers))
    turns = (Say("", (create("a"),)), Say("", calls), "ok")

    def transcript(seed: int, max_parallel: int) -> str:
        folder = tmp_path_factory.mktemp("run")
        outcome = run_swarm(
            folder,
            ScriptedBackend(leader(*turns, agents=agents), seed),
            settings=SwarmSettings(max_parallel=max_parallel),
        )
        final = outcome.backend.asked[-1]
        return json.dumps([final.messages, outcome.ended.answer, outcome.ended.totals.critical_steps])

    assert transcript(seed, max_parallel) == transcript(0, 1)


def test_an_answer_that_was_cut_off_at_its_limit_is_the_answer(tmp_path: Path) -> None:
    turns = (Say("", (create("a"), assign("a", "1"))), Say("The answer is lo", finish_reason="length"))
    outcome = run_swarm(tmp_path, ScriptedBackend(leader(*turns)))
    assert (outcome.ended.outcome, outcome.ended.answer) == ("token_limit", "The answer is lo")
    assert len(outcome.backend.asked) == 3


def test_the_orchestrator_has_a_table_of_its_own(tmp_path: Path) -> None:
    table = {"system_prompt": "Be brief.", "tools": [], "max_steps": 1}
    permissions = Permissions.from_tables({"agents": {"orchestrator": table}}, "agents.toml")
    turns = (Say("", (create("a"), assign("a", "1"))), "forced")
    outcome = run_swarm(tmp_path, ScriptedBackend(leader(*turns)), permissions=permissions)
    first = outcome.backend.asked[0]
    assert first.system.endswith("Be brief.")
    assert first.tools == ["create_subagent", "assign_task", "agent_swarm", "read_result"]
    assert [event.name for event in outcome.of(AgentCreated)] == ["a"]
    assert (outcome.ended.outcome, outcome.ended.answer) == ("step_limit", "forced")


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(), max_size=9)
    | st.sampled_from(["a", "{{item}}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_names = st.sampled_from(
    ["agent", "prompt", "name", "system_prompt", "prompt_template", "items", "reference", "offset"]
)
_calls = st.tuples(
    st.sampled_from(["create_subagent", "assign_task", "agent_swarm", "read_result", "board_write_file"]) | st.text(),
    st.dictionaries(_names, _json, max_size=5) | st.text(max_size=9),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_calls, min_size=1, max_size=4), st.text(st.characters(), max_size=30))
def test_whatever_a_model_calls_and_says_the_run_goes_on(tmp_path_factory, calls: list, said: str) -> None:
    turns = (Say(said, (create("a"), *calls)), Say("", (assign("a", f"x{said}"),)), "ok")
    backend = ScriptedBackend(leader(*turns, agents=lambda asked: f"{said}."))
    outcome = run_swarm(tmp_path_factory.mktemp("run"), backend)
    assert (outcome.ended.outcome, outcome.ended.answer) == ("completed", "ok")
    final = next(asked for asked in reversed(backend.asked) if asked.settings.is_orchestrator)
    assert len(final.results) == len(calls) + 2
    for asked in backend.asked:  # as a tokenizer or a server takes it
        json.dumps(list(asked.messages), ensure_ascii=False).encode()
