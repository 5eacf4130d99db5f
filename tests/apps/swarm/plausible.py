"""Runs as a swarm may emit them: every event in an order that could happen, with numbers that could be.

python -m tests.apps.swarm.plausible 100     # plays one on this terminal, a hundred times as fast as it would be
"""

import random
import sys
import time
from collections.abc import Iterator, Sequence

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
    RunStarted,
    StageEnded,
    StageStarted,
    ToolEnded,
    ToolStarted,
    Totals,
    Usage,
    Warned,
)

NAMES = ("researcher", "writer", "reviewer of everything that the others have written", "翻译者", "coder")
PROMPTS = ("Find the papers on mixture of experts.", "Write it down.\nIn two\tparagraphs.", "校对所有文本")
OUTCOMES = ("completed", "completed", "completed", "completed", "failed", "step_limit", "looping", "time_limit")


class Run:
    """Emits the events of one run. The same numbers, the same run."""

    def __init__(
        self, num_agents: int = 8, num_stages: int = 2, seed: int = 0, names: Sequence[str] = NAMES, text: str = ""
    ) -> None:
        self._random, self._names, self._text = random.Random(seed), names, text
        self._num_agents, self._num_stages = num_agents, num_stages
        self._t_s, self._usage, self._steps, self._critical = 0.0, Usage(), 0, 0

    def events(self, is_whole: bool = True) -> Iterator[Event]:
        task = self._text or "Compare the memory that ten mixture-of-experts models need, and say which fit into 256 GB"
        yield RunStarted(0.0, "2026-11-29_02-10-45", task, {"max_parallel": 8}, "0.1", "2026-11-29T02:10:45+00:00")
        yield from (AgentCreated(self._later(), name, f"You are a {name}. {self._text}") for name in self._names)
        first = 1
        for stage in range(self._num_stages):
            ids = [f"a{first + i}" for i in range(self._num_agents)]
            first += len(ids)
            yield from self._say(ORCHESTRATOR, 0, [("assign_task", len(ids))], stage)
            yield StageStarted(self._later(), stage, tuple(ids))
            yield from self._stage(stage, ids)
            yield StageEnded(self._later(), stage, tuple(ids), self._critical)
        yield from self._say(ORCHESTRATOR, 0, [], self._num_stages)
        if is_whole:
            totals = Totals(first - 1, self._steps, self._critical, self._usage, self._t_s, self._t_s * 2.5)
            yield RunEnded(self._later(), "completed", self._text or "Three fit: **A**, B and C.\n\n- as said", totals)

    def _stage(self, stage: int, ids: list[str]) -> Iterator[Event]:
        for agent_id in ids:
            name, prompt = self._random.choice(self._names), self._text or self._random.choice(PROMPTS)
            yield AgentStarted(
                self._later(),
                agent_id,
                name,
                prompt,
                stage,
                f"assign_task:{agent_id}",
                ORCHESTRATOR,
                "5d41402abc4b2a76",
            )
        at_work = {agent_id: self._work(agent_id) for agent_id in ids}
        self._critical += 4
        while at_work:
            agent_id = self._random.choice(sorted(at_work))
            event = next(at_work[agent_id], None)
            if event is None:
                del at_work[agent_id]
            else:
                yield event

    def _work(self, agent_id: str) -> Iterator[Event]:
        steps = self._random.randint(1, 3)
        for step in range(steps):
            is_last = step == steps - 1
            yield from self._say(agent_id, 3, [] if is_last else [("read_file", 1)], step)
            if not is_last:
                yield from self._call(agent_id, step)
        if self._random.random() < 0.1:
            yield FileConflict(self._later(), "board/notes.md", (agent_id, "a1"))
        if self._random.random() < 0.05:
            yield Warned(self._later(), self._text or "http://one.example answers 429; 4 at a time from now on")
        outcome = self._random.choice(OUTCOMES)
        reason = "" if outcome == "completed" else self._text or "it did not come to an end within 3 steps"
        result = self._text or f"{agent_id} found {self._random.randint(2, 99)} things.\nThe first is a table."
        yield AgentEnded(self._later(), agent_id, outcome, reason, result, Usage(900 * steps, 300, 60 * steps), steps)

    def _say(self, agent_id: str, num_progress: int, calls: list[tuple[str, int]], step: int) -> Iterator[Event]:
        yield AgentProgress(self._later(), agent_id, "queued")
        prompt, cached = self._random.randint(500, 9000), self._random.randint(0, 400)
        yield AgentProgress(self._later(), agent_id, "reading", cached, prompt, cached)
        for i in range(num_progress):
            yield AgentProgress(
                self._later(), agent_id, "generating", prompt, prompt, cached, 20 * i + 1, self._random.uniform(2, 9)
            )
        usage, self._steps = Usage(prompt, cached, 20 * num_progress), self._steps + 1
        self._usage += usage
        made = [
            {
                "id": f"functions.{name}:{i}",
                "type": "function",
                "function": {"name": name, "arguments": '{"path": "x"}'},
            }
            for name, num in calls
            for i in range(num)
        ]
        message = {"role": "assistant", "content": "" if made else self._text or "All is said."}
        message |= {"tool_calls": made} if made else {}
        if agent_id == ORCHESTRATOR:
            yield OrchestratorStep(self._later(), step, message, usage)
        else:
            yield AgentStep(self._later(), agent_id, step, message, usage)

    def _call(self, agent_id: str, step: int) -> Iterator[Event]:
        call_id, arguments = f"functions.read_file:{step}", self._text or '{"path": "models/a.md", "first_line": 1}'
        yield ToolStarted(self._later(), agent_id, call_id, "read_file", arguments)
        yield AgentProgress(self._later(), agent_id, "tool")
        outcome = self._random.choice(["completed", "completed", "failed", "cancelled"])
        yield ToolEnded(self._later(), agent_id, call_id, "read_file", outcome, self._text or "12 lines: # A", 0.03)

    def _later(self) -> float:
        self._t_s = round(self._t_s + self._random.expovariate(20), 4)
        return self._t_s


def main() -> None:
    """Play a run."""
    from kimi_lite.apps.swarm.view import open_view
    from kimi_lite.terminal import Console

    num_agents, speed = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    with open_view(Console(stderr=True), is_plain="--plain" in sys.argv) as view:
        before_s = 0.0
        for event in Run(num_agents).events():
            time.sleep(max(event.t_s - before_s, 0.0) / speed)
            before_s = event.t_s
            view(event)


if __name__ == "__main__":
    main()
