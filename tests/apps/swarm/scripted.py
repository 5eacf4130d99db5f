"""A model by script, asked through the backends' protocol, and runs of swarms on it."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_lite.apps.swarm.agent import calls_of
from kimi_lite.apps.swarm.backend import Backend, ChatProgress, ChatSettings, Message, OnProgress, Reply
from kimi_lite.apps.swarm.events import Emitter, Event, RunEnded, Usage
from kimi_lite.apps.swarm.journal import Journal, read
from kimi_lite.apps.swarm.permissions import Permissions
from kimi_lite.apps.swarm.plan_file import Plan
from kimi_lite.apps.swarm.replay import Replay
from kimi_lite.apps.swarm.run import Assignment, SwarmRun
from kimi_lite.apps.swarm.settings import SwarmSettings
from kimi_lite.apps.swarm.toolshed import Toolshed
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.types import FinishReason


@dataclass(frozen=True)
class Say:
    """What the model answers. `hangs`: after this text it says nothing more until it is cancelled."""

    text: str = ""
    calls: tuple[tuple[str, dict[str, Any] | str], ...] = ()  # (tool, arguments; a text as it is)
    finish_reason: FinishReason | None = None
    error: str = ""
    failure: Exception | None = None
    hangs: bool = False
    tokens: int = 10


@dataclass(frozen=True)
class Asked:
    """One question."""

    agent_id: str
    messages: Sequence[Message]
    tools: Sequence[str]
    settings: ChatSettings

    @property
    def prompt(self) -> str:
        """The task: the first message of the user."""
        return next(str(message["content"]) for message in self.messages if message["role"] == "user")

    @property
    def system(self) -> str:
        return str(self.messages[0]["content"])

    @property
    def results(self) -> list[str]:
        """Of the calls so far."""
        return [str(message["content"]) for message in self.messages if message["role"] == "tool"]

    @property
    def last(self) -> str:
        return str(self.messages[-1]["content"])

    @property
    def num_said(self) -> int:
        """Answers that this agent gave before."""
        return sum(message["role"] == "assistant" for message in self.messages)


Answer = Callable[[Asked], Say | str]


@dataclass
class ScriptedBackend:
    """`answer` is a function of the question. `seed`: how answers interleave."""

    answer: Answer
    seed: int = 0
    asked: list[Asked] = field(default_factory=list)
    answered: Counter = field(default_factory=Counter)  # whole answers, by agent and number
    most_at_once: int = 0
    identity: str = "scripted"
    name: str = "scripted"
    can_call: bool = True
    on_hang: Callable[[], None] = lambda: None
    meet: Callable[[Asked], int] = lambda asked: 0  # answers wait for each other until so many are asked
    _num_now: int = 0
    _barriers: dict[int, asyncio.Barrier] = field(default_factory=dict)

    async def open(self) -> None:
        """There is nothing to open."""

    async def close(self) -> None:
        """There is nothing to close."""

    async def chat(
        self, messages: Sequence[Message], tools: Sequence[Message], settings: ChatSettings, on_progress: OnProgress
    ) -> Reply:
        asked = Asked(settings.agent_id, list(messages), [tool["function"]["name"] for tool in tools], settings)
        self.asked.append(asked)
        self._num_now += 1
        self.most_at_once = max(self.most_at_once, self._num_now)
        try:
            said = self.answer(asked)
            said = Say(said) if isinstance(said, str) else said
            on_progress(ChatProgress("reading", 0, 100))
            for _ in range(random.Random(f"{self.seed} {settings.agent_id} {asked.num_said}").randrange(5)):
                await asyncio.sleep(0)
            on_progress(ChatProgress("generating", 100, 100, 64, 3, 9.0, said.text))
            if number := self.meet(asked):
                await self._barriers.setdefault(asked.num_said, asyncio.Barrier(number)).wait()
            if said.failure is not None:
                raise said.failure
            if said.hangs:
                self.on_hang()
                await asyncio.Event().wait()
            self.answered[settings.agent_id, asked.num_said] += 1
            return _reply(said, asked)
        finally:
            self._num_now -= 1


def _reply(said: Say, asked: Asked) -> Reply:
    number = sum(len(calls_of(message)) for message in asked.messages)
    message: dict[str, Any] = {"role": "assistant", "content": said.text}
    if said.calls:
        message["tool_calls"] = [
            {
                "id": f"functions.{name}:{number + i}",
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
                },
            }
            for i, (name, arguments) in enumerate(said.calls)
        ]
    reason = said.finish_reason or ("tool_calls" if said.calls else "stop")
    return Reply(message, reason, Usage(100 * len(asked.messages), 64, said.tokens), said.error)


def create(name: str, system_prompt: str = "You work.") -> tuple[str, dict[str, Any]]:
    return "create_subagent", {"name": name, "system_prompt": system_prompt}


def assign(agent: str, prompt: str) -> tuple[str, dict[str, Any]]:
    return "assign_task", {"agent": agent, "prompt": prompt}


@dataclass
class Outcome:
    """Of a run."""

    ended: RunEnded
    events: list[Event]
    backend: ScriptedBackend

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def run_swarm(
    folder: Path,
    backend: Backend,
    task: str = "the task",
    settings: SwarmSettings | None = None,
    *,
    plan: Plan | None = None,
    permissions: Permissions | None = None,
    work_folder: Path | None = None,
    mcp_config: Path | None = None,
    answer: AnswerSettings | None = None,
    on_event: Callable[[SwarmRun, Event], None] = lambda run, event: None,
) -> Outcome:
    """A run in `folder`, which goes on with what its journal knows."""
    events: list[Event] = []
    if permissions is None:
        permissions = Permissions() if plan is None else plan.permissions

    async def run() -> RunEnded:
        with Journal(folder) as journal:
            replay = Replay(read(folder).events)
            holder: list[SwarmRun] = []
            listeners = [journal, events.append, lambda event: on_event(holder[0], event) if holder else None]
            emitter = Emitter(listeners, replay.last_s)
            toolshed = Toolshed(emitter, folder, permissions, work_folder, mcp_config)
            try:
                how = settings or SwarmSettings(), answer or AnswerSettings(), permissions
                assignment = Assignment("run", task, *how, plan)
                await backend.open()
                holder.append(SwarmRun(assignment, backend, toolshed, emitter, replay))
                return await holder[0].run()
            finally:
                await backend.close()
                toolshed.close()

    return Outcome(asyncio.run(run()), events, backend)
