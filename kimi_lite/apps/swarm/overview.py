"""What is known of a run after its events so far: the agents, what each does and did, the stages, what went wrong.

The live view and the report read it; both give it events, one by one. It takes events in any order, and events that
miss others: a journal may have lost lines, and newer versions may write other ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from kimi_lite.apps.swarm.events import (
    ORCHESTRATOR,
    AgentCreated,
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
    StageStarted,
    State,
    ToolEnded,
    ToolStarted,
    Totals,
    Usage,
    Warned,
)


@dataclass(slots=True)
class Span:
    """A state of an agent from one time to another; `end_s` is None while it lasts."""

    state: State
    begin_s: float
    end_s: float | None = None


@dataclass(slots=True)
class Call:
    """A call of a tool; `ended` is None while it runs, or where a kill cut it off."""

    started: ToolStarted
    ended: ToolEnded | None = None
    is_cut_off: bool = False


@dataclass(slots=True)
class Agent:
    """One agent of the run, or its orchestrator."""

    id: str
    started: AgentStarted | None = None  # None for the orchestrator, and where the event is missing
    ended: AgentEnded | None = None
    progress: AgentProgress | None = None  # the last of the answer that it is at
    priority: int = 0
    steps: dict[int, AgentStep | OrchestratorStep] = field(default_factory=dict)  # by their numbers
    calls: list[Call] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Its id and the name of its configuration."""
        return self.id if self.started is None else f"{self.id} {self.started.name}"

    @property
    def state(self) -> State:
        if self.ended is not None:
            return "done"
        if not self.spans:
            return "queued"
        return self.spans[-1].state if self.spans[-1].end_s is None else "done"

    @property
    def call(self) -> Call | None:
        """The last that runs."""
        return next((one for one in reversed(self.calls) if one.ended is None and not one.is_cut_off), None)

    @property
    def begin_s(self) -> float:
        """Of its first event; 0 where there is none."""
        times = [self.started.t_s] if self.started is not None else [span.begin_s for span in self.spans[:1]]
        return times[0] if times else 0.0

    @property
    def usage(self) -> Usage:
        """Of the answers that are complete."""
        if self.ended is not None:
            return self.ended.usage
        return sum((step.usage for step in self.steps.values()), Usage())

    @property
    def num_generated(self) -> int:
        """With the answer it is at."""
        is_at_one = self.ended is None and self.progress is not None and self.state in ("reading", "generating")
        return self.usage.generated_tokens + (self.progress.generated_tokens if is_at_one else 0)

    @property
    def num_steps(self) -> int:
        return self.ended.steps if self.ended is not None else len(self.steps)

    def begin(self, state: State, t_s: float) -> None:
        """From now on its state is this one."""
        if self.spans and self.spans[-1].end_s is None:
            if self.spans[-1].state == state:
                return
            self.spans[-1].end_s = max(t_s, self.spans[-1].begin_s)
        if state != "done":
            self.spans.append(Span(state, t_s))

    def take_step(self, event: AgentStep | OrchestratorStep) -> None:
        """An answer is complete: its tokens are no longer those of progress."""
        self.steps[event.step], self.progress = event, None
        if self.state != "done":
            self.begin("queued", event.t_s)

    def busy_s(self, now_s: float) -> float:
        """How long it has read, generated and waited for tools: not the time it was queued."""
        return sum(
            (now_s if span.end_s is None else span.end_s) - span.begin_s
            for span in self.spans
            if span.state != "queued"
        )


@dataclass(slots=True)
class Stage:
    """Agents that ran at the same time; `ended` is None while it lasts."""

    index: int
    begin_s: float
    agent_ids: list[str] = field(default_factory=list)
    ended: StageEnded | None = None


class Overview:
    """`take` is a listener of events."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.started: RunStarted | None = None
        self.ended: RunEnded | None = None
        self.now_s = 0.0  # the latest time of an event
        self.resumed: list[RunResumed] = []
        self.created: dict[str, AgentCreated] = {}  # by name
        self.orchestrator = Agent(ORCHESTRATOR)
        self.agents: dict[str, Agent] = {}  # by id, in the order of their start
        self.stages: dict[int, Stage] = {}
        self.conflicts: list[FileConflict] = []
        self.warnings: list[Warned] = []
        for event in events:
            self.take(event)

    def take(self, event: Event) -> None:
        self.now_s = max(self.now_s, event.t_s)
        match event:
            case RunStarted():
                self.started = event
            case RunResumed():
                self._cut(event.t_s)
                self.resumed.append(event)
                self.ended = None
            case StageStarted():
                stage = self.stages.setdefault(event.index, Stage(event.index, event.t_s))
                stage.agent_ids += [one for one in event.agents if one not in stage.agent_ids]
            case StageEnded():
                self.stages.setdefault(event.index, Stage(event.index, event.t_s, list(event.agents))).ended = event
            case AgentCreated():
                self.created[event.name] = event
            case AgentStarted():
                self._begin_agent(event)
            case AgentProgress():
                agent = self.agent(event.agent_id)
                agent.progress, agent.priority = event, event.priority
                if agent.ended is None:
                    agent.begin(event.state, event.t_s)
            case AgentStep():
                self.agent(event.agent_id).take_step(event)
            case OrchestratorStep():
                self.orchestrator.take_step(event)
            case ToolStarted():
                agent = self.agent(event.agent_id)
                agent.calls.append(Call(event))
                agent.begin("tool", event.t_s)
            case ToolEnded():
                self._end_call(event)
            case AgentEnded():
                agent = self.agent(event.agent_id)
                agent.ended = event
                agent.begin("done", event.t_s)
            case FileConflict():
                self.conflicts.append(event)
            case Warned():
                self.warnings.append(event)
            case RunEnded():
                self.ended = event
                self._cut(event.t_s)

    def agent(self, agent_id: str) -> Agent:
        if agent_id == ORCHESTRATOR:
            return self.orchestrator
        return self.agents.setdefault(agent_id, Agent(agent_id))

    @property
    def all_agents(self) -> list[Agent]:
        """The orchestrator, then the agents."""
        return [self.orchestrator, *self.agents.values()]

    @property
    def running(self) -> list[Agent]:
        """Agents that have started and not ended, in the order of their start."""
        return [agent for agent in self.agents.values() if agent.ended is None]

    @property
    def first(self) -> Agent | None:
        """Of several agents that run, the one that goes before the others: its stage is expected to wait for it."""
        running = [agent for agent in self.running if agent.priority]
        return max(running, key=lambda agent: agent.priority) if len(running) > 1 else None

    @property
    def totals(self) -> Totals:
        """Those that the run told when it ended; before, those of the events so far."""
        if self.ended is not None:
            return self.ended.totals
        critical = [stage.ended.critical_steps for stage in self.stages.values() if stage.ended is not None]
        return Totals(
            agents=len(self.agents),
            steps=sum(agent.num_steps for agent in self.all_agents),
            critical_steps=max(critical, default=0),
            usage=sum((agent.usage for agent in self.all_agents), Usage()),
            seconds=self.now_s,
            sequential_s=sum(agent.busy_s(self.now_s) for agent in self.all_agents),
        )

    @property
    def critical_path(self) -> dict[int, str]:
        """For each stage the agent that it waited for: the last to end."""
        slowest: dict[int, Agent] = {}
        for agent in self.agents.values():
            if agent.ended is None or agent.started is None:
                continue
            other = slowest.get(agent.started.stage)
            if other is None or agent.ended.t_s > other.ended.t_s:
                slowest[agent.started.stage] = agent
        return {stage: agent.id for stage, agent in sorted(slowest.items())}

    def _begin_agent(self, event: AgentStarted) -> None:
        """Or go on with it after a resume: the steps that it has taken stay."""
        agent = self.agent(event.agent_id)
        agent.started = event if agent.started is None else agent.started
        if agent.ended is None:
            agent.begin("queued", event.t_s)
        stage = self.stages.setdefault(event.stage, Stage(event.stage, event.t_s))
        if event.agent_id not in stage.agent_ids:
            stage.agent_ids.append(event.agent_id)

    def _end_call(self, event: ToolEnded) -> None:
        agent = self.agent(event.agent_id)
        for call in reversed(agent.calls):
            if call.started.call_id == event.call_id and call.ended is None:
                call.ended = event
                break
        else:
            begin_s = max(event.t_s - event.seconds, 0.0)
            started = ToolStarted(begin_s, event.agent_id, event.call_id, event.tool, "")
            agent.calls.append(Call(started, event))
        if agent.ended is None and agent.call is None and agent.state == "tool":
            agent.begin("queued", event.t_s)

    def _cut(self, t_s: float) -> None:
        """Nothing runs any more."""
        for agent in self.all_agents:
            agent.begin("done", t_s)
            for call in agent.calls:
                call.is_cut_off = call.ended is None
