"""MCP servers, through the official `mcp` package: start or reach them, list their tools, call them.

The package is asynchronous and the rest of the program is not, so its event loop runs in a thread. Each server has one
task that opens it, keeps it and closes it: the package's contexts must be left where they were entered. Programs run
under `mcp_keeper`, which ends them; what they and the package log goes to files.
"""

import asyncio
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import asynccontextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, BinaryIO

from kimi_lite import __version__
from kimi_lite.apps.folders import make_private
from kimi_lite.apps.tools.mcp_config import McpServer
from kimi_lite.apps.tools.mcp_keeper import MOST_LOG_BYTES, command
from kimi_lite.apps.tools.tool import Run, ShouldStop, Tool, ToolError, shortened
from kimi_lite.errors import KimiLiteError

START_S, CALL_S, CLOSE_S = 60.0, 120.0, 8.0
MOST_PAGES, MOST_TOOLS = 20, 256
LONGEST_NAME, LONGEST_DESCRIPTION, LONGEST_SCHEMA = 64, 8_000, 50_000  # characters
POLL_S = 0.05


class McpServers:
    """Connections to several servers. `problems` has a sentence for each that could not be used."""

    def __init__(
        self, servers: Sequence[McpServer], log_folder: Path, start_s: float = START_S, call_s: float = CALL_S
    ) -> None:
        """Open all; what was said meanwhile is in `log_folder`: NAME.log for a program, mcp.log for the package."""
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
        self._log = _PackageLog(make_private(log_folder) / "mcp.log")
        self._connections = [_Connection(server, log_folder) for server in servers]
        try:
            for connection in self._connections:  # all at once, then wait for each
                self._begin(connection.run())
            end_s = time.monotonic() + start_s
            for connection in self._connections:
                self._await_ready(connection, max(end_s - time.monotonic(), 0.0))
        except BaseException:  # Ctrl-C while they start
            self.close()
            raise

    def close(self) -> None:
        """End all connections and the servers that were started."""
        if self._thread.is_alive():
            for connection in self._connections:
                self._loop.call_soon_threadsafe(connection.end)
            ends = self._begin(_gather([connection.ended.wait() for connection in self._connections]))
            try:
                ends.result(CLOSE_S)
            except (NotYet, OSError):
                ends.cancel()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_S)
            self._log.close()

    def _begin(self, work: Coroutine[Any, Any, Any]) -> Future:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _await_ready(self, connection: "_Connection", timeout_s: float) -> None:
        """Wait until it is open and its tools are known, or note why not."""
        try:
            self._begin(asyncio.wait_for(connection.ready.wait(), timeout_s)).result()
        except TimeoutError:
            connection.problem = f"it did not answer within {self._start_s:g} s"
            self._loop.call_soon_threadsafe(connection.end)
        if connection.problem:
            self.problems.append(f"MCP server {connection.server.name} is left out: {connection.problem}.")
            return
        if not connection.listed:
            self.problems.append(f"MCP server {connection.server.name} has no tools.")
        left_out = len(connection.listed) - MOST_TOOLS
        for tool in connection.listed[:MOST_TOOLS]:
            schema = _schema(tool.input_schema)
            if len(json.dumps(schema)) > LONGEST_SCHEMA:
                left_out = max(left_out, 0) + 1
                continue
            description = shortened(tool.description or "", LONGEST_DESCRIPTION)
            run = self._runner(connection, tool.name)
            self.tools.append(Tool(_native(tool.name), description, schema, run, connection.server.name))
        if left_out > 0:
            name = connection.server.name
            self.problems.append(f"MCP server {name}: {left_out} tools are left out, too many or too large.")

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

    def __init__(self, server: McpServer, log_folder: Path) -> None:
        self.server, self._log_path = server, log_folder / f"{_native(server.name)}.log"
        self.ready, self.is_over, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.problem = ""
        self.listed: list[Any] = []  # the server's tools
        self._client: Any = None
        self._task: asyncio.Task | None = None

    def end(self) -> None:
        """Close it, or give up opening it."""
        self.is_over.set()
        if self._client is None and self._task is not None:
            self._task.cancel()

    async def run(self) -> None:
        """From opening to closing."""
        from mcp import Client, Implementation

        self._task = asyncio.current_task()
        info = Implementation(name="kimi-lite", version=__version__)
        with open(os.open(self._log_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "r+b") as errors:
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
                self._client = self._task = None
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
async def _transport(server: McpServer, errors: BinaryIO):
    """The package's streams to a server. What a program writes to stderr goes to a file: the terminal is the user's."""
    if server.command:
        from mcp import StdioServerParameters, stdio_client

        program, *arguments = command([_program(server), *server.args])
        start = StdioServerParameters(
            command=program,
            args=arguments,
            env=dict(server.env) or None,
            cwd=server.cwd,
            encoding_error_handler="replace",
        )
        async with stdio_client(start, errlog=errors) as streams:
            yield streams
    elif server.is_sse:
        from mcp.client.sse import sse_client

        from kimi_lite.apps.tools.mcp_http import bounded_client

        headers = dict(server.headers)
        async with sse_client(server.url, headers=headers, httpx_client_factory=bounded_client) as streams:
            yield streams
    else:
        from httpx2 import Timeout  # what `mcp` itself depends on
        from mcp.client.streamable_http import streamable_http_client

        from kimi_lite.apps.tools.mcp_http import bounded_client

        http = bounded_client(server.headers, Timeout(START_S, read=CALL_S))
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


def _program(server: McpServer) -> str:
    """Its command as a path; FileNotFoundError where there is none."""
    folder = os.path.dirname(server.command)
    path = server.command if not folder else os.path.join(server.cwd or "", server.command)
    found = shutil.which(path, path=server.env.get("PATH"))
    if found is None:
        raise FileNotFoundError(2, os.strerror(2), server.command)
    return os.path.abspath(found)


def _schema(schema: Any) -> dict[str, Any]:
    """What the server declares, as far as it is a schema of an object."""
    schema = dict(schema) if isinstance(schema, dict) else {}
    properties, required = schema.get("properties"), schema.get("required")
    properties = properties if isinstance(properties, dict) else {}
    named = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    known = {name: value for name, value in properties.items() if isinstance(value, dict)}
    return schema | {"type": "object", "properties": known} | ({"required": named} if named else {})


def _native(name: str) -> str:
    """A name that Kimi's call ids can carry."""
    return re.sub(r"[^\w.\-]", "_", name, flags=re.ASCII)[:LONGEST_NAME] or "tool"


class _PackageLog:
    """What `mcp` logs goes to a file of bounded size, and nothing of it to the terminal."""

    _NAMES = ("mcp", "client", "asyncio")

    def __init__(self, path: Path) -> None:
        self._handler = RotatingFileHandler(path, maxBytes=MOST_LOG_BYTES, backupCount=1, encoding="utf-8", delay=True)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        self._loggers = [(logger, logger.propagate) for logger in map(logging.getLogger, self._NAMES)]
        for logger, _ in self._loggers:
            logger.addHandler(self._handler)
            logger.propagate = False

    def close(self) -> None:
        for logger, is_propagating in self._loggers:
            logger.removeHandler(self._handler)
            logger.propagate = is_propagating
        self._handler.close()


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
