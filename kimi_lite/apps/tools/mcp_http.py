"""HTTP to MCP servers with bounds: no answer and no event of a stream may be longer than a program's line, and none may
come compressed, where a few bytes become many."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from httpx2 import AsyncByteStream, AsyncClient, RemoteProtocolError, Request, Response, Timeout  # what `mcp` needs

from kimi_lite.apps.tools.mcp_keeper import MOST_LINE_BYTES

_ENDS_OF_EVENTS = (b"\n\n", b"\r\n\r\n", b"\r\r")


def bounded_client(
    headers: Mapping[str, str] | None = None, timeout: Timeout | None = None, auth: Any = None
) -> AsyncClient:
    """A client for the transports of `mcp`. RemoteProtocolError, while reading, for an answer that is too long."""
    hooks = {"request": [_ask_for_plain], "response": [_bound]}
    return AsyncClient(headers=dict(headers or {}), timeout=timeout, auth=auth, event_hooks=hooks)


async def _ask_for_plain(request: Request) -> None:
    request.headers["accept-encoding"] = "identity"


async def _bound(response: Response) -> None:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise RemoteProtocolError("the server compresses though it was asked not to")
    is_events = response.headers.get("content-type", "").startswith("text/event-stream")
    response.stream = _BoundedStream(response.stream, is_events)


class _BoundedStream(AsyncByteStream):
    """What comes, counted: an event's bytes where it consists of events, else all."""

    def __init__(self, inner: Any, is_events: bool) -> None:
        self._inner, self._is_events = inner, is_events

    async def __aiter__(self) -> AsyncIterator[bytes]:
        count, end = 0, b""
        async for piece in self._inner:
            count += len(piece)
            if self._is_events:
                seen = end + piece
                last = max(seen.rfind(mark) for mark in _ENDS_OF_EVENTS)
                count = count if last < 0 else len(seen) - last
                end = seen[-3:]
            if count > MOST_LINE_BYTES:
                raise RemoteProtocolError(f"the server sent more than {MOST_LINE_BYTES:,} bytes at once")
            yield piece

    async def aclose(self) -> None:
        await self._inner.aclose()
