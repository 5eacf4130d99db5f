"""Server-sent events, and answers that notice when nobody listens any more.

The first byte goes out at once, and while nothing is to be said (a long prompt is read) a sign of life does, since
clients and proxies give up on silent connections after minutes.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

KEEPALIVE_S = 5.0
KEEPALIVE = b": keepalive\n\n"
_POLL_S = 0.25
T = TypeVar("T")


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One event; `name` for APIs that give events one."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {text}\n\n".encode()


def stream(events: AsyncIterator[bytes], headers: dict[str, str] | None = None) -> StreamingResponse:
    """A response of server-sent events; a client that hangs up ends the iteration."""
    more = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
    return StreamingResponse(events, media_type="text/event-stream", headers=more)


async def with_keepalive(
    source: AsyncGenerator[T, None], sign: Callable[[], list[bytes]], every_s: float = KEEPALIVE_S
) -> AsyncGenerator[T | bytes, None]:
    """The source's items, and between them `sign()` whenever nothing came for `every_s`."""
    pending: asyncio.Task | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait({pending}, timeout=every_s)
            if not done:
                for piece in sign():
                    yield piece
                continue
            task, pending = pending, None
            try:
                item = task.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        await source.aclose()


async def unless_gone(request: Request, work: Awaitable[Response]) -> Response:
    """The response that `work` makes; when the client hangs up before, the work is cancelled."""
    task = asyncio.ensure_future(work)
    while True:
        done, _ = await asyncio.wait({task}, timeout=_POLL_S)
        if done:
            return task.result()
        if await request.is_disconnected():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return Response(status_code=499)
