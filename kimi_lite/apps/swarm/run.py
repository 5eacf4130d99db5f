"""A run of a swarm from its task to its answer: the orchestrator, what it starts, budgets, an end by hand, totals.

    run = SwarmRun(assignment, backend, toolshed, emitter, Replay(read(folder).events))
    ended = await run.run()      # a RunEnded, which all listeners got too

`stop` ends it gently, from a signal's handler on the event loop: agents that work are cancelled with what they have,
and the orchestrator answers from what is there.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from kimi_lite import __version__
from kimi_lite.apps.swarm.agent import Agent, Ending, Work
from kimi_lite.apps.swarm.agent_tools import AgentTools
from kimi_lite.apps.swarm.backend import Backend, Message
from kimi_lite.apps.swarm.events import (
    ORCHESTRATOR,
    Emitter,
    Outcome,
    RunEnded,
    RunResumed,
    RunStarted,
    Totals,
    Warned,
)
from kimi_lite.apps.swarm.orchestrator import AgentKind, Staff, SwarmTools
from kimi_lite.apps.swarm.permissions import Permissions, Rules
from kimi_lite.apps.swarm.plan_file import Plan
from kimi_lite.apps.swarm.replay import Replay
from kimi_lite.apps.swarm.settings import Limits, SwarmSettings
from kimi_lite.apps.swarm.toolshed import BOARD, Toolshed
from kimi_lite.apps.swarm.turnstile import Turnstile
from kimi_lite.engine.answer_settings import AnswerSettings

_ORCHESTRATOR = """\
You lead a team of agents that work at the same time. The user's task may be more than one of them can do well alone, \
or faster than one after the other.

- Divide the task into parts that do not depend on each other and do not overlap. What depends on other parts comes in \
a later turn.
- create_subagent makes a configuration: a name and a system prompt that says what such an agent does and does not do.
- assign_task starts an agent of a configuration with one prompt. Calls in one turn run at the same time; make as many \
in a turn as there are independent parts. agent_swarm starts one agent for each item of a list.
- An agent knows nothing but its prompts: put all it needs into them. You get its last message only.
- Long results come back shortened; read_result reads on.
- When the results are there, check them, and write the answer for the user. A small task needs no agents."""
_PLANNED = """\
A team of agents works at the user's task; its parts were fixed beforehand. When their results are there, check them, \
and write the answer for the user from them."""
_KINDS = "These configurations are there already: {names}."
_AGENT = """\
You are one of several agents that work at the same time on parts of a larger task. The agent that leads them gives \
you your part; all user messages come from it. It sees nothing of your work but your last message: make that a \
complete report of what you found and did, with the facts, and say what you could not do. You cannot ask back."""
_BOARD = f"""
The tools whose names begin with {BOARD}_ reach a folder that all agents share. Hand over long texts as files there, \
and name the files in your report."""
_NO_CALLS = "{name} cannot be told of tools: it starts no agents by itself (--plan FILE does), and agents have none"
_ANSWER_NOW = (
    "[{reason} No agent can be started any more. Write the answer for the user now, from the results that are there, "
    "and say what is missing.]"
)
_STOPPING: Mapping[Outcome, str] = {
    "cancelled": "stopping: agents end with what they have, and an answer is made of that; Ctrl-C again ends at once",
    "time_limit": "the run's time is over: agents end with what they have, and an answer is made of that",
}
_REASONS: Mapping[Outcome, str] = {
    "cancelled": "The user ends the run.",
    "time_limit": "The run's time is over.",
    "token_limit": "The run's tokens are used up.",
    "step_limit": "You have no more steps.",
}


@dataclass(frozen=True, slots=True)
class Assignment:
    """What is to be done, and how. `record` is what the journal keeps for resuming."""

    run_id: str
    task: str
    settings: SwarmSettings
    answer: AnswerSettings
    permissions: Permissions
    plan: Plan | None = None
    system: str = ""  # of the user, for the orchestrator
    record: Mapping[str, Any] | None = None


class SwarmRun:
    """One run, once. The backend is open and the toolshed too; their owner closes them."""

    def __init__(
        self, assignment: Assignment, backend: Backend, toolshed: Toolshed, emitter: Emitter, replay: Replay
    ) -> None:
        settings = assignment.settings
        self._assignment, self._toolshed, self._emitter = assignment, toolshed, emitter
        turnstile = Turnstile(settings.max_parallel)
        self._work = Work(backend, settings, assignment.answer, emitter, replay, turnstile)
        self._staff = Staff(self._work, self._open_tools, self._limits_of, self._brief)
        self._stopped_by: Outcome | None = None
        self._tasks: list[asyncio.Task] = []  # of the orchestrator, the one that runs last

    async def run(self) -> RunEnded:
        """Do it. What goes wrong with the model or an agent is the run's end, never an exception."""
        self._begin()
        timer = self._start_timer()
        try:
            orchestrator = self._orchestrator()
            self._main = orchestrator
            ending = await self._as_task(orchestrator.run())
            if self._stopped_by is not None and ending.outcome == "cancelled":
                ending = replace(ending, outcome=self._stopped_by)
            answer = await self._answer(orchestrator, ending)
        finally:
            if timer is not None:
                timer.cancel()
        is_alone = not self._staff.endings and self._assignment.plan is None and ending.outcome == "completed"
        if is_alone and self._work.backend.can_call:
            self._warn("the orchestrator started no agent and answered alone; --plan FILE fixes the parts of a task")
        totals = self._totals(ending)
        return self._emitter.emit(lambda t_s: RunEnded(t_s, ending.outcome, answer, totals, ending.reason))

    def stop(self, outcome: Outcome = "cancelled") -> None:
        """End it with what is there. A second call also takes back the orchestrator's last answer."""
        if self._stopped_by is not None:
            for task in self._tasks:
                task.cancel()
            return
        self._stopped_by, self._work.is_stopping = outcome, True
        self._warn(_STOPPING[outcome])
        for task in list(self._work.tasks):
            task.cancel()
        if self._tasks and not self._main.is_waiting_for_calls:
            self._tasks[-1].cancel()

    def _begin(self) -> None:
        started, now = self._work.replay.started, datetime.now().astimezone().isoformat(timespec="seconds")
        assignment = self._assignment
        self._emitter.begin(self._work.replay.last_s)
        if started is None:
            begin = (assignment.run_id, assignment.task, dict(assignment.record or {}), __version__, now)
            self._emitter.emit(lambda t_s: RunStarted(t_s, *begin))
        else:
            self._emitter.emit(lambda t_s: RunResumed(t_s, __version__, now))
        for note in self._toolshed.notes:
            self._warn(note)
        if not self._work.backend.can_call:
            self._warn(_NO_CALLS.format(name=self._work.backend.name))
        for name in assignment.permissions.agents:
            if name != ORCHESTRATOR:  # that one is there in any case
                self._staff.create(name, assignment.permissions.of(name).system_prompt or "")

    def _start_timer(self) -> asyncio.TimerHandle | None:
        seconds = self._assignment.settings.seconds
        if seconds is None:
            return None
        left_s = max(seconds - self._emitter.now_s, 0.0)
        return asyncio.get_running_loop().call_later(left_s, self._time_is_over)

    def _time_is_over(self) -> None:
        if self._stopped_by is None:
            self.stop("time_limit")

    def _orchestrator(self) -> Agent:
        assignment, settings = self._assignment, self._assignment.settings
        own = self._open_tools(ORCHESTRATOR, ORCHESTRATOR)
        tools = SwarmTools(self._staff, ORCHESTRATOR, own, 1)
        plan = assignment.plan
        role, task = "", assignment.task
        if plan is not None:
            role, task = _PLANNED, f"{task}\n\n{plan.synthesis}".strip()
        elif self._work.backend.can_call:
            role = "\n\n".join(part for part in (_ORCHESTRATOR, self._named_kinds()) if part)
        rules = assignment.permissions.agents.get(ORCHESTRATOR, Rules())
        system = "\n\n".join(part for part in (role, rules.system_prompt, assignment.system) if part)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": task})
        return Agent(
            self._work,
            ORCHESTRATOR,
            messages,
            tools,
            _limits(settings.orchestrator, rules),
            script=self._said_by_plan,
            may_call=plan is None,
        )

    def _said_by_plan(self, step: int) -> Message | None:
        """The calls of a stage, and after the last one the results where they are the answer."""
        plan = self._assignment.plan
        if plan is None:
            return None
        message = plan.message(step, lambda name: self._results_of(plan.call_id(name)))
        if message is None and not plan.synthesizes and step == len(plan.stages):
            last = [self._results_of(task.call_id) for task in plan.stages[-1]]
            return {"role": "assistant", "content": "\n\n".join(last) or "(nothing)"}
        return message

    def _results_of(self, call_id: str) -> str:
        return "\n\n".join(self._staff.results[agent_id] for agent_id in self._staff.by_call.get(call_id, ()))

    async def _answer(self, orchestrator: Agent, ending: Ending) -> str:
        """The orchestrator's; where it came to no end, a last one from what is there, or what is there itself."""
        if ending.outcome == "completed" or not any(self._staff.results.values()):
            return ending.text
        if draft := orchestrator.draft.strip():  # it was at its answer
            return draft
        if ending.outcome in _REASONS:
            request = _ANSWER_NOW.format(reason=_REASONS[ending.outcome])
            try:
                reply = await self._as_task(orchestrator.answer_now(request))
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():
                    raise
                return orchestrator.draft.strip() or self._all_results()
            if reply is not None and (text := str(reply.message.get("content") or "").strip()):
                return text
        return self._all_results()

    def _all_results(self) -> str:
        """For people, where the orchestrator has no words."""
        names = {
            agent_id: text for agent_id, text in sorted(self._staff.results.items(), key=_by_number) if text.strip()
        }
        return "\n\n".join(f"## {agent_id}\n{text}" for agent_id, text in names.items())

    async def _as_task(self, work: Any) -> Any:
        """So that `stop` can end it; who is cancelled meanwhile cancels it."""
        task = asyncio.create_task(work)
        self._tasks.append(task)
        try:
            return await task
        finally:
            self._tasks.remove(task)

    def _open_tools(self, agent_id: str, name: str) -> AgentTools:
        return AgentTools(self._work, agent_id, self._toolshed.box(agent_id, name), self._toolshed.threads)

    def _limits_of(self, name: str) -> Limits:
        return _limits(self._assignment.settings.agent, self._assignment.permissions.of(name))

    def _brief(self, kind: AgentKind) -> str:
        """What agents have in common comes first: it is read once for all of them."""
        context = "" if self._assignment.plan is None else self._assignment.plan.context
        has_board = any(tool.startswith(f"{BOARD}_") for tool in self._toolshed.box("", kind.name).tools)
        common = _AGENT + _BOARD if has_board else _AGENT
        return "\n\n".join(part for part in (common, context, kind.system_prompt) if part.strip())

    def _named_kinds(self) -> str:
        names = ", ".join(self._staff.kinds)
        return _KINDS.format(names=names) if names else ""

    def _totals(self, ending: Ending) -> Totals:
        work = self._work
        return Totals(
            agents=self._staff.num_started,
            steps=work.steps,
            critical_steps=ending.critical_steps,
            usage=work.usage,
            seconds=round(self._emitter.now_s, 4),
            sequential_s=round(work.busy_s, 4),
        )

    def _warn(self, text: str) -> None:
        self._emitter.emit(lambda t_s: Warned(t_s, text))


def _limits(limits: Limits, rules: Rules) -> Limits:
    """With what the rules say instead."""
    steps = limits.steps if rules.max_steps is None else rules.max_steps
    return replace(limits, steps=steps, tokens=limits.tokens if rules.max_tokens is None else rules.max_tokens)


def _by_number(item: tuple[str, str]) -> list[int]:
    """`a2.1` after `a2` and before `a10`."""
    return [int(part) for part in item[0].removeprefix("a").split(".")]
