"""Requests to an OpenAI-compatible server, and what can go wrong with them as sentences.

An answer is read in a thread: the caller can stop waiting at any moment; then the connection is closed, which tells the
server.
"""

import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from kimi_lite.apps.remote.deltas import message_of
from kimi_lite.errors import KimiLiteError

CONNECT_S, READ_S = 15.0, 900.0  # a long prompt may take minutes before the first byte
POLL_S = 0.05
_COMPLETIONS = "/chat/completions"


class Refused(KimiLiteError):
    """The server answered with an error; `status` and `said` say which."""

    def __init__(self, message: str, hint: str, status: int, said: str) -> None:
        super().__init__(message, hint)
        self.status, self.said = status, said


class Server:
    """An endpoint. The key goes into the header of requests and nowhere else."""

    def __init__(self, endpoint: str, api_key: str | None, read_s: float = READ_S) -> None:
        try:
            import httpx
        except ImportError as error:
            raise KimiLiteError(
                "--endpoint needs the package httpx, which is not installed.", "pip install httpx"
            ) from error
        self.url, self._key = base_url(endpoint), api_key
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise KimiLiteError(
                "The API key has characters that no header can carry.", "Is it whole, and nothing else?"
            )
        limits = httpx.Limits(
            max_keepalive_connections=0
        )  # a connection for each request: ended, it takes nothing with it
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(CONNECT_S, read=read_s), limits=limits)
        self._failures = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError)

    def get(self, path: str) -> Any:
        """The JSON there."""
        try:
            response = self._client.get(self.url + path)
        except self._failures as error:
            raise self._failure(error) from error
        if response.status_code != 200:
            raise self._refusal(response.status_code, response.headers, response.text)
        try:
            return response.json()
        except ValueError as error:
            raise self._no_api(response.headers) from error

    def post(self, path: str, body: Mapping[str, Any], is_cancelled: Callable[[], bool]) -> Iterator[tuple[str, bytes]]:
        """(content type, piece of the answer) as they come. Ends early, and closes the connection, when cancelled or
        closed."""
        pieces: queue.SimpleQueue = queue.SimpleQueue()
        reader = _Reader(self._client, self.url + path, body, pieces)
        thread = threading.Thread(target=reader.run, name="endpoint", daemon=True)
        thread.start()
        try:
            while not is_cancelled():
                try:
                    piece = pieces.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if piece is None:
                    return
                if isinstance(piece, Exception):
                    raise self._failure(piece) from piece
                status, headers, data = piece
                if status != 200:
                    raise self._refusal(status, headers, data.decode("utf-8", "replace"))
                yield headers.get("content-type", ""), data
        finally:
            reader.stop()

    def close(self) -> None:
        self._client.close()

    def no_stream(self, headers_type: str) -> KimiLiteError:
        """For an answer that is neither a stream nor JSON."""
        return self._no_api({"content-type": headers_type})

    def _failure(self, error: Exception) -> KimiLiteError:
        """What kept an answer from coming, or from coming whole."""
        import httpx

        if isinstance(error, KimiLiteError):
            return error
        if isinstance(error, httpx.ConnectTimeout):
            return KimiLiteError(
                f"{self.url} cannot be reached within {CONNECT_S:g} s.", "Check the address and the network."
            )
        if isinstance(error, httpx.ConnectError):
            reason = self._redacted(str(error)) or "no connection"
            return KimiLiteError(
                f"Nothing answers at {self.url}: {reason}.", "Start the server there, or correct --endpoint."
            )
        if isinstance(error, httpx.TimeoutException):
            return KimiLiteError(f"{self.url} was silent for too long.", "Look at the server's log; what came is kept.")
        reason = self._redacted(str(error)) or type(error).__name__
        return KimiLiteError(
            f"The connection to {self.url} was lost: {reason}.", "What came is kept. Ask again (in a chat: /regen)."
        )

    def _refusal(self, status: int, headers: Mapping[str, str], body: str) -> Refused:
        try:
            said = message_of(json.loads(body))
        except ValueError:
            said = message_of(body) if "<html" not in body.lower() else ""
        said = self._redacted(said)
        says = f": {said}" if said else ""
        hints = {
            401: "Give the right key with --api-key or in KIMI_LITE_API_KEY.",
            403: "The key may not use this; give another with --api-key.",
            404: "The endpoint's address ends in /v1 as a rule, and -m must be a model it has.",
            413: "Send less: /ctx drop, /clear or a smaller attachment.",
            429: "Wait {} and ask again; look at your quota.".format(_seconds(headers.get("retry-after"))),
        }
        if 300 <= status < 400:
            hint = f"It points to {headers.get('location', 'elsewhere')}: give that address with --endpoint."
        else:
            hint = hints.get(
                status, "Look at the server's log." if status >= 500 else "The request did not suit the server."
            )
        need = "no API key was given" if status == 401 and not self._key else "refused"
        return Refused(f"{self.url} answered {status} ({need}){says}.".replace("..", "."), hint, status, said)

    def _no_api(self, headers: Mapping[str, str]) -> KimiLiteError:
        kind = headers.get("content-type", "nothing").partition(";")[0]
        return KimiLiteError(
            f"{self.url} is no OpenAI-compatible API: it answers with {kind}.", "Its address ends in /v1 as a rule."
        )

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "(key)") if self._key else text


class _Reader:
    """One request, in a thread of its own. Puts (status, headers, bytes), at the end None, or what was raised."""

    def __init__(self, client: Any, url: str, body: Mapping[str, Any], pieces: queue.SimpleQueue) -> None:
        self._client, self._url, self._body, self._pieces = client, url, body, pieces
        self._socket: socket.socket | None = None
        self._is_stopped = False

    def run(self) -> None:
        try:
            with self._client.stream("POST", self._url, json=self._body, extensions={"trace": self._trace}) as response:
                if response.status_code != 200:
                    self._pieces.put((response.status_code, response.headers, response.read()))
                    return
                for data in response.iter_bytes():
                    self._pieces.put((200, response.headers, data))
            self._pieces.put(None)
        except Exception as error:  # raised again where it is awaited
            self._pieces.put(error)

    def stop(self) -> None:
        """Close the connection if it is still open: the thread wakes up, wherever it waits, and ends."""
        self._is_stopped = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Told by the client of every step: remembers the socket, which a response would have too late, after a long
        prompt."""
        stream = info.get("return_value")
        if event.endswith(("connect_tcp.complete", "start_tls.complete")) and hasattr(stream, "get_extra_info"):
            self._socket = stream.get_extra_info("socket")
            if self._is_stopped:
                self.stop()


def base_url(endpoint: str) -> str:
    """`http://host:8000`, `.../v1/` and `.../v1/chat/completions` all mean `http://host:8000/v1`."""
    address = endpoint.strip()
    address = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(address)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right:
        raise KimiLiteError(
            f"The endpoint {endpoint!r} is no address of a server.", "It looks like http://localhost:8000/v1."
        )
    path = parts.path.rstrip("/").removesuffix(_COMPLETIONS).rstrip("/") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _seconds(retry_after: str | None) -> str:
    return f"{retry_after} s" if retry_after and retry_after.isdecimal() else "a while"
