"""Requests to an OpenAI-compatible server from an asyncio event loop: for a swarm of agents, and for measuring many
requests at once. A task that is cancelled closes its connection, which tells the server.
"""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from kimi_lite.apps.remote.endpoint import MAX_BODY_BYTES, MAX_ERROR_BYTES, READ_S, Endpoint, Unpacker


class AsyncServer(Endpoint):
    """An endpoint, for a program of tasks. Close it in the loop that used it."""

    def __init__(self, endpoint: str, api_key: str | None, read_s: float = READ_S) -> None:
        super().__init__(endpoint, api_key, read_s)
        import httpx

        self._client = httpx.AsyncClient(**self._client_options())

    async def get(self, path: str) -> Any:
        """The JSON there."""
        body, kind = bytearray(), ""
        async with aclosing(self._exchange("GET", path, None)) as pieces:
            async for content_type, data in pieces:
                kind = content_type
                body += data
                self.require_size(len(body), MAX_BODY_BYTES)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self.no_api(kind) from error

    def post(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[tuple[str, bytes], None]:
        """(content type, piece of the answer) as they come. Close it (`contextlib.aclosing`) to end early.

        Raises Refused, Unreachable, or KimiLiteError where the connection is lost."""
        return self._exchange("POST", path, body)

    async def close(self) -> None:
        await self._client.aclose()

    async def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> AsyncGenerator[tuple[str, bytes], None]:
        sent = {} if body is None else {"json": body}
        try:
            async with self._client.stream(method, self.url + path, **sent) as response:
                unpacker = Unpacker(response.headers.get("content-encoding", ""))
                if response.status_code != 200:
                    said = await _beginning(response, unpacker)
                    raise self.refusal(response.status_code, response.headers, said.decode("utf-8", "replace"))
                kind = response.headers.get("content-type", "")
                yield kind, b""
                async for raw in response.aiter_raw():
                    for data in unpacker.feed(raw):
                        yield kind, data
        except Exception as error:
            raise self.failure(error) from error


async def _beginning(response: Any, unpacker: Unpacker) -> bytes:
    body = b""
    async for raw in response.aiter_raw():
        for piece in unpacker.feed(raw):
            body += piece
            if len(body) >= MAX_ERROR_BYTES:
                return body[:MAX_ERROR_BYTES]
    return body
