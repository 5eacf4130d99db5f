"""MCP servers: real ones, started over stdio or reached over HTTP, and those that are not there."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_lite.apps.tools.mcp_client import McpServers
from kimi_lite.apps.tools.mcp_config import McpServer, read_mcp_config
from kimi_lite.apps.tools.tool import Tool, ToolError
from kimi_lite.errors import KimiLiteError

pytest.importorskip("mcp")
SCRIPT = str(Path(__file__).with_name("mcp_server.py"))


@pytest.fixture(scope="module")
def servers() -> Iterator[McpServers]:
    entries = [
        McpServer("tests", sys.executable, (SCRIPT,), {"SET_BY_CONFIG": "yes"}),
        McpServer("gone", "no-such-program-here"),
        McpServer("broken", sys.executable, ("-c", "import sys; sys.exit('no configuration')")),
        McpServer("nowhere", url="http://127.0.0.1:9/mcp"),
    ]
    servers = McpServers(entries, start_s=60.0)
    yield servers
    servers.close()


@pytest.fixture
def tools(servers: McpServers) -> dict[str, Tool]:
    return {tool.name: tool for tool in servers.tools}


def run(tool: Tool, **arguments: object) -> str:
    return tool.run(arguments, lambda: False)


def test_the_servers_that_work_are_used_and_the_others_named(servers: McpServers) -> None:
    assert [tool.name for tool in servers.tools] == ["add", "fail", "sleep", "picture", "environment", "die"]
    gone, broken, nowhere = servers.problems
    assert gone == "MCP server gone is left out: there is no program no-such-program-here."
    assert broken.startswith("MCP server broken is left out: ")
    assert "(no configuration)" in broken
    assert nowhere.startswith("MCP server nowhere is left out: ")


def test_calls(tools: dict[str, Tool]) -> None:
    assert tools["add"].description == "Add two numbers."
    assert tools["add"].parameters["required"] == ["a", "b"]
    assert run(tools["add"], a=1, b=2) == "3"
    assert run(tools["picture"]) == "[image of 8 bytes: not text, not shown]"
    with pytest.raises(ToolError, match="fail"):
        run(tools["fail"])
    with pytest.raises(ToolError, match="integer"):
        run(tools["add"], a="x", b=2)


def test_a_server_has_the_environment_of_its_entry(tools: dict[str, Tool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tools["environment"], name="SET_BY_CONFIG") == "yes"
    assert run(tools["environment"], name="OPENAI_API_KEY") == "unset"


def test_a_call_can_be_stopped_and_takes_no_longer_than_allowed(servers: McpServers, tools: dict[str, Tool]) -> None:
    end_s = time.monotonic() + 0.3
    with pytest.raises(ToolError, match="stopped"):
        tools["sleep"].run({"seconds": 1.0}, lambda: time.monotonic() > end_s)
    servers._call_s, before = 0.3, servers._call_s
    with pytest.raises(ToolError, match=r"within 0\.3 s"):
        run(tools["sleep"], seconds=1.0)
    servers._call_s = before


def test_a_server_that_ends_is_an_error_for_the_model() -> None:
    servers = McpServers([McpServer("tests", sys.executable, (SCRIPT,))])
    tools = {tool.name: tool for tool in servers.tools}
    for name in ("die", "fail"):
        with pytest.raises(ToolError, match="closed"):
            run(tools[name])
    began_s = time.monotonic()
    servers.close()
    servers.close()
    assert time.monotonic() - began_s < 5.0


def test_over_http() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        servers = McpServers([McpServer("web", url=f"http://127.0.0.1:{port}/mcp", headers={"X-Test": "1"})])
        assert servers.problems == []
        assert run({tool.name: tool for tool in servers.tools}["add"], a=20, b=22) == "42"
        servers.close()
    finally:
        process.kill()
        process.wait()


def test_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "t0ken")
    path = tmp_path / "mcp.json"
    path.write_text(
        """{"mcpServers": {
        "files": {"command": "npx", "args": ["-y", "server", "${HOME_OF_NOBODY:-/tmp}"], "env": {"A": "${TOKEN}"}},
        "web": {"url": "https://x/mcp", "headers": {"Authorization": "Bearer ${env:TOKEN}"}},
        "old": {"type": "sse", "url": "https://x/sse"},
        "off": {"command": "x", "disabled": true}}}"""
    )
    files, web, old = read_mcp_config(path)
    assert (files.name, files.command, files.args, files.env) == (
        "files",
        "npx",
        ("-y", "server", "/tmp"),
        {"A": "t0ken"},
    )
    assert (web.url, web.headers, web.is_sse) == ("https://x/mcp", {"Authorization": "Bearer t0ken"}, False)
    assert "t0ken" not in repr(web)
    assert old.is_sse


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "no JSON"),
        ("[]", 'no "mcpServers"'),
        ('{"mcpServers": {"x": {}}}', "'x'.*needs"),
        ('{"mcpServers": {"x": {"command": "a", "url": "b"}}}', "'x'.*needs"),
        ('{"mcpServers": {"x": {"command": "a", "args": "b"}}}', "'x'.*needs"),
    ],
)
def test_mistakes_in_the_configuration(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mcp.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(KimiLiteError, match=message) as caught:
        read_mcp_config(path)
    assert "mcpServers" in caught.value.hint
