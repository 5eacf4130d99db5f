"""MCP servers, through the official `mcp` package: start or reach them, list their tools, call them.

The package is asynchronous and the rest of the program is not, so its event loop runs in a thread. Each server has one
task that opens it, keeps it and closes it: the package's contexts must be left where they were entered.
"""

import asyncio
import re
import tempfile
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import asynccontextmanager
from typing import Any

from kimi_lite import __version__
from kimi_lite.apps.tools.mcp_config import McpServer
from kimi_lite.apps.tools.tool import Run, ShouldStop, Tool, ToolError
from kimi_lite.errors import KimiLiteError

START_S, CALL_S, CLOSE_S = 60.0, 120.0, 8.0
MOST_PAGES = 20
POLL_S = 0.05


class McpServers:
    """Connections to several servers. `problems` has a sentence for each that could not be used."""

    def __init__(self, servers: Sequence[McpServer], start_s: float = START_S, call_s: float = CALL_S) -> None:
        try:
            import mcp  # noqa: F401
        except ImportError as error:
            raise KimiLiteError(
                "MCP servers need the package mcp, which is not installed.", "pip install 'mcp>=2'"
            ) from error
        self._start_s, self._call_s = start_s, call_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True)
        self._thread.start()
        self.problems: list[str] = []
        self.tools: list[Tool] = []
        self._connections = [_Connection(server) for server in servers]
        for connection in self._connections:  # all at once, then wait for each
            self._begin(connection.run())
        end_s = time.monotonic() + start_s
        for connection in self._connections:
            self._await_ready(connection, max(end_s - time.monotonic(), 0.0))

    def close(self) -> None:
        """End all connections and the servers that were started."""
        if self._thread.is_alive():
            for connection in self._connections:
                self._loop.call_soon_threadsafe(connection.is_over.set)
            ends = self._begin(_gather([connection.ended.wait() for connection in self._connections]))
            try:
                ends.result(CLOSE_S)
            except (NotYet, OSError):
                ends.cancel()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_S)

    def _begin(self, work: Coroutine[Any, Any, Any]) -> Future:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _await_ready(self, connection: "_Connection", timeout_s: float) -> None:
        """Wait until it is open and its tools are known, or note why not."""
        try:
            self._begin(asyncio.wait_for(connection.ready.wait(), timeout_s)).result()
        except TimeoutError:
            self._loop.call_soon_threadsafe(connection.is_over.set)
            connection.problem = f"it did not answer within {self._start_s:g} s"
        if connection.problem:
            self.problems.append(f"MCP server {connection.server.name} is left out: {connection.problem}.")
            return
        for tool in connection.listed:
            schema = tool.input_schema if isinstance(tool.input_schema, dict) else {}
            run = self._runner(connection, tool.name)
            self.tools.append(Tool(_native(tool.name), tool.description or "", schema, run, connection.server.name))

    def _runner(self, connection: "_Connection", name: str) -> Run:
        def run(arguments: dict[str, Any], should_stop: ShouldStop) -> str:
            future = self._begin(connection.call(name, arguments, self._call_s))
            while True:
                try:
                    return future.result(POLL_S)
                except NotYet:
                    if should_stop():
                        future.cancel()
                        raise ToolError("stopped by the user") from None

        return run


class _Connection:
    """One server; everything but the constructor runs in the loop's thread."""

    def __init__(self, server: McpServer) -> None:
        self.server = server
        self.ready, self.is_over, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.problem = ""
        self.listed: list[Any] = []  # the server's tools
        self._client: Any = None

    async def run(self) -> None:
        """From opening to closing."""
        from mcp import Client, Implementation

        info = Implementation(name="kimi-lite", version=__version__)
        with tempfile.TemporaryFile() as errors:
            try:
                async with Client(_transport(self.server, errors), client_info=info) as client:
                    self.listed, self._client = await _list_tools(client), client
                    self.ready.set()
                    await self.is_over.wait()
            except BaseException as error:
                self.problem = self.problem or _reason(error, _last_line(errors))
                if isinstance(error, asyncio.CancelledError):
                    raise
            finally:
                self._client = None
                self.ready.set()
                self.ended.set()

    async def call(self, name: str, arguments: dict[str, Any], timeout_s: float) -> str:
        """The result as text; ToolError where there is none."""
        if self._client is None:
            raise ToolError(f"the MCP server {self.server.name} is gone: {self.problem or 'it ended'}")
        try:
            result = await asyncio.wait_for(self._client.call_tool(name, arguments), timeout_s)
        except TimeoutError as error:
            raise ToolError(f"no answer within {timeout_s:g} s") from error
        except Exception as error:  # whatever the package or the server makes of the call
            raise ToolError(_reason(error)) from error
        text = "\n".join(map(_content_text, result.content)) or "(no output)"
        if result.is_error:
            raise ToolError(text)
        return text


@asynccontextmanager
async def _transport(server: McpServer, errors: Any):
    """The package's streams to a server. What a program writes to stderr goes to a file: the terminal is the user's."""
    if server.command:
        from mcp import StdioServerParameters, stdio_client

        start = StdioServerParameters(
            command=server.command, args=list(server.args), env=dict(server.env) or None, cwd=server.cwd
        )
        async with stdio_client(start, errlog=errors) as streams:
            yield streams
    elif server.is_sse:
        from mcp.client.sse import sse_client

        async with sse_client(server.url, headers=dict(server.headers)) as streams:
            yield streams
    else:
        from httpx2 import AsyncClient, Timeout  # what `mcp` itself depends on
        from mcp.client.streamable_http import streamable_http_client

        http = AsyncClient(headers=dict(server.headers), timeout=Timeout(START_S, read=CALL_S))
        async with http, streamable_http_client(server.url, http_client=http) as streams:
            yield streams


async def _list_tools(client: Any) -> list[Any]:
    tools, cursor = [], None
    for _ in range(MOST_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools, cursor = [*tools, *page.tools], page.next_cursor
        if not cursor:
            break
    return tools


async def _gather(waits: Sequence[Coroutine[Any, Any, Any]]) -> None:
    await asyncio.gather(*waits)


def _content_text(content: Any) -> str:
    """Text as it is; of anything else its kind and size, which is all that a text can say."""
    if content.type == "text":
        return content.text
    resource = getattr(content, "resource", None)
    if getattr(resource, "text", None) is not None:
        return resource.text
    data = getattr(content, "data", None) or getattr(resource, "blob", None) or ""
    uri = getattr(content, "uri", None) or getattr(resource, "uri", None) or ""
    size = f" of {len(data) * 3 // 4 - data[-2:].count('='):,} bytes" if data else ""
    return f"[{content.type}{size}{f' {uri}' if uri else ''}: not text, not shown]"


def _native(name: str) -> str:
    """A name that Kimi's call ids can carry."""
    return re.sub(r"[^\w.\-]", "_", name, flags=re.ASCII)


def _reason(error: BaseException, said: str = "") -> str:
    """The innermost cause in one line, and what the program said last."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, FileNotFoundError):
        text = f"there is no program {error.filename or 'of that name'}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:300]}{f' ({said})' if said else ''}".rstrip(".")


def _last_line(errors: Any) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read()[-4096:].decode("utf-8", "replace").split("\n") if line.strip()]
    return lines[-1][:200] if lines else ""
