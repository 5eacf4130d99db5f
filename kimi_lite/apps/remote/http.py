"""Requests to an OpenAI-compatible server, and what can go wrong with them as sentences.

An answer is read in a thread: the caller can stop waiting at any moment; then the connection is closed, which tells the
server. Whatever a server sends, only so much of it is kept: bodies, events and the queue between the threads have
limits, counted after decompression. Secrets (the key, a password in the address) go into the header of requests and
nowhere else.
"""

import base64
import json
import queue
import re
import socket
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from kimi_lite.apps.remote.deltas import AGAIN, message_of
from kimi_lite.errors import KimiLiteError
from kimi_lite.units import one_line

CONNECT_S, READ_S = 15.0, 900.0  # a long prompt may take minutes before the first byte
POLL_S = 0.05
MAX_BODY_BYTES = 32 << 20  # of a document that must be whole
MAX_ERROR_BYTES = 64 << 10  # of a refusal's body; the rest is not read
MAX_STREAM_BYTES = 128 << 20  # of one streamed answer
PIECE_BYTES = 64 << 10
QUEUE_PIECES = 32  # read ahead of who consumes them
LEAST_SECRET = 4  # characters; shorter ones cannot be told from other text
_COMPLETIONS = "/chat/completions"


class Refused(KimiLiteError):
    """The server answered with an error; `status` and `said` say which."""

    def __init__(self, message: str, hint: str, status: int, said: str) -> None:
        super().__init__(message, hint)
        self.status, self.said = status, said


class Address(NamedTuple):
    """Where the API is. `url` ends without a slash and holds no secrets."""

    url: str
    user: str = ""
    password: str = ""


class Server:
    """An endpoint."""

    def __init__(self, endpoint: str, api_key: str | None, read_s: float = READ_S) -> None:
        try:
            import httpx
        except ImportError as error:
            raise KimiLiteError(
                "--endpoint needs the package httpx, which is not installed.", "pip install httpx"
            ) from error
        address = address_of(endpoint)
        self.url, self._key = address.url, api_key
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise KimiLiteError(
                "The API key has characters that no header can carry.", "Is it whole, and nothing else?"
            )
        if api_key and address.user:
            raise KimiLiteError(
                f"There are an API key and a user's name in the address of {self.url}; a request carries one of them.",
                "Leave one out.",
            )
        pair = base64.b64encode(f"{address.user}:{address.password}".encode()).decode() if address.user else ""
        self._secrets = [secret for secret in (api_key, address.password, pair) if secret]
        authorization = f"Bearer {api_key}" if api_key else f"Basic {pair}" if pair else ""
        headers = {"Accept-Encoding": "gzip"} | ({"Authorization": authorization} if authorization else {})
        # A connection for each request: ended, it takes nothing with it.
        limits = httpx.Limits(max_keepalive_connections=0)
        timeout = httpx.Timeout(CONNECT_S, read=read_s)
        self._client = httpx.Client(headers=headers, timeout=timeout, limits=limits, follow_redirects=False)
        self._failures = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError)

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

    def require_size(self, num_bytes: int, most: int) -> None:
        if num_bytes > most:
            raise KimiLiteError(
                f"{self.url} sent more than the {most >> 20} MiB that an answer may have.", "Look at the server's log."
            )

    def no_api(self, content_type: str) -> KimiLiteError:
        """For an answer that is neither a stream nor JSON."""
        kind = one_line(self.redacted(content_type.partition(";")[0]), 80) or "nothing"
        return KimiLiteError(
            f"{self.url} is no OpenAI-compatible API: it answers with {kind}.", "Its address ends in /v1 as a rule."
        )

    def redacted(self, text: str) -> str:
        """`text` without the secrets that a server may have repeated."""
        for secret in self._secrets:
            text = text.replace(secret, "(key)") if len(secret) >= LEAST_SECRET else text
        return text

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
                    raise self._failure(piece) from piece
                status, headers, data = piece
                if status != 200:
                    raise self._refusal(status, headers, data.decode("utf-8", "replace"))
                yield headers.get("content-type", ""), data
        finally:
            reader.stop()

    def _failure(self, error: Exception) -> KimiLiteError:
        """What kept an answer from coming, or from coming whole."""
        import httpx

        if isinstance(error, KimiLiteError):
            return error
        if not isinstance(error, self._failures):
            return KimiLiteError(
                f"{self.url} sent what cannot be read ({type(error).__name__}).", "Is it OpenAI's API?"
            )
        if isinstance(error, httpx.ConnectTimeout):
            return KimiLiteError(
                f"{self.url} cannot be reached within {CONNECT_S:g} s.", "Check the address and the network."
            )
        reason = one_line(self.redacted(_reason(error)), 200)
        if isinstance(error, httpx.ConnectError):
            return KimiLiteError(
                f"Nothing answers at {self.url}: {reason or 'no connection'}.",
                "Start the server there, or correct --endpoint.",
            )
        if isinstance(error, httpx.TimeoutException):
            return KimiLiteError(f"{self.url} was silent for too long.", "Look at the server's log; what came is kept.")
        return KimiLiteError(
            f"The connection to {self.url} was lost: {reason or type(error).__name__}.",
            f"What came is kept. {AGAIN}",
        )

    def _refusal(self, status: int, headers: Mapping[str, str], body: str) -> Refused:
        try:
            said = message_of(json.loads(body))
        except (ValueError, RecursionError):
            said = message_of(body) if "<html" not in body.lower() else ""
        said = self.redacted(said)
        says, wait = f": {said}" if said else "", _seconds(headers.get("retry-after"))
        hints = {
            401: "Give the right key with --api-key or in KIMI_LITE_API_KEY.",
            403: "The key may not use this; give another with --api-key.",
            404: "The endpoint's address ends in /v1 as a rule, and -m must be a model it has.",
            413: "Send less: /ctx drop, /clear or a smaller attachment.",
            **dict.fromkeys(
                (502, 503, 504, 529), f"If it is starting or overloaded, wait {wait} and ask again; its log says more."
            ),
            429: f"Wait {wait} and ask again; look at your quota.",
        }
        if 300 <= status < 400:
            place = one_line(self.redacted(_without_user(headers.get("location", ""))), 200) or "elsewhere"
            hint = f"It points to {place}: give that address with --endpoint."
        else:
            hint = hints.get(
                status, "Look at the server's log." if status >= 500 else "The request did not suit the server."
            )
        need = "no API key was given" if status == 401 and not self._secrets else "refused"
        return Refused(f"{self.url} answered {status} ({need}){says}.".replace("..", "."), hint, status, said)


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
    """The body in pieces of bounded size, decompressed as far as each piece is wanted."""
    if encoding.strip().lower() in ("", "identity"):
        for data in raw:
            yield from (data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))
        return
    if encoding.strip().lower() not in ("gzip", "x-gzip", "deflate"):
        raise KimiLiteError(f"The server compresses its answer with {encoding[:40]!r}, unasked.", "Only gzip is read.")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib
    try:
        for data in raw:
            while data:
                yield unpacker.decompress(data, PIECE_BYTES)
                data = unpacker.unconsumed_tail
    except zlib.error as error:
        raise KimiLiteError(f"The server's compressed answer is damaged: {error}.", "Ask again.") from error


def _beginning(pieces: Iterable[bytes]) -> bytes:
    body = b""
    for piece in pieces:
        body += piece
        if len(body) >= MAX_ERROR_BYTES:
            break
    return body[:MAX_ERROR_BYTES]


def address_of(endpoint: str) -> Address:
    """`http://host:8000`, `.../v1/` and `.../v1/chat/completions` all mean `http://host:8000/v1`; `user:password@` is
    taken out."""
    address = endpoint.strip()
    address = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(address)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right:
        raise KimiLiteError(
            f"The endpoint {_without_user(endpoint)!r} is no address of a server.",
            "It looks like http://localhost:8000/v1.",
        )
    path = parts.path.rstrip("/").removesuffix(_COMPLETIONS).rstrip("/") or "/v1"
    host = parts.netloc.rpartition("@")[2]
    return Address(f"{parts.scheme}://{host}{path}", unquote(parts.username or ""), unquote(parts.password or ""))


def _without_user(address: str) -> str:
    """An address that may be none, without what stands before its @."""
    return re.sub(r"(?<=//)[^/]*@|^[^/]*@", "", address)


def _reason(error: Exception) -> str:
    """What a library says, without numbers and places in its source."""
    text = re.sub(r"\[(?:Errno -?\d+|SSL[^\]]*)\]\s*|\s*\(_ssl\.c:\d+\)", "", str(error)).strip().rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _seconds(retry_after: str | None) -> str:
    return f"{retry_after} s" if retry_after and retry_after.isdecimal() and len(retry_after) < 7 else "a while"
