"""`mcp.json` as other programs have it: `{"mcpServers": {name: {command, args, env} | {url, headers}}}`. For
`apps.tools.box`."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import read_text

_VARIABLE = re.compile(r"\$\{(?:env:)?(\w+)(?::-([^}]*))?\}")
_EXAMPLE = 'It looks like {"mcpServers": {"files": {"command": "npx", "args": ["-y", "some-mcp-server"]}}}.'


@dataclass(frozen=True, slots=True)
class McpServer:
    """How to reach one server: a program to start, or an address."""

    name: str
    command: str = ""
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold keys
    is_sse: bool = False  # the older transport over HTTP


def read_mcp_config(path: Path) -> list[McpServer]:
    """The servers of a file that are not disabled; KimiLiteError naming what is wrong in it."""
    try:
        document = json.loads(read_text(path.expanduser(), "The MCP configuration"))
    except ValueError as error:
        raise KimiLiteError(f"The MCP configuration {path} is no JSON: {error}.", _EXAMPLE) from error
    servers = document.get("mcpServers", document.get("servers")) if isinstance(document, dict) else None
    if not isinstance(servers, dict):
        raise KimiLiteError(f'The MCP configuration {path} has no "mcpServers".', _EXAMPLE)
    return [_server(name, entry, path) for name, entry in servers.items() if not _is_disabled(entry)]


def _server(name: str, entry: object, path: Path) -> McpServer:
    entry = entry if isinstance(entry, dict) else {}
    texts, many, pairs = ("command", "url", "cwd", "type"), ("args",), ("env", "headers")
    is_right = (
        all(isinstance(entry.get(key, ""), str) for key in texts)
        and all(isinstance(entry.get(key, []), list) for key in many)
        and all(isinstance(entry.get(key, {}), dict) for key in pairs)
        and bool(entry.get("command")) != bool(entry.get("url"))
    )
    if not is_right:
        need = 'a "command" with "args" and "env", or a "url" with "headers"'
        raise KimiLiteError(f"MCP server {name!r} in {path} needs {need}.", _EXAMPLE)
    return McpServer(
        name=name,
        command=_expanded(entry.get("command", "")),
        args=tuple(_expanded(str(arg)) for arg in entry.get("args", [])),
        env={str(key): _expanded(str(value)) for key, value in entry.get("env", {}).items()},
        cwd=entry.get("cwd"),
        url=_expanded(entry.get("url", "")),
        headers={str(key): _expanded(str(value)) for key, value in entry.get("headers", {}).items()},
        is_sse=entry.get("type") == "sse",
    )


def _is_disabled(entry: Any) -> bool:
    return isinstance(entry, dict) and bool(entry.get("disabled"))


def _expanded(text: str) -> str:
    """`${NAME}`, `${env:NAME}` and `${NAME:-default}` from the environment, so that keys need not stand in the file."""
    return _VARIABLE.sub(lambda match: os.environ.get(match[1], match[2] or ""), text)
