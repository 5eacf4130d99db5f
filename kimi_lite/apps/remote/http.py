"""Requests to an OpenAI-compatible server that are read in a thread of their own: the caller can stop waiting at any
moment; then the connection is closed, which tells the server. What is read ahead has a limit.
"""

import json
import queue
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from kimi_lite.apps.remote.endpoint import MAX_BODY_BYTES, MAX_ERROR_BYTES, READ_S, Endpoint, Unpacker

POLL_S = 0.05
QUEUE_PIECES = 32  # read ahead of who consumes them


class Server(Endpoint):
    """An endpoint, for a program of threads."""

    def __init__(self, endpoint: str, api_key: str | None, read_s: float = READ_S) -> None:
        super().__init__(endpoint, api_key, read_s)
        import httpx

        self._client = httpx.Client(**self._client_options())

    def get(self, path: str) -> Any:
        """The JSON there."""
        body, kind = bytearray(), ""
        for content_type, data in self._exchange("GET", path, None, lambda: False):
            kind = content_type
            body += data
            self.require_size(len(body), MAX_BODY_BYTES)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self.no_api(kind) from error

    def post(self, path: str, body: Mapping[str, Any], is_cancelled: Callable[[], bool]) -> Iterator[tuple[str, bytes]]:
        """(content type, piece of the answer) as they come. Ends early, and closes the connection, when cancelled or
        closed."""
        return self._exchange("POST", path, body, is_cancelled)

    def close(self) -> None:
        self._client.close()

    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, is_cancelled: Callable[[], bool]
    ) -> Iterator[tuple[str, bytes]]:
        reader = _Reader(self._client, method, self.url + path, body)
        thread = threading.Thread(target=reader.run, name="endpoint", daemon=True)
        thread.start()
        try:
            while not is_cancelled():
                try:
                    piece = reader.pieces.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if piece is None:
                    return
                if isinstance(piece, Exception):
                    raise self.failure(piece) from piece
                status, headers, data = piece
                if status != 200:
                    raise self.refusal(status, headers, data.decode("utf-8", "replace"))
                yield headers.get("content-type", ""), data
        finally:
            reader.stop()


Piece = tuple[int, Mapping[str, str], bytes] | Exception | None


class _Reader:
    """One request, in a thread of its own. `pieces`: (status, headers, bytes), at the end None, or what was raised."""

    def __init__(self, client: Any, method: str, url: str, body: Mapping[str, Any] | None) -> None:
        self._client, self._method, self._url, self._body = client, method, url, body
        self.pieces: queue.Queue[Piece] = queue.Queue(QUEUE_PIECES)
        self._socket: socket.socket | None = None
        self._is_stopped = False

    def run(self) -> None:
        with suppress(_Stopped):
            self._run()

    def _run(self) -> None:
        sent = {} if self._body is None else {"json": self._body}
        extensions = {"trace": self._trace}
        try:
            with self._client.stream(self._method, self._url, **sent, extensions=extensions) as response:
                decoded = _decoded(response.iter_raw(), response.headers.get("content-encoding", ""))
                if response.status_code != 200:
                    self._put((response.status_code, response.headers, _beginning(decoded)))
                    return
                self._put((200, response.headers, b""))
                for data in decoded:
                    self._put((200, response.headers, data))
            self._put(None)
        except Exception as error:  # raised again where it is awaited
            self._put(error)

    def stop(self) -> None:
        """Close the connection if it is still open: the thread wakes up, wherever it waits, and ends."""
        self._is_stopped = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _put(self, piece: Piece) -> None:
        """Wait until the consumer has taken enough; end the thread where the consumer is gone."""
        while not self._is_stopped:
            try:
                self.pieces.put(piece, timeout=POLL_S)
                return
            except queue.Full:
                continue
        raise _Stopped

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Told by the client of every step: remembers the socket, which a response would have too late, after a long
        prompt."""
        stream = info.get("return_value")
        if event.endswith(("connect_tcp.complete", "start_tls.complete")) and hasattr(stream, "get_extra_info"):
            self._socket = stream.get_extra_info("socket")
            if self._is_stopped:
                self.stop()


class _Stopped(BaseException):
    """The answer is no longer wanted."""


def _decoded(raw: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    unpacker = Unpacker(encoding)
    for data in raw:
        yield from unpacker.feed(data)


def _beginning(pieces: Iterable[bytes]) -> bytes:
    body = b""
    for piece in pieces:
        body += piece
        if len(body) >= MAX_ERROR_BYTES:
            break
    return body[:MAX_ERROR_BYTES]
