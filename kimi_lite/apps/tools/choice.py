"""From the options `--tools`, `--mcp-config` and `--allow` to a box of tools."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

from kimi_lite.errors import KimiLiteError
from kimi_lite.options import Options
from kimi_lite.terminal import Console

if TYPE_CHECKING:
    from kimi_lite.apps.tools.box import ToolBox


def open_tools(options: Options) -> "ToolBox | None":
    """The tools that are asked for; None where none are."""
    if options.tools_folder is None and options.mcp_config is None:
        if options.allowed_tools:
            raise KimiLiteError(
                "--allow names tools, and there are none.", "Say --tools FOLDER or --mcp-config FILE, too."
            )
        return None
    from kimi_lite.apps.tools.box import ToolBox

    err = Console(stderr=True)
    # Servers may be installed first.
    is_waiting = options.mcp_config is not None and err.is_terminal and not options.is_quiet
    with err.status("[dim]starting MCP servers") if is_waiting else nullcontext():
        return ToolBox.open(options.tools_folder, options.mcp_config, options.allowed_tools)
