"""`mcp.json` as other programs have it: `{"mcpServers": {name: {command, args, env} | {url, headers}}}`; VS Code's
`{"servers": ...}` and `{"mcp": {"servers": ...}}`, comments and trailing commas included. For `apps.tools.box`."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import read_text

_KEYS = ("mcpServers", "servers", "context_servers")
_VARIABLE = re.compile(r"\$\{(?:env:)?(\w+)(?::-([^}]*))?\}")
_INPUT = re.compile(r"\$\{input:([^}]*)\}")
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_STRING_OR_LAST_COMMA = re.compile(r'"(?:\\.|[^"\\\n])*"|,(?=\s*[}\]])', re.DOTALL)
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
        document = _loads(read_text(path.expanduser(), "The MCP configuration"))
    except KimiLiteError as error:
        raise KimiLiteError(error.message, error.hint or _EXAMPLE) from error
    except (ValueError, RecursionError) as error:
        raise KimiLiteError(f"The MCP configuration {path} is no JSON: {error}.", _EXAMPLE) from error
    entries = _entries(document)
    if entries is None:
        raise KimiLiteError(f'The MCP configuration {path} has no "mcpServers".', _EXAMPLE)
    return [_server(name, entry, path) for name, entry in entries.items() if not _is_disabled(entry)]


def _loads(text: str) -> Any:
    """JSON; where it is none, JSON with comments and trailing commas."""
    try:
        return json.loads(text)
    except ValueError as error:
        plain = _STRING_OR_COMMENT.sub(lambda match: match[0] if match[0][0] == '"' else " ", text)
        plain = _STRING_OR_LAST_COMMA.sub(lambda match: match[0] if match[0][0] == '"' else "", plain)
        try:
            return json.loads(plain)
        except ValueError:
            raise error from None  # its lines are those of the file


def _entries(document: Any) -> dict[str, Any] | None:
    """The servers by name, wherever the program that the file is from has them."""
    if not isinstance(document, dict):
        return None
    inner = document.get("mcp")
    found = [document[key] for key in _KEYS if key in document]
    found += [inner[key] for key in _KEYS if key in inner] if isinstance(inner, dict) else []
    if not found or not all(isinstance(entries, dict) for entries in found):
        return None
    return {name: entry for entries in reversed(found) for name, entry in entries.items()}


def _server(name: str, entry: object, path: Path) -> McpServer:
    entry = entry if isinstance(entry, dict) else {}
    texts, many, pairs = ("command", "url", "cwd", "type"), ("args",), ("env", "headers")
    is_right = (
        all(isinstance(entry.get(key, ""), str) for key in texts)
        and all(isinstance(entry.get(key, []), list) for key in many)
        and all(isinstance(entry.get(key, {}), dict) for key in pairs)
        and all(_is_plain(value) for key in many for value in entry.get(key, []))
        and all(_is_plain(value) for key in pairs for value in entry.get(key, {}).values())
        and bool(entry.get("command")) != bool(entry.get("url"))
    )
    if not is_right:
        need = 'a "command" with "args" and "env", or a "url" with "headers"'
        raise KimiLiteError(f"MCP server {name!r} in {path} needs {need}.", _EXAMPLE)
    if asked := _INPUT.search(json.dumps(entry)):
        raise KimiLiteError(
            f"MCP server {name!r} in {path} takes ${{input:{asked[1]}}}, which VS Code asks for.",
            "Put it into the environment and write ${env:NAME} in its place.",
        )
    return McpServer(
        name=name,
        command=os.path.expanduser(_expanded(entry.get("command", ""))),
        args=tuple(_expanded(str(arg)) for arg in entry.get("args", [])),
        env={str(key): _expanded(str(value)) for key, value in entry.get("env", {}).items()},
        cwd=os.path.expanduser(_expanded(entry["cwd"])) if entry.get("cwd") else None,
        url=_expanded(entry.get("url", "")),
        headers={str(key): _expanded(str(value)) for key, value in entry.get("headers", {}).items()},
        is_sse=entry.get("type") == "sse",
    )


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)


def _is_disabled(entry: Any) -> bool:
    return isinstance(entry, dict) and (bool(entry.get("disabled")) or entry.get("enabled") is False)


def _expanded(text: str) -> str:
    """`${NAME}`, `${env:NAME}` and `${NAME:-default}` from the environment, so that keys need not stand in the file."""
    return _VARIABLE.sub(lambda match: os.environ.get(match[1], match[2] or ""), text)
