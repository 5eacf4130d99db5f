"""Agents that use real MCP servers (the `mcp` package) at the same time, and files of one folder."""

import json
import sys
from pathlib import Path

import pytest

from kimi_lite.apps.swarm.events import AgentEnded, FileConflict, ToolEnded, ToolStarted, Warned
from kimi_lite.apps.swarm.permissions import Permissions
from kimi_lite.apps.swarm.settings import SwarmSettings
from tests.apps.swarm.scripted import Asked, Say, ScriptedBackend, assign, create, run_swarm

pytest.importorskip("mcp", reason="needs the mcp package")
SERVER = Path(__file__).parents[1] / "tools" / "mcp_server.py"
NUM_AGENTS = 4


@pytest.fixture
def mcp_config(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("KIMI_LITE_STATE", str(tmp_path / "state"))
    servers = {name: {"command": sys.executable, "args": [str(SERVER)]} for name in ("one", "two")}
    servers["gone"] = {"command": "no-such-program-here", "args": []}
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": servers}))
    return path


def is_agents_answer(asked: Asked, number: int) -> bool:
    return not asked.settings.is_orchestrator and asked.num_said == number


def test_agents_use_mcp_servers_at_once_and_each_gets_its_own_results(tmp_path: Path, mcp_config: Path) -> None:
    """Two servers with the same tools: those of the second are named after it."""

    def agents(asked: Asked) -> Say | str:
        number = int(asked.prompt)
        server = "two__" if number % 2 else ""
        steps = (
            Say("", ((f"{server}sleep", {"seconds": 1}), (f"{server}add", {"a": number, "b": 100}))),
            Say("", ((f"{server}fail", {}), ("add", {"a": "x"}))),
        )
        return steps[asked.num_said] if asked.num_said < 2 else " | ".join(asked.results) + "." * 200

    def answer(asked: Asked) -> Say | str:
        if asked.settings.is_orchestrator:
            calls = tuple(assign("a", str(number)) for number in range(NUM_AGENTS))
            return "the end" if asked.num_said else Say("", (create("a"), *calls))
        return agents(asked)

    permissions = Permissions.from_tables({"default": {"tools": ["*add", "*sleep", "*fail"]}}, "test")
    outcome = run_swarm(
        tmp_path / "run",
        ScriptedBackend(answer, meet=lambda asked: NUM_AGENTS if is_agents_answer(asked, 0) else 0),
        settings=SwarmSettings(max_parallel=NUM_AGENTS),
        permissions=permissions,
        mcp_config=mcp_config,
    )
    assert outcome.ended.outcome == "completed"
    for number, ended in enumerate(sorted(outcome.of(AgentEnded), key=lambda each: each.agent_id)):
        awake, total, failure, wrong = ended.result.rstrip(".").split(" | ")
        assert (awake, total) == ("awake", str(number + 100))
        assert failure.startswith("Error: ")
        assert "tool fail" in failure
        assert wrong == "Error: required argument(s) missing: b"
    calls = [each for each in outcome.events if isinstance(each, ToolStarted | ToolEnded)]
    assert all(isinstance(each, ToolStarted) for each in calls[:NUM_AGENTS])  # all sleep before the first is awake
    assert any("gone" in each.text for each in outcome.of(Warned))


def test_two_agents_that_write_one_file_are_told(tmp_path: Path) -> None:
    """Both read it, then both write: the second write is refused until that agent has read again."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "shared.txt").write_text("old\n")
    read = ("read_file", {"path": "shared.txt"})

    def agents(asked: Asked) -> Say | str:
        write = ("write_file", {"path": "shared.txt", "text": f"by {asked.prompt}\n"})
        steps = (Say("", (read,)), Say("", (write,)), Say("", (read,)), Say("", (write,)))
        return steps[asked.num_said] if asked.num_said < 4 else " | ".join(asked.results) + "." * 200

    def answer(asked: Asked) -> Say | str:
        if asked.settings.is_orchestrator:
            return "the end" if asked.num_said else Say("", (create("a"), assign("a", "x"), assign("a", "y")))
        return agents(asked)

    permissions = Permissions.from_tables({"default": {"tools": ["read_file", "write_file"]}}, "test")
    backend = ScriptedBackend(answer, meet=lambda asked: 2 if is_agents_answer(asked, 1) else 0)
    outcome = run_swarm(tmp_path / "run", backend, permissions=permissions, work_folder=folder)
    conflicts = outcome.of(FileConflict)
    assert conflicts
    assert all(each.path == "shared.txt" and set(each.agents) == {"a1", "a2"} for each in conflicts)
    refused = [each for each in outcome.of(ToolEnded) if each.outcome == "failed"]
    assert len(refused) == len(conflicts)
    assert (folder / "shared.txt").read_text() in ("by x\n", "by y\n")
