"""A small MCP server over stdio (or, with a port, streamable HTTP), made with the official package. Started by the
tests."""

import os
import sys
import time

from mcp.server import MCPServer
from mcp.server.mcpserver import Image

server = MCPServer("tests")


@server.tool()
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()
def fail() -> str:
    """Fails."""
    raise ValueError("on purpose")


@server.tool()
def sleep(seconds: float) -> str:
    """Waits."""
    time.sleep(seconds)
    return "awake"


@server.tool()
def picture() -> Image:
    """An image."""
    return Image(data=b"12345678", format="png")


@server.tool()
def environment(name: str) -> str:
    """A variable."""
    return os.environ.get(name, "unset")


@server.tool()
def die() -> str:
    """Ends the server."""
    os._exit(3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run(transport="streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
