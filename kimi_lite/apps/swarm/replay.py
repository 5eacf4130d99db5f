"""What a run has done already, by the events of its journal: a resumed run takes it from here and does the rest.

Answers, results of tools and ends of agents are each found by who they belong to; an event that comes again supersedes
the one before. An agent whose work is determined otherwise now (another `prompt_key`) has done nothing yet, and what
its parents made of its result has not been said.
"""

from collections.abc import Iterable
from typing import NamedTuple

from kimi_lite.apps.swarm.events import (
    ORCHESTRATOR,
    AgentCreated,
    AgentEnded,
    AgentStarted,
    AgentStep,
    Event,
    OrchestratorStep,
    RunEnded,
    RunStarted,
    ToolEnded,
    ToolStarted,
)

Step = AgentStep | OrchestratorStep


class _Placed(NamedTuple):
    """An event with its place in the journal."""

    place: int
    event: Event


class Replay:
    """Of one run; empty for a new one."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.started: RunStarted | None = None
        self.ended: RunEnded | None = None  # the last end, which a resumed run leaves behind
        self.last_s = 0.0
        self.created: set[tuple[str, str]] = set()  # (name, system prompt)
        self._agents: dict[str, _Placed] = {}  # AgentStarted by agent id, where it first stands with this key
        self._steps: dict[str, dict[int, _Placed]] = {}  # by agent id and number
        self._ends: dict[str, _Placed] = {}
        self._calls: dict[tuple[str, str], ToolEnded] = {}  # by agent id and call id
        self._begun: set[tuple[str, str]] = set()  # calls of tools
        for place, event in enumerate(events):
            self._add(place, event)
            self.last_s = max(self.last_s, event.t_s)

    def step(self, agent_id: str, number: int) -> Step | None:
        """The agent's answer of this number, from 0."""
        found = self._steps.get(agent_id, {}).get(number)
        return None if found is None else found.event

    def is_started(self, agent_id: str, prompt_key: str) -> bool:
        """Whether the agent was started for the same work. If it was for another, that is forgotten."""
        known = self._agents.get(agent_id)
        if known is None:
            return False
        if known.event.prompt_key == prompt_key:
            return True
        self._forget(agent_id, known)
        return False

    def end(self, agent_id: str) -> AgentEnded | None:
        """How the agent ended; None where it did not, or only because the run was stopped."""
        found = self._ends.get(agent_id)
        return None if found is None or found.event.outcome == "cancelled" else found.event

    def children(self, agent_id: str) -> list[str]:
        """The ids of the agents that it started."""
        return [name for name, placed in self._agents.items() if placed.event.parent == agent_id]

    def call(self, agent_id: str, call_id: str) -> ToolEnded | None:
        """What came of a call of a tool."""
        return self._calls.get((agent_id, call_id))

    def is_cut_off(self, agent_id: str, call_id: str) -> bool:
        """Whether a call was begun and what came of it is not known."""
        return (agent_id, call_id) in self._begun and (agent_id, call_id) not in self._calls

    def _add(self, place: int, event: Event) -> None:
        match event:
            case RunStarted():
                self.started = event
            case RunEnded():
                self.ended = event
            case AgentCreated():
                self.created.add((event.name, event.system_prompt))
            case AgentStarted():
                if event.agent_id not in self._agents or not self.is_started(event.agent_id, event.prompt_key):
                    self._agents[event.agent_id] = _Placed(place, event)
            case AgentStep() | OrchestratorStep():
                agent_id = event.agent_id if isinstance(event, AgentStep) else ORCHESTRATOR
                steps = self._steps.setdefault(agent_id, {})
                for later in [number for number in steps if number >= event.step]:
                    del steps[later]
                steps[event.step] = _Placed(place, event)
            case AgentEnded():
                self._ends[event.agent_id] = _Placed(place, event)
            case ToolStarted():
                self._begun.add((event.agent_id, event.call_id))
            case ToolEnded() if event.outcome != "cancelled":
                self._calls[event.agent_id, event.call_id] = event
            case _:
                pass

    def _forget(self, agent_id: str, started: _Placed) -> None:
        """All that the agent did, and what its parents said since it was started."""
        self._steps.pop(agent_id, None)
        self._ends.pop(agent_id, None)
        del self._agents[agent_id]
        for calls in (self._calls, self._begun):
            for key in [key for key in calls if key[0] == agent_id]:
                calls.pop(key) if isinstance(calls, dict) else calls.remove(key)
        parent = started.event.parent
        while True:
            steps = self._steps.get(parent, {})
            for number in [number for number, placed in steps.items() if placed.place > started.place]:
                del steps[number]
            self._ends.pop(parent, None)
            if parent not in self._agents:
                return
            parent = self._agents[parent].event.parent
