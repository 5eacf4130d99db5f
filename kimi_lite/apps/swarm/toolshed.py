"""The tools of a run: the board, the folder that `--dir` names, the Python runner and MCP servers, opened once, and of
them a box for each agent with what it may use."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kimi_lite.apps.folders import make_private, state_folder
from kimi_lite.apps.swarm.board import BOARD, SharedFiles
from kimi_lite.apps.swarm.events import Emitter, FileConflict
from kimi_lite.apps.swarm.permissions import Permissions
from kimi_lite.apps.tools.box import ToolBox
from kimi_lite.apps.tools.mcp_client import McpServers
from kimi_lite.apps.tools.mcp_config import read_mcp_config
from kimi_lite.apps.tools.python import isolation, python_tool
from kimi_lite.apps.tools.tool import Tool

_MOST_THREADS = 128  # calls of tools at the same time


class Toolshed:
    """Opened for a run, closed after it. Its tools may be used from any thread. `notes` are remarks for the user."""

    def __init__(
        self, emitter: Emitter, run_folder: Path, permissions: Permissions, folder: Path | None, mcp_config: Path | None
    ) -> None:
        """KimiLiteError where the folder or a server's file is not there, or a permission means no tool."""

        def on_conflict(path: str, agents: tuple[str, ...]) -> None:
            emitter.emit(lambda t_s: FileConflict(t_s, path, agents))

        self._permissions = permissions
        self._files = [SharedFiles(make_private(run_folder / BOARD), on_conflict, BOARD)]
        self._shared: list[Tool] = []
        self._servers: McpServers | None = None
        self.notes: list[str] = []
        self.threads = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="tool")
        if folder is not None:
            self._files.append(SharedFiles(folder, on_conflict))
            self._shared.append(python_tool(isolation()))
        try:
            if mcp_config is not None:
                self._servers = McpServers(read_mcp_config(mcp_config), state_folder() / "mcp")
                self._shared += self._servers.tools
                self.notes += self._servers.problems
            permissions.require_known(self._tools(""))
        except BaseException:
            self.close()
            raise

    def box(self, agent_id: str, name: str) -> ToolBox:
        """What an agent of the configuration `name` may use; it is asked for nothing."""
        tools = self._permissions.tools_of(name, self._tools(agent_id))
        box = ToolBox(tools)
        box.allowed = set(box.tools)
        return box

    def close(self) -> None:
        """End the servers; a second call does nothing."""
        if self._servers is not None:
            self._servers.close()
            self._servers = None
        self.threads.shutdown(wait=False, cancel_futures=True)

    def _tools(self, agent_id: str) -> Sequence[Tool]:
        return [*(tool for files in self._files for tool in files.tools(agent_id)), *self._shared]
