"""Who may talk to the server: the Host header, the key, CORS. Plain ASGI, before anything else is looked at.

A page in the user's browser must not reach a server on 127.0.0.1: it can name it by a host name of its own (DNS
rebinding), so only hosts that the server goes by are answered, and no origin is allowed unless it was listed.
"""

import hmac
import json
from collections.abc import Collection
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_lite.apps.server.errors import ApiError

OPEN_PATHS = ("/", "/health", "/favicon.ico")  # without a key
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_METHODS, _HEADERS = (
    "GET, POST, DELETE, OPTIONS",
    "Authorization, Content-Type, X-Api-Key, Anthropic-Version, Anthropic-Beta",
)


class Guard:
    """api_keys: none means that anyone may ask. hosts: of the Host header, None: any. origins: CORS; "*": all."""

    def __init__(
        self, app: ASGIApp, api_keys: Collection[str], hosts: Collection[str] | None, origins: Collection[str]
    ) -> None:
        self._app, self._keys = app, [key.encode() for key in api_keys]
        self._hosts, self._origins = hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed_origin = origin if origin and ("*" in self._origins or origin in self._origins) else None
        send = _with_headers(send, [*_request_ids(), *_cors_headers(allowed_origin)])
        try:
            self._check(scope, headers, origin, allowed_origin)
        except ApiError as error:
            await _answer(send, scope["path"], headers, error)
            return
        if scope["method"] == "OPTIONS" and allowed_origin:
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers, origin: str | None, allowed_origin: str | None) -> None:
        host = _host_name(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            raise ApiError(403, "This host name is not one that the server goes by.", "host_not_allowed")
        if origin and not allowed_origin and _host_name(origin.partition("://")[2]) not in (self._hosts or (host,)):
            raise ApiError(403, "Pages of this origin may not use the server.", "origin_not_allowed")
        is_preflight = scope["method"] == "OPTIONS" and allowed_origin is not None
        if self._keys and not is_preflight and scope["path"] not in OPEN_PATHS and not self._is_known(headers):
            raise ApiError(401, "The API key is missing or wrong.", "invalid_api_key")

    def _is_known(self, headers: Headers) -> bool:
        """All keys are compared, in constant time each."""
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        given_bytes = given.encode("utf-8", "surrogateescape")
        return sum(hmac.compare_digest(given_bytes, key) for key in self._keys) > 0


def _host_name(host: str) -> str:
    """Without the port; an IPv6 address without its brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _cors_headers(origin: str | None) -> list[tuple[bytes, bytes]]:
    if origin is None:
        return []
    values = {"access-control-allow-origin": origin, "access-control-allow-methods": _METHODS, "vary": "Origin"}
    values["access-control-allow-headers"] = _HEADERS
    return [(name.encode(), value.encode()) for name, value in values.items()]


def _request_ids() -> list[tuple[bytes, bytes]]:
    """One id under the names that OpenAI's, Anthropic's and the vendor's clients read."""
    name = f"req_{uuid4().hex}".encode()
    return [(header, name) for header in (b"x-request-id", b"request-id", b"x-trace-id")]


def _with_headers(send: Send, extra: list[tuple[bytes, bytes]]) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return wrapped


async def _answer(send: Send, path: str, asked: Headers, error: ApiError) -> None:
    body = json.dumps(error.body_for(path, asked)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
