"""From the flags `--tools`, `--mcp-config` and `--allow` to a box of tools."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_lite.engine.conversation import Conversation
from kimi_lite.errors import KimiLiteError
from kimi_lite.terminal import Console

if TYPE_CHECKING:
    from kimi_lite.apps.tools.box import ToolBox


def open_tools(flags: Mapping[str, Any]) -> "ToolBox | None":
    """The tools that the flags ask for; None where they ask for none."""
    folder, config = (None if flags[name] is None else Path(flags[name]) for name in ("tools", "mcp_config"))
    if folder is None and config is None:
        if flags["allow"]:
            raise KimiLiteError(
                "--allow names tools, and there are none.", "Say --tools FOLDER or --mcp-config FILE, too."
            )
        return None
    from kimi_lite.apps.tools.box import ToolBox

    aside = Console(stderr=True)
    is_waiting = config is not None and aside.is_terminal and not flags["quiet"]  # servers may be installed first
    with aside.status("[dim]starting MCP servers") if is_waiting else nullcontext():
        return ToolBox.open(folder, config, flags["allow"] or ())


def require_place(session: Conversation) -> None:
    """Refuse tools for a model whose template cannot declare them."""
    if not session.can_call:
        raise KimiLiteError(f"The chat template of {session.info.name} has no place for tools.", "Leave --tools out.")
