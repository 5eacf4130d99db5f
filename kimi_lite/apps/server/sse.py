"""How answers are sent: as server-sent events or as one document, to clients that may leave or doze.

The first byte of a stream goes out at once, and while nothing is to be said (a long prompt is read) a sign of life
does, since clients and proxies give up on silent connections after minutes. A document cannot begin before it is
known, but JSON may have blanks in front: after a while the status 200 goes out and blanks follow. A client that hangs
up ends the work.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from kimi_lite.apps.server.errors import error_response

KEEPALIVE_S = 5.0  # without a byte of a stream
DOCUMENT_KEEPALIVE_S = 10.0  # without a byte of a document
KEEPALIVE = b": keepalive\n\n"  # a comment with an empty line: strict parsers stumble over a bare one
DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One event; `name` for APIs that give events one."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {dump(data)}\n\n".encode()


_LINE_ENDS = str.maketrans({char: f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"})


def dump(value: object) -> str:
    """JSON without blanks. Unicode's line ends are escaped: clients that split events into lines split there, too."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)


class EventStream(Response):
    """The events as they come, `sign()` whenever none came for a while. Its end closes `events`, however it ends."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], sign: Callable[[], bytes], every_s: float | None = None
    ) -> None:
        self.status_code, self.background = 200, None
        self._events, self._sign, self._every_s = events, sign, every_s or KEEPALIVE_S
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        sending, gone = asyncio.ensure_future(self._send_all(send)), asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _end(sending, gone)
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pending = asyncio.ensure_future(anext(self._events, None))
        try:
            while True:
                done, _ = await asyncio.wait({pending}, timeout=self._every_s)
                piece = pending.result() if done else self._sign()
                if piece is None:
                    break
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                if done:
                    pending = asyncio.ensure_future(anext(self._events, None))
        finally:
            await _end(pending)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Document(Response):
    """The JSON document that `work` makes, or what is to be said of its error. Leaving cancels the work."""

    def __init__(
        self, http: HttpRequest, work: Callable[[], Awaitable[dict[str, Any]]], every_s: float | None = None
    ) -> None:
        self.status_code, self.background = 200, None
        self._http, self._work, self._every_s = http, work, every_s or DOCUMENT_KEEPALIVE_S
        self.init_headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        work, gone = asyncio.ensure_future(self._respond()), asyncio.ensure_future(_until_gone(receive))
        has_begun = False
        try:
            while True:
                await asyncio.wait({work, gone}, timeout=self._every_s, return_when=asyncio.FIRST_COMPLETED)
                if work.done() or gone.done():
                    break
                if not has_begun:
                    headers = [(b"content-type", b"application/json")]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    has_begun = True
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
            if not work.done():
                return
            if has_begun:  # an error's status comes too late; its body does not
                await send({"type": "http.response.body", "body": work.result().body, "more_body": False})
            else:
                await work.result()(scope, receive, send)
        finally:
            await _end(work, gone)

    async def _respond(self) -> Response:
        try:
            return JSONResponse(await self._work())
        except Exception as error:
            return error_response(self._http, error)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future) -> None:
    """Cancel what still runs and wait for it."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
