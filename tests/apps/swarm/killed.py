"""Runs that kill themselves: `python -m tests.apps.swarm.killed FOLDER NUMBER`.

Each run is a child that sends itself SIGKILL at an event that chance chooses, before or after the journal has it, and
is begun again in the same folder until one comes to its end. A whole answer, a call or an agent that the journal has is
never asked for again: the model looks into the journal at every question.
"""

import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

from kimi_lite.apps.swarm.events import AgentEnded, AgentStep, OrchestratorStep, RunEnded, ToolEnded, Warned
from kimi_lite.apps.swarm.journal import Journal, read
from kimi_lite.apps.swarm.replay import Replay
from tests.apps.swarm.scripted import Asked, ScriptedBackend, run_swarm
from tests.apps.swarm.test_resume import PERMISSIONS, SETTINGS, answer, log_of


def attempt(folder: Path, chance: random.Random) -> None:
    """One process's part of a run; it may not return."""
    left, is_before = chance.randrange(1, 30), chance.random() < 0.5
    write = Journal.__call__

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(journal: Journal, event: object) -> None:
        nonlocal left
        left -= 1
        if left == 0 and is_before:
            kill()
        write(journal, event)
        if left == 0:
            kill()

    def asks(asked: Asked):
        replay = Replay(read(folder).events)
        if asked.agent_id != "orchestrator":
            assert replay.end(asked.agent_id) is None, (asked.agent_id, "is asked after its end")
        assert replay.step(asked.agent_id, asked.num_said) is None, (asked.agent_id, asked.num_said, "is asked again")
        return answer(asked)

    Journal.__call__ = counted
    run_swarm(folder, ScriptedBackend(asks, chance.randrange(1000)), settings=SETTINGS, permissions=PERMISSIONS)


def finish(folder: Path, seed: int) -> int:
    """Again and again until the run is done; how often it was killed."""
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                attempt(folder, random.Random(f"{seed} {kills}"))
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, (seed, kills)
            return kills
        kills += 1
        assert kills < 500, "it does not come forward"


def check(folder: Path) -> None:
    """The whole journal: everything stands in it once."""
    events = read(folder).events
    done = Counter()
    for event in events:
        match event:
            case AgentStep():
                done["step", event.agent_id, event.step] += 1
            case OrchestratorStep():
                done["step", "orchestrator", event.step] += 1
            case AgentEnded():
                done["end", event.agent_id] += 1
            case ToolEnded():
                done["call", event.agent_id, event.call_id] += 1
    assert set(done.values()) == {1}, [key for key, number in done.items() if number > 1]
    assert isinstance(events[-1], RunEnded)
    assert (events[-1].outcome, events[-1].answer) == ("completed", "the answer after 9")
    num_again = sum(isinstance(event, Warned) and "again" in event.text for event in events)
    assert sum(number - 1 for number in log_of(folder).values()) <= num_again


def main(root: Path, at_least: int) -> None:
    """Runs until so many kills were survived."""
    kills, seed = 0, 0
    while kills < at_least:
        folder = root / f"run{seed}"
        kills += finish(folder, seed)
        check(folder)
        seed += 1
    print(json.dumps({"kills": kills, "runs": seed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
