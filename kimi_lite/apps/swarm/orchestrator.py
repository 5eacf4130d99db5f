"""How agents start agents: K2.5's tools `create_subagent` and `assign_task`, as published, with `agent_swarm` (one
template, many items) and `read_result` (what of a long result was left out).

All calls of one answer run at the same time, and their results come in the calls' order. An agent that fails is a text
for the one who started it, never the end of the run.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from xml.sax.saxutils import escape, quoteattr

from kimi_lite.apps.swarm.agent import Agent, Ending, Results, Tools, Work, prompt_key, well_formed
from kimi_lite.apps.swarm.agent_tools import AgentTools
from kimi_lite.apps.swarm.backend import Message
from kimi_lite.apps.swarm.events import (
    ORCHESTRATOR,
    AgentCreated,
    AgentEnded,
    AgentStarted,
    StageEnded,
    StageStarted,
)
from kimi_lite.apps.swarm.settings import Limits
from kimi_lite.apps.tools.tool import ToolError, parameters, read_arguments
from kimi_lite.text.tool_calls import ToolCall
from kimi_lite.units import counted

ITEM = "{{item}}"
LEAST_ITEMS, MOST_ITEMS = 2, 128
_TEXT = {"type": "string"}


class _Declared(NamedTuple):
    """A tool as the model is told of it; who runs it is `SwarmTools`."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    @property
    def declaration(self) -> Message:
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


CREATE = _Declared(
    "create_subagent",
    "Create a custom subagent with specific system prompt and name for reuse.",
    parameters(
        ("name", "system_prompt"),
        name=_TEXT | {"description": "Unique name for this agent configuration"},
        system_prompt=_TEXT | {"description": "System prompt defining the agent's role, capabilities, and boundaries"},
    ),
)
ASSIGN = _Declared(
    "assign_task",
    "Launch a new agent.\nUsage notes:\n"
    "1. You can launch multiple agents concurrently whenever possible, to maximize performance;\n"
    "2. When the agent is done, it will return a single message back to you.",
    parameters(
        ("agent", "prompt"),
        agent=_TEXT | {"description": "Specify which created agent to use."},
        prompt=_TEXT | {"description": "The task for the agent to perform"},
    ),
)
SWARM = _Declared(
    "agent_swarm",
    "Launch many agents of one configuration at once, one for each item of a list. Their results come back together.",
    parameters(
        ("agent", "prompt_template", "items"),
        agent=_TEXT | {"description": "Specify which created agent to use."},
        prompt_template=_TEXT | {"description": f"The task of each agent; {ITEM} stands for its item."},
        items={
            "type": "array",
            "items": _TEXT,
            "minItems": LEAST_ITEMS,
            "maxItems": MOST_ITEMS,
            "description": "The items, each one different from the others.",
        },
    ),
)
READ = _Declared(
    "read_result",
    "Read more of an agent's result that came back shortened.",
    parameters(
        ("reference",),
        reference=_TEXT | {"description": "The reference that stands in the shortened result."},
        offset={"type": "integer", "description": "The first character to read. Default: 0.", "minimum": 0},
    ),
)
SWARM_TOOLS = (CREATE, ASSIGN, SWARM, READ)


@dataclass(frozen=True, slots=True)
class AgentKind:
    """A named configuration, from which any number of agents are started."""

    name: str
    system_prompt: str
    limits: Limits


@dataclass(slots=True)
class Staff:
    """The agents of a run: their configurations, how one is equipped, and what came of each."""

    work: Work
    open_tools: Callable[[str, str], AgentTools]  # (agent id, name of its configuration) -> what it can call
    limits_of: Callable[[str], Limits]  # by the name of a configuration
    brief: Callable[[AgentKind], str]  # -> the whole system prompt, what agents have in common first
    kinds: dict[str, AgentKind] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)  # whole, by reference: the agent's id
    endings: dict[str, Ending] = field(default_factory=dict)  # by agent id, in the order in which they ended
    num_started: int = 0
    num_stages: int = 0
    critical_steps: int = 0  # of the orchestrator's stages so far, without its own
    by_call: dict[str, list[str]] = field(default_factory=dict)  # the orchestrator's call id -> ids of its agents

    def create(self, name: str, system_prompt: str) -> AgentKind:
        """A new configuration. ToolError where the name is empty or taken."""
        if not name.strip():
            raise ToolError("the name is empty")
        if name in self.kinds:
            raise ToolError(f"there is an agent {name!r} already; assign tasks to it, or take another name")
        kind = self.kinds[name] = AgentKind(name, system_prompt, self.limits_of(name))
        if (name, system_prompt) not in self.work.replay.created:
            self.work.emitter.emit(lambda t_s: AgentCreated(t_s, name, system_prompt))
        return kind

    def kind(self, name: str) -> AgentKind:
        """The configuration of this name; ToolError with those there are."""
        if name not in self.kinds:
            known = ", ".join(self.kinds) or "none yet: create_subagent makes one"
            raise ToolError(f"there is no agent {name!r}; there are: {known}")
        return self.kinds[name]

    def keep(self, agent_id: str, ending: Ending) -> None:
        """What came of an agent."""
        self.endings[agent_id], self.results[agent_id] = ending, ending.text

    def take(self, known: AgentEnded) -> Ending:
        """An agent's end from the journal, with the agents that it started itself; all they did is counted."""
        work = self.work
        steps = [step for number in range(known.steps) if (step := work.replay.step(known.agent_id, number))]
        work.usage += known.usage
        work.steps += known.steps
        work.busy_s += sum(step.seconds for step in steps)
        ending = Ending(known.outcome, known.result, known.reason, known.usage, known.steps, known.critical_steps)
        self.keep(known.agent_id, ending)
        for child in work.replay.children(known.agent_id):
            self.num_started += 1
            if (end := work.replay.end(child)) is not None:
                self.take(end)
        return ending

    def shortened(self, reference: str, text: str) -> str:
        """The result, or its beginning and the reference to read on with."""
        most = self.work.settings.result_chars
        if len(text) <= most:
            return text
        return f"{text[:most]}\n{self._more(reference, most, len(text))}"

    def read(self, reference: str, offset: int = 0) -> str:
        """A piece of a result; ToolError where there is none."""
        if reference not in self.results:
            raise ToolError(f"there is no result {reference!r}; there are: {', '.join(self.results) or 'none'}")
        text, most = self.results[reference], self.work.settings.result_chars
        if offset >= len(text):
            raise ToolError(f"the result {reference} has {len(text):,} characters, numbers 0 to {len(text) - 1:,}")
        end = offset + most
        return text[offset:end] if end >= len(text) else f"{text[offset:end]}\n{self._more(reference, end, len(text))}"

    @staticmethod
    def _more(reference: str, offset: int, length: int) -> str:
        return (
            f'[The first {offset:,} of {length:,} characters; read_result(reference="{reference}", offset={offset}) '
            "reads on.]"
        )


class _Order(NamedTuple):
    """One agent to start."""

    agent_id: str
    kind: AgentKind
    prompt: str
    call_id: str


class SwarmTools:
    """What an agent that may start others can call: `SWARM_TOOLS`, and its own tools."""

    def __init__(self, staff: Staff, agent_id: str, own: AgentTools, depth: int) -> None:
        """depth: of the agents that it starts, 1 for the orchestrator's."""
        self._staff, self._agent_id, self._own, self._depth = staff, agent_id, own, depth
        self._num_started = 0  # by this agent

    @property
    def declarations(self) -> Sequence[Message]:
        return [*(tool.declaration for tool in SWARM_TOOLS), *self._own.declarations]

    def starts_agents(self, calls: Sequence[ToolCall]) -> bool:
        return any(call.name in (ASSIGN.name, SWARM.name) for call in calls)

    async def run(self, calls: Sequence[ToolCall]) -> Results:
        """All at the same time. Agents get their numbers in the calls' order, before any of them starts."""
        work = self._staff.work
        prepared = [self._prepare(call) for call in calls]
        orders = [order for each in prepared if isinstance(each, list) for order in each]
        stage = self._begin_stage(orders)
        tasks = {order.agent_id: work.start(self._run_agent(order, stage)) for order in orders}
        own_calls = {call.id: work.start(self._call_own(call)) for call in calls if not _is_swarm(call)}
        await asyncio.gather(*tasks.values(), *own_calls.values(), return_exceptions=True)
        endings = {agent_id: self._ended(agent_id, task) for agent_id, task in tasks.items()}
        own = {call_id: task.result() for call_id, task in own_calls.items()}
        critical_steps = max((ending.critical_steps for ending in endings.values()), default=0)
        self._end_stage(stage, orders, endings)
        texts, seconds = [], 0.0
        for call, each in zip(calls, prepared, strict=True):
            if isinstance(each, str):
                texts.append(each)
            elif isinstance(each, list):
                texts.append(self._told(call, each, endings))
            else:
                texts.append(own[call.id].texts[0])
                seconds += own[call.id].seconds
        return Results(texts, seconds, critical_steps)

    def _prepare(self, call: ToolCall) -> str | list[_Order] | None:
        """A result that is there at once, agents to start, or None for the agent's own tools."""
        tool = next((tool for tool in SWARM_TOOLS if tool.name == call.name), None)
        if tool is None:
            return None
        try:
            arguments = well_formed(read_arguments(call.arguments, tool.parameters))
            if tool is CREATE:
                kind = self._staff.create(**arguments)
                return f"Created {kind.name}. There are: {', '.join(self._staff.kinds)}."
            if tool is READ:
                return self._staff.read(**arguments)
            if tool is ASSIGN:
                return [self._order(call, arguments["agent"], arguments["prompt"])]
            return self._orders(call, **arguments)
        except ToolError as error:
            return f"Error: {error}"

    def _orders(self, call: ToolCall, agent: str, prompt_template: str, items: Sequence[Any]) -> list[_Order]:
        if ITEM not in prompt_template:
            raise ToolError(f"the prompt_template has no {ITEM}")
        if not all(isinstance(item, str) for item in items):
            raise ToolError("items must be texts")
        if not LEAST_ITEMS <= len(items) <= MOST_ITEMS or len(set(items)) < len(items):
            raise ToolError(f"items must be {LEAST_ITEMS} to {MOST_ITEMS}, each one different; there are {len(items)}")
        self._require_places(len(items))
        return [self._order(call, agent, prompt_template.replace(ITEM, item)) for item in items]

    def _order(self, call: ToolCall, agent: str, prompt: str) -> _Order:
        kind = self._staff.kind(agent)
        if not prompt.strip():
            raise ToolError("the prompt is empty")
        self._require_places(1)
        self._num_started += 1
        self._staff.num_started += 1
        prefix = "a" if self._agent_id == ORCHESTRATOR else f"{self._agent_id}."
        order = _Order(f"{prefix}{self._num_started}", kind, prompt, call.id)
        if self._agent_id == ORCHESTRATOR:
            self._staff.by_call.setdefault(call.id, []).append(order.agent_id)
        return order

    def _require_places(self, number: int) -> None:
        most, started = self._staff.work.settings.max_agents, self._staff.num_started
        if started + number > most:
            raise ToolError(
                f"{counted(number, 'more agent')} cannot be started: {started} of the run's {most} were. Go on with "
                "the results there are"
            )

    def _begin_stage(self, orders: Sequence[_Order]) -> int:
        """The number of the stage; only the orchestrator's calls begin one."""
        staff = self._staff
        if self._agent_id != ORCHESTRATOR or not orders:
            return max(staff.num_stages - 1, 0)
        stage, staff.num_stages = staff.num_stages, staff.num_stages + 1
        names = tuple(order.agent_id for order in orders)
        staff.work.emitter.emit(lambda t_s: StageStarted(t_s, stage, names))
        return stage

    def _end_stage(self, stage: int, orders: Sequence[_Order], endings: Mapping[str, Ending]) -> None:
        staff = self._staff
        if self._agent_id != ORCHESTRATOR or not orders:
            return
        slowest = max(endings, key=lambda agent_id: endings[agent_id].critical_steps)
        staff.critical_steps += endings[slowest].critical_steps
        names = tuple(order.agent_id for order in orders)
        staff.work.emitter.emit(lambda t_s: StageEnded(t_s, stage, names, staff.critical_steps, slowest))

    def _ended(self, agent_id: str, task: asyncio.Task) -> Ending:
        """How an agent ended; the run may stop before it has begun."""
        if agent_id in self._staff.endings:
            return self._staff.endings[agent_id]
        if task.cancelled() and self._staff.work.is_stopping:
            return Ending("cancelled", "", "the run was stopped before it began")
        return task.result()

    async def _run_agent(self, order: _Order, stage: int) -> Ending:
        """Start the agent, or take its end from the journal."""
        staff, work, kind = self._staff, self._staff.work, order.kind
        own = staff.open_tools(order.agent_id, kind.name)
        tools: Tools = own
        if self._depth < work.settings.max_depth:
            tools = SwarmTools(staff, order.agent_id, own, self._depth + 1)
        messages = [
            {"role": "system", "content": staff.brief(kind)},
            {"role": "user", "content": order.prompt},
        ]
        key = prompt_key(work, messages, tools)
        is_known = work.replay.is_started(order.agent_id, key)
        if known := work.replay.end(order.agent_id) if is_known else None:
            ending = staff.take(known)
        else:
            if not is_known:
                started = (order.agent_id, kind.name, order.prompt, stage, order.call_id, self._agent_id, key)
                work.emitter.emit(lambda t_s: AgentStarted(t_s, *started))
            ending = await Agent(work, order.agent_id, messages, tools, kind.limits, work.settings.fuller_below).run()
            work.emitter.emit(
                lambda t_s: AgentEnded(
                    t_s,
                    order.agent_id,
                    ending.outcome,
                    ending.reason,
                    ending.text,
                    ending.usage,
                    ending.steps,
                    ending.critical_steps,
                )
            )
        staff.keep(order.agent_id, ending)
        return ending

    async def _call_own(self, call: ToolCall) -> Results:
        try:
            return await self._own.run([call])
        except asyncio.CancelledError:
            if not self._staff.work.is_stopping:
                raise
            return Results(["Error: the run was stopped"])

    def _told(self, call: ToolCall, orders: Sequence[_Order], endings: Mapping[str, Ending]) -> str:
        """What the caller is told of the agents of one call."""
        if call.name == ASSIGN.name:
            return self._result(orders[0], endings[orders[0].agent_id])
        items = well_formed(json.loads(call.arguments)["items"])
        rows = [
            f"<subagent agent_id={quoteattr(order.agent_id)} item={quoteattr(item)} "
            f'outcome="{_word(endings[order.agent_id])}">{escape(self._result(order, endings[order.agent_id]))}'
            "</subagent>"
            for order, item in zip(orders, items, strict=True)
        ]
        num_completed = sum(endings[order.agent_id].outcome == "completed" for order in orders)
        summary = f"<summary>completed: {num_completed}, failed: {len(orders) - num_completed}</summary>"
        return "\n".join(["<agent_swarm_result>", summary, *rows, "</agent_swarm_result>"])

    def _result(self, order: _Order, ending: Ending) -> str:
        text = self._staff.shortened(order.agent_id, ending.text)
        if ending.outcome == "completed":
            return text
        said = f" What it said last:\n{text}" if text else " It said nothing."
        return f"The agent did not complete its task ({ending.outcome}): {ending.reason}.{said}"


def _is_swarm(call: ToolCall) -> bool:
    return any(call.name == tool.name for tool in SWARM_TOOLS)


def _word(ending: Ending) -> str:
    """kimi-code's words for outcomes."""
    return {"completed": "completed", "cancelled": "aborted"}.get(ending.outcome, "failed")
