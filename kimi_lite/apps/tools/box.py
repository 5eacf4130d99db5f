"""All tools of a conversation: what is declared to the model, and calls with everything that can be wrong with them.

with ToolBox.open(Path("."), Path("mcp.json"), allow=["read_file"]) as box:
    session.ask("...", tools=box.declarations)
    text = box.call(call, ask)
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kimi_lite.apps.tools.confirm import Ask, Question
from kimi_lite.apps.tools.tool import Tool, ToolError, read_arguments, shortened
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.tool_calls import ToolCall


class Stopped(Exception):
    """The user wants no more calls."""


class ToolBox:
    """Tools by name. `notes` are remarks for the user: servers left out, tools renamed."""

    def __init__(self, tools: Sequence[Tool], allow: Iterable[str] = (), notes: Sequence[str] = ()) -> None:
        self.tools: dict[str, Tool] = {}
        self.notes = list(notes)
        for tool in tools:
            self._add(tool)
        self.allowed = set(allow)
        self._require_known(self.allowed)
        self._is_stopped = threading.Event()
        self._closes: list[Callable[[], None]] = []

    @classmethod
    def open(cls, folder: Path | None = None, mcp_config: Path | None = None, allow: Iterable[str] = ()) -> "ToolBox":
        """The built-in tools if there is a folder for them, and those of MCP servers. `allow` ("*": all) are not asked
        for."""
        tools, notes, servers = [], [], None
        if folder is not None:
            from kimi_lite.apps.tools.files import file_tools
            from kimi_lite.apps.tools.folder import Folder
            from kimi_lite.apps.tools.python import isolation, python_tool

            runner = python_tool(isolation())
            tools = [*file_tools(Folder(folder)), runner]
            notes = [f"run_python is {risk}." for risk in runner.risks]
        if mcp_config is not None:
            from kimi_lite.apps.folders import state_folder
            from kimi_lite.apps.tools.mcp_client import McpServers
            from kimi_lite.apps.tools.mcp_config import read_mcp_config

            named = read_mcp_config(mcp_config)
            servers = McpServers(named, state_folder() / "mcp")
            tools, notes = [*tools, *servers.tools], [*notes, *servers.problems]
            notes += [] if named else [f"{mcp_config} names no MCP server that is switched on."]
        try:
            box = cls(tools, allow, notes)
        except KimiLiteError:
            if servers:
                servers.close()
            raise
        box._closes += [servers.close] if servers else []
        return box

    @property
    def declarations(self) -> list[dict[str, Any]]:
        """For `Conversation.ask`."""
        return [tool.declaration for tool in self.tools.values()]

    def call(self, call: ToolCall, ask: Ask) -> str:
        """The result for the model, an error's text included. `ask` says whether to run a tool that is not allowed yet.

        Raises Stopped when the user wants no more of this answer's calls.
        """
        self._is_stopped.clear()
        try:
            tool, arguments = self._find(call)
            self._permit(tool, arguments, ask)
            text = tool.run(arguments, self._is_stopped.is_set)
        except Stopped:
            raise
        except ToolError as error:
            text = f"Error: {error}"
        except Exception as error:  # a tool's bug is not the conversation's
            text = f"Error: {type(error).__name__}: {error}"
        return shortened(text.encode("utf-8", "replace").decode())

    def is_allowed(self, name: str) -> bool:
        """Whether it runs without a question. "*" does not allow what this system does not confine."""
        return name in self.allowed or ("*" in self.allowed and not self.tools[name].risks)

    def allow(self, name: str) -> None:
        """Let it run without a question."""
        self.allowed.add(name)

    def disallow(self, name: str) -> None:
        """Ask before it runs, also where all were allowed."""
        self.allowed = {one for one in self.tools if one != name and self.is_allowed(one)}

    def cancel(self) -> None:
        """Stop the call that is running; from a signal handler or another thread."""
        self._is_stopped.set()

    def close(self) -> None:
        """End the servers."""
        while self._closes:
            self._closes.pop()()

    def __enter__(self) -> "ToolBox":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _find(self, call: ToolCall) -> tuple[Tool, dict[str, Any]]:
        tool = self.tools.get(call.name)
        if tool is None:
            raise ToolError(f"there is no tool {call.name!r}; there are: {', '.join(self.tools) or 'none'}")
        return tool, read_arguments(call.arguments, tool.parameters)

    def _permit(self, tool: Tool, arguments: Mapping[str, Any], ask: Ask) -> None:
        if self.is_allowed(tool.name):
            return
        permission = ask(Question(tool.name, arguments, tool.risks))
        if permission == "stop":
            raise Stopped
        if permission == "no":
            raise ToolError("the user did not allow this call. Do not repeat it; go on without it or ask")
        if permission == "always":
            self.allow(tool.name)

    def _add(self, tool: Tool) -> None:
        """Under its own name; where that is taken with its server's name before it."""
        name = tool.name
        if name in self.tools:
            name = f"{tool.origin or 'other'}__{tool.name}"
            self.notes.append(
                f"There are two tools {tool.name}; that of {tool.origin or 'another server'} is called {name}."
            )
        while name in self.tools:
            name += "_"
        self.tools[name] = replace(tool, name=name)

    def _require_known(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name != "*" and name not in self.tools]
        if unknown:
            known = ", ".join(self.tools) or "none"
            raise KimiLiteError(
                f"There is no tool {', '.join(sorted(unknown))} to allow.", f"There are: {known}; * means all."
            )
