"""Whole runs of a swarm on servers that fail by seed: each ends with the right answer, or says why not."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kimi_lite.apps.swarm.backend import Message
from kimi_lite.apps.swarm.endpoints import EndpointChoice
from kimi_lite.apps.swarm.events import AgentEnded
from kimi_lite.apps.swarm.remote import RemoteBackend
from kimi_lite.apps.swarm.settings import Limits, SwarmSettings
from kimi_lite.tools.serve.faulty import FAULTS, Fault, FaultyServer
from tests.apps.swarm.clock import FakeClock
from tests.apps.swarm.scripted import Outcome, assign, create, run_swarm

PARTS = 6
RIGHT = "; ".join(f"part {i} is done" for i in range(PARTS))
QUICK = tuple(fault for fault in FAULTS if not fault.startswith("silence"))
SETTINGS = SwarmSettings(Limits(20), Limits(12), max_parallel=4, fuller_below=0)


def say(messages: Sequence[Message], tools: Sequence[Message]) -> Message:
    """As the orchestrator: create a kind of agent, give out every part that has no report yet, say the reports. As an
    agent: look at the board, then report."""
    results = [str(message["content"]) for message in messages if message["role"] == "tool"]
    names = {tool["function"]["name"] for tool in tools}
    if "assign_task" not in names:
        task = next(str(message["content"]) for message in messages if message["role"] == "user")
        has_looked = any("board" in text or "empty" in text for text in results)
        calls = [] if has_looked else [("board_list_files", {"depth": 1 + len(results)})]
        return spoken(f"{task} is done" if has_looked else "", calls, messages)
    reports = {text for text in results if text.endswith("is done")}
    left = [f"part {i}" for i in range(PARTS) if f"part {i} is done" not in reports]
    if not any(text.startswith("Created reader") for text in results):
        return spoken("", [create("reader")], messages)
    return spoken("" if left else "; ".join(sorted(reports)), [assign("reader", part) for part in left], messages)


def spoken(text: str, calls: Sequence[tuple[str, dict]], messages: Sequence[Message]) -> Message:
    number = sum(len(message.get("tool_calls") or ()) for message in messages)
    written = [
        {
            "id": f"functions.{name}:{number + i}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for i, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": text, **({"tool_calls": written} if written else {})}


@contextmanager
def served(server: FaultyServer) -> Iterator[str]:
    """In a thread: the run has an event loop of its own."""
    is_up, loop = threading.Event(), asyncio.new_event_loop()
    ending = asyncio.Event()

    async def serve() -> None:
        async with server.listening():
            is_up.set()
            await ending.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert is_up.wait(60)
        yield server.url
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join(60)
        loop.close()


def run(folder: Path, seed: int, chance: float, faults: Sequence[Fault] = QUICK, count: int = 2) -> Outcome:
    with ExitStack() as stack:
        servers = [FaultyServer(say, 100 * seed + i, chance, faults) for i in range(count)]
        choices = [EndpointChoice(stack.enter_context(served(server))) for server in servers]
        return run_swarm(folder, RemoteBackend(choices, clock=FakeClock(), seed=seed), settings=SETTINGS)


def test_without_faults_the_answer_is_right(tmp_path: Path) -> None:
    outcome = run(tmp_path, 0, 0.0)
    assert (outcome.ended.outcome, outcome.ended.answer) == ("completed", RIGHT)
    assert len(outcome.of(AgentEnded)) == PARTS


@pytest.mark.parametrize("seed", range(10))
def test_a_run_ends_right_or_with_its_reason(tmp_path: Path, seed: int) -> None:
    outcome = run(tmp_path, seed, 0.3)
    ended = outcome.ended
    assert ended.answer == RIGHT if ended.outcome == "completed" else ended.reason
    assert all(event.outcome == "completed" or event.reason for event in outcome.of(AgentEnded))


def test_spoiled_calls_are_made_again(tmp_path: Path) -> None:
    outcome = run(tmp_path, 3, 0.4, ["spoiled call"])
    assert (outcome.ended.outcome, outcome.ended.answer) == ("completed", RIGHT)


def test_servers_that_only_fail_end_the_run_with_a_sentence(tmp_path: Path) -> None:
    ended = run(tmp_path, 1, 1.0, ["500", "503", "reset", "cut"]).ended
    assert ended.outcome == "failed"
    assert "http://127.0.0.1" in ended.reason
    assert "It was asked" in ended.reason


def test_the_same_seed_ends_in_the_same_way(tmp_path: Path) -> None:
    """With one server, which sees the same questions whatever the order."""
    ends = [run(tmp_path / str(i), 5, 0.3, count=1).ended for i in range(2)]
    assert len({(ended.outcome, ended.answer, ended.totals.steps, ended.totals.agents) for ended in ends}) == 1
