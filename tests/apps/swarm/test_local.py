"""Agents as sequences of one engine: calls, caches, an end by hand; and whatever the interleaving, each agent says what
it says alone."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from kimi_lite.apps.swarm.backend import ChatSettings, Message, OnProgress, Reply
from kimi_lite.apps.swarm.events import AgentEnded, AgentProgress, AgentStep, OrchestratorStep, ToolEnded
from kimi_lite.apps.swarm.local import LocalBackend
from kimi_lite.apps.swarm.plan_file import Plan
from kimi_lite.apps.swarm.settings import SwarmSettings
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.loader import load
from kimi_lite.engine.types import SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import Options
from tests.apps.server.running import call, speaking
from tests.apps.swarm.scripted import run_swarm
from tests.engine.fakes import fake_engine
from tests.tiny import write_tiny_gguf

GREEDY = AnswerSettings(is_thinking=False, temperature=0.0)


def local(folder: Path, engine: Engine, **more):
    """A run on this engine, which stays open."""
    return run_swarm(folder, LocalBackend(lambda _: engine, is_owner=False), answer=GREEDY, **more)


def leader(prompt: str) -> tuple[None, str]:
    """The orchestrator and its agents, by what the prompt has last."""
    last = prompt.rpartition("<|im_middle|>")[2].partition("<|im_end|>")[0]
    if "You lead a team" not in prompt:
        task, _, rest = prompt.rpartition("<|im_user|>user<|im_middle|>")[2].partition("<|im_end|>")
        if "Return of" in rest:
            return None, f"I have read: {last[-30:]}" + "." * 200
        return None, call("board_list_files", "{}") if task == "look" else f"done {task}"
    if "Return of" not in prompt:
        return None, "I divide." + call("create_subagent", '{"name":"a","system_prompt":"You work."}')
    if prompt.count("Return of") == 1:
        made = enumerate(('{"agent":"a","prompt":"one"}', '{"agent":"a","prompt":"look"}'), start=1)
        calls = [call("assign_task", arguments, i) for i, arguments in made]
        begin, end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
        return None, begin + "".join(each.removeprefix(begin).removesuffix(end) for each in calls) + end
    return None, "the answer: " + last[-20:]


def test_a_whole_run_through_the_engine(tmp_path: Path) -> None:
    engine = speaking(leader, context_length=16_384, num_pages=1024)
    outcome = local(tmp_path, engine)
    assert outcome.ended.outcome == "completed", outcome.ended
    assert outcome.ended.answer.startswith("the answer")
    results = {each.agent_id: each.result for each in outcome.of(AgentEnded)}
    assert results["a1"] == "done one"
    assert results["a2"].startswith("I have read")
    assert [(each.tool, each.outcome) for each in outcome.of(ToolEnded)] == [("board_list_files", "completed")]
    second = outcome.of(OrchestratorStep)[1]
    assert second.usage.cached_tokens > 0.9 * outcome.of(OrchestratorStep)[0].usage.prompt_tokens
    steps = {(each.agent_id, each.step): each.usage for each in outcome.of(AgentStep)}
    cached = sorted(steps[agent, 0].cached_tokens for agent in ("a1", "a2"))
    assert cached[1] > 0.8 * steps["a2", 0].prompt_tokens  # one agent read the common beginning for both
    states = {each.state for each in outcome.of(AgentProgress)}
    assert {"queued", "generating", "tool", "done"} <= states
    assert not engine.is_closed
    assert engine.is_idle


def test_priorities_reach_the_engine(tmp_path: Path) -> None:
    engine, seen = speaking(leader, context_length=16_384, num_pages=1024), []
    add = engine.add
    engine.add = lambda request: (seen.append(request.priority), add(request))
    local(tmp_path, engine)
    assert seen[0] > max(seen[2:4])  # the orchestrator goes first
    assert len(set(seen[2:])) > 1


def test_a_prompt_that_is_too_long_fails_its_agent_alone(tmp_path: Path) -> None:
    plan = Plan.from_document(
        {
            "default": {"tools": []},
            "agents": {"a": {"system_prompt": "You work."}},
            "synthesis": False,
            "stages": [{"tasks": [{"agent": "a", "prompt": "x" * 3000}, {"agent": "a", "prompt": "one"}]}],
        },
        "plan",
    )
    outcome = local(tmp_path, speaking(leader, context_length=2048, num_pages=64), plan=plan)
    ended = {each.agent_id: each for each in outcome.of(AgentEnded)}
    assert ended["a1"].outcome == "failed"
    assert "context" in ended["a1"].reason
    assert ended["a2"].result == "done one"


def test_stopped_it_cancels_what_runs_in_the_engine(tmp_path: Path) -> None:
    engine = fake_engine(context_length=16_384, num_pages=1024)  # it never ends by itself

    def on_event(run, each) -> None:
        if isinstance(each, AgentProgress) and each.state == "generating" and each.generated_tokens:
            run.stop()

    outcome = local(tmp_path, engine, on_event=on_event)
    assert outcome.ended.outcome == "cancelled"
    assert engine.is_idle


def test_a_model_that_cannot_be_loaded_says_why() -> None:
    def broken(on_progress) -> Engine:
        raise KimiLiteError("The file is damaged.")

    async def opens() -> None:
        backend = LocalBackend(broken)
        try:
            await backend.open()
        finally:
            await backend.close()
            await backend.close()

    with pytest.raises(KimiLiteError, match="damaged"):
        asyncio.run(opens())


class Calling(LocalBackend):
    """Its model says what it says, and its first answers to each task call a tool too: agents of several steps."""

    async def chat(
        self, messages: Sequence[Message], tools: Sequence[Message], chat: ChatSettings, on_progress: OnProgress
    ) -> Reply:
        reply = await super().chat(messages, tools, chat, on_progress)
        num_said = sum(message["role"] == "assistant" for message in messages)
        wanted = int(str(messages[1]["content"]).split()[0])
        if num_said >= wanted:
            return Reply(reply.message, "stop", reply.usage)
        made = {"id": f"functions.look:{num_said}", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        return Reply({**reply.message, "tool_calls": [made]}, "tool_calls", reply.usage)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Iterator[Engine]:
    path = write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", np.random.default_rng(3))
    with load(path, Options(context_length=2048, num_sequences=2, keeps_heat=False)) as engine:
        yield engine


def transcripts(folder: Path, engine: Engine, tasks: Sequence[str], max_parallel: int) -> dict[str, list[str]]:
    """What each task's agent said, step by step."""
    plan = Plan.from_document(
        {
            "default": {"tools": []},
            "agents": {"a": {"system_prompt": "You work."}},
            "synthesis": False,
            "stages": [{"tasks": [{"agent": "a", "prompt": task} for task in tasks]}],
        },
        "plan",
    )
    few = AnswerSettings(is_thinking=False, temperature=0.0, sampling=SamplingParams(max_tokens=6, ignore_eos=True))
    backend = Calling(lambda _: engine, is_owner=False)
    outcome = run_swarm(
        folder, backend, plan=plan, answer=few, settings=SwarmSettings(max_parallel=max_parallel, fuller_below=0)
    )
    assert outcome.ended.outcome == "completed", outcome.ended
    said: dict[str, list[str]] = {}
    for each in outcome.of(AgentStep):
        said.setdefault(tasks[int(each.agent_id[1:]) - 1], []).append(str(each.message["content"]))
    return said


TASKS = [f"{steps} {words}" for steps in (0, 1, 2) for words in ("read", "write a song " * 9, "sum " * 60)]
_alone: dict[str, list[str]] = {}


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.lists(st.sampled_from(TASKS), min_size=1, max_size=6, unique=True),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(16, 512),
)
def test_whatever_the_interleaving_each_agent_says_what_it_says_alone(
    tiny: Engine, tmp_path_factory, tasks: list[str], max_parallel: int, max_running: int, step_tokens: int
) -> None:
    scheduler = tiny.scheduler
    for task in tasks:
        if task not in _alone:
            scheduler.max_running, scheduler.max_step_tokens = 1, tiny.model.max_batch_tokens
            _alone.update(transcripts(tmp_path_factory.mktemp("alone"), tiny, [task], 1))
    scheduler.max_running, scheduler.max_step_tokens = max_running, min(step_tokens, tiny.model.max_batch_tokens)
    together = transcripts(tmp_path_factory.mktemp("together"), tiny, tasks, max_parallel)
    event(f"{len(tasks)} agents")
    assert together == {task: _alone[task] for task in tasks}
    assert all(len(together[task]) > int(task.split()[0]) for task in tasks)
