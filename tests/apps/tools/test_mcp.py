"""MCP servers: real ones, started over stdio or reached over HTTP, and those that are not there."""

import asyncio
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_lite.apps.tools.mcp_client import McpServers
from kimi_lite.apps.tools.mcp_config import McpServer, read_mcp_config
from kimi_lite.apps.tools.tool import Tool, ToolError, check_arguments
from kimi_lite.errors import KimiLiteError

pytest.importorskip("mcp")
SCRIPT = str(Path(__file__).with_name("mcp_server.py"))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[McpServers]:
    entries = [
        McpServer("tests", sys.executable, (SCRIPT,), {"SET_BY_CONFIG": "yes"}),
        McpServer("gone", "no-such-program-here"),
        McpServer("broken", sys.executable, ("-c", "import sys; sys.exit('no configuration')")),
        McpServer("nowhere", url="http://127.0.0.1:9/mcp"),
    ]
    servers = McpServers(entries, tmp_path_factory.mktemp("log"), start_s=60.0)
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


def test_a_server_that_ends_is_an_error_for_the_model(tmp_path: Path) -> None:
    servers = McpServers([McpServer("tests", sys.executable, (SCRIPT,))], tmp_path)
    tools = {tool.name: tool for tool in servers.tools}
    for name in ("die", "fail"):
        with pytest.raises(ToolError, match="closed"):
            run(tools[name])
    began_s = time.monotonic()
    servers.close()
    servers.close()
    assert time.monotonic() - began_s < 30.0


def test_over_http(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        servers = McpServers([McpServer("web", url=f"http://127.0.0.1:{port}/mcp", headers={"X-Test": "1"})], tmp_path)
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
        ('{"mcpServers": {"x": {"command": "a", "args": [["b"]]}}}', "'x'.*needs"),
        ('{"mcpServers": {"x": {"command": "a", "env": {"b": {}}}}}', "'x'.*needs"),
        ('{"servers": {"x": {"command": "a", "env": {"KEY": "${input:key}"}}}}', "input:key"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_mistakes_in_the_configuration(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mcp.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(KimiLiteError, match=message) as caught:
        read_mcp_config(path)
    assert "mcpServers" in caught.value.hint or "${env:NAME}" in caught.value.hint


BAD = str(Path(__file__).with_name("bad_mcp_server.py"))


def bad_server(mode: str) -> tuple[McpServer, str]:
    """It, and a mark by which what it starts is known."""
    mark = f"{1000 + os.getpid() / 1e8 + time.monotonic() % 1:.12f}"
    return McpServer("bad", sys.executable, (BAD, mode, mark)), mark


def is_gone(mark: str) -> bool:
    end_s = time.monotonic() + 40.0
    while time.monotonic() < end_s:
        if not any(mark in (process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("mode", ["hangs", "hangs in list", "hangs in calls", "leaves a child"])
def test_what_hangs_is_ended_with_all_that_it_started(tmp_path: Path, mode: str) -> None:
    server, mark = bad_server(mode)
    servers = McpServers([server], tmp_path, start_s=60.0 if "call" in mode or "child" in mode else 1.5, call_s=0.5)
    if servers.tools:
        with pytest.raises(ToolError, match=r"within 0\.5 s|closed"):
            run(servers.tools[0])
    else:
        assert servers.problems == ["MCP server bad is left out: it did not answer within 1.5 s."]
    began_s = time.monotonic()
    servers.close()
    assert time.monotonic() - began_s < 30.0
    assert is_gone(mark)


@pytest.mark.parametrize("mode", ["hangs in calls", "hangs"])
def test_nothing_is_left_when_the_program_is_killed(tmp_path: Path, mode: str) -> None:
    server, mark = bad_server(mode)
    code = (
        "import sys, threading\nfrom pathlib import Path\nfrom kimi_lite.apps.tools.mcp_client import McpServers\n"
        "from kimi_lite.apps.tools.mcp_config import McpServer\n"
        f"servers = McpServers([McpServer('bad', sys.executable, {server.args!r})], Path({str(tmp_path)!r}))\n"
        "servers.tools[0].run({}, lambda: False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    end_s = time.monotonic() + 120.0
    while not any(p.info["cmdline"] == ["sleep", mark] for p in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < end_s
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert is_gone(mark)


def test_noise_goes_to_a_log_of_bounded_size(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for mode in ("noise", "log"):
        servers = McpServers([bad_server(mode)[0]], tmp_path / mode)
        assert [tool.name for tool in servers.tools] == ["t"]
        assert len(run(servers.tools[0])) == 100_000
        servers.close()
        logs = {path.name: path.stat() for path in (tmp_path / mode).iterdir()}
        assert logs["bad.log"].st_mode & 0o777 == 0o600
        assert 0 < sum(log.st_size for log in logs.values()) < 4 * 1024**2
    assert b"no JSON" in (tmp_path / "noise" / "bad.log").read_bytes()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("mode", "problem"),
    [
        ("dies", r"is left out: .*\(.*fatal\)\.$"),
        ("refuses", "is left out: .*no"),
        ("endless line", "is left out: .*line of more than 16,777,216 bytes"),
        ("many", "4744 tools are left out"),
        ("large", "1 tools are left out"),
        ("endless pages", None),
        ("schemas", "is left out: .*valid"),
        ("names", None),
    ],
)
def test_bad_servers_are_sentences(tmp_path: Path, mode: str, problem: str | None) -> None:
    servers = McpServers([bad_server(mode)[0]], tmp_path, start_s=60.0)
    try:
        assert len(servers.problems) == (problem is not None)
        assert problem is None or re.search(problem, servers.problems[0]), servers.problems
        for tool in servers.tools:
            assert re.fullmatch(r"[\w.\-]{1,64}", tool.name, re.ASCII)
            assert tool.parameters["type"] == "object"
            check_arguments({}, tool.parameters)
    finally:
        servers.close()


def test_a_result_too_large_is_an_error(tmp_path: Path) -> None:
    servers = McpServers([bad_server("huge")[0]], tmp_path)
    assert servers.problems == []
    with pytest.raises(ToolError):
        run(servers.tools[0])
    servers.close()


class BadHttp(BaseHTTPRequestHandler):
    """Answers every request with what is too long, in the way that its path names."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        kind = "text/event-stream" if "event" in self.path else "application/json"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if "gzip" in self.path:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with suppress(OSError):
            if "gzip" in self.path:
                self.wfile.write(gzip.compress(b" " * 10_000_000))
            for _ in range(0 if "gzip" in self.path else 2000):
                self.wfile.write(b"data: " + b"x" * 100_000 if "event" in self.path else b" " * 100_000)
                type(self).num_sent += 1

    num_sent = 0

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize("path", ["json", "event", "gzip"])
def test_answers_without_end_over_http(tmp_path: Path, path: str) -> None:
    BadHttp.num_sent = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), BadHttp) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        began_s = time.monotonic()
        servers = McpServers(
            [McpServer("bad", url=f"http://127.0.0.1:{http.server_port}/{path}")], tmp_path, start_s=60.0
        )
        assert servers.tools == []
        assert len(servers.problems) == 1
        servers.close()
        http.shutdown()
    assert BadHttp.num_sent < 400  # of 2,000: it was not read to the end
    assert time.monotonic() - began_s < 55.0


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=8), st.sampled_from([b"\n\n", b"\r\n\r\n"]), st.integers(1, 9)
)
def test_events_are_bounded_one_by_one(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], end: bytes, piece: int
) -> None:
    """However they are cut: by the largest event, not by how many there are."""
    from kimi_lite.apps.tools import mcp_http

    monkeypatch.setattr(mcp_http, "MOST_LINE_BYTES", 50)
    data = b"".join(b"x" * size + end for size in sizes)

    async def pieces():
        for start in range(0, len(data), piece):
            yield data[start : start + piece]

    async def read() -> bytes:
        return b"".join([got async for got in mcp_http._BoundedStream(pieces(), True)])

    if max(sizes) > 50 + piece + len(end):
        with pytest.raises(mcp_http.RemoteProtocolError):
            asyncio.run(read())
    elif max(sizes) <= 50 - 2 * len(end) - piece:  # between them it depends on the cut
        assert asyncio.run(read()) == data


@pytest.mark.parametrize(
    "text",
    [
        '\ufeff{"servers": {"x": {"command": "a"}}}',
        '{"mcp": {"servers": {"x": {"command": "a"}}}}',
        '{"mcpServers": {}, "servers": {"x": {"command": "a"}}}',
        '{"context_servers": {"x": {"command": "a"}}, "theme": 5}',
        '{\n  // mine\n  "servers": {"x": {"command": "a", /**/ "args": ["//none", "/* nor this */",],},},\n}',
        '{"inputs": [], "servers": {"x": {"type": "stdio", "command": "a"}, "y": {"command": "b", "enabled": false}}}',
    ],
)
def test_configurations_of_other_programs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mcp.json"
    path.write_text(text, encoding="utf-8")
    (server,) = read_mcp_config(path)
    assert (server.name, server.command) == ("x", "a")
    assert server.args in ((), ("//none", "/* nor this */"))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["", "a", "b", "${A}", "stdio"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "mcpServers",
                    "servers",
                    "mcp",
                    "command",
                    "args",
                    "env",
                    "url",
                    "headers",
                    "cwd",
                    "type",
                    "disabled",
                    "x",
                ]
            ),
            inner,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(_JSON | st.text())
def test_any_configuration_is_read_or_a_sentence(tmp_path: Path, document: object) -> None:
    path = tmp_path / "mcp.json"
    path.write_bytes((document if isinstance(document, str) else json.dumps(document)).encode("utf-8", "surrogatepass"))
    problem = None
    try:
        servers = read_mcp_config(path)
    except KimiLiteError as error:
        problem = error
    if problem is not None:
        assert problem.message.endswith(".")
        assert problem.hint
    else:
        assert all(bool(server.command) != bool(server.url) or "${A}" in str(document) for server in servers)
