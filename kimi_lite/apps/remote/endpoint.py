"""An OpenAI-compatible server's address, its key, and what can go wrong with it as sentences.

What `http.Server` (in a thread, for a conversation) and `http_async.AsyncServer` (for many agents) share. Whatever a
server sends, only so much of it is kept: bodies and events have limits, counted after decompression. Secrets (the key,
a password in the address) go into the header of requests and nowhere else.
"""

import base64
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from kimi_lite.apps.remote.deltas import AGAIN, message_of
from kimi_lite.errors import KimiLiteError
from kimi_lite.units import one_line

CONNECT_S, READ_S = 15.0, 900.0  # a long prompt may take minutes before the first byte
MAX_BODY_BYTES = 32 << 20  # of a document that must be whole
MAX_ERROR_BYTES = 64 << 10  # of a refusal's body; the rest is not read
MAX_STREAM_BYTES = 128 << 20  # of one streamed answer
PIECE_BYTES = 64 << 10
LEAST_SECRET = 4  # characters; shorter ones cannot be told from other text
KEY_VARIABLES = ("KIMI_LITE_API_KEY", "OPENAI_API_KEY")
_COMPLETIONS = "/chat/completions"
_NEEDS_PARSER = "--enable-auto-tool-choice"  # what vLLM says it lacks for tools
_LONGEST_WAIT_S = 1e6


class Refused(KimiLiteError):
    """The server answered with an error; `status` and `said` say which, `retry_after_s` when to ask again, if it
    says so."""

    def __init__(self, message: str, hint: str, status: int, said: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, hint)
        self.status, self.said, self.retry_after_s = status, said, retry_after_s


class Unreachable(KimiLiteError):
    """Nothing answers at the address."""


class Address(NamedTuple):
    """Where the API is. `url` ends without a slash and holds no secrets."""

    url: str
    user: str = ""
    password: str = ""


class Endpoint:
    """Where an API is, and how it is asked. Needs httpx, which is imported when the first endpoint is made."""

    def __init__(self, endpoint: str, api_key: str | None, read_s: float = READ_S) -> None:
        """read_s: how long the server may send nothing."""
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
        self._headers = {"Accept-Encoding": "gzip"} | ({"Authorization": authorization} if authorization else {})
        self._read_s = read_s
        self._failures = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError)

    def _client_options(self) -> dict[str, Any]:
        """Of httpx's clients. A connection for each request: ended, it takes nothing with it."""
        import httpx

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(CONNECT_S, read=self._read_s, pool=None)
        return {"headers": self._headers, "timeout": timeout, "limits": limits, "follow_redirects": False}

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

    def silent(self) -> KimiLiteError:
        """For a server that sends nothing any more."""
        return KimiLiteError(f"{self.url} was silent for too long.", "Look at the server's log; what came is kept.")

    def redacted(self, text: str) -> str:
        """`text` without the secrets that a server may have repeated."""
        for secret in self._secrets:
            text = text.replace(secret, "(key)") if len(secret) >= LEAST_SECRET else text
        return text

    def failure(self, error: Exception) -> KimiLiteError:
        """What kept an answer from coming, or from coming whole."""
        import httpx

        if isinstance(error, KimiLiteError):
            return error
        if not isinstance(error, self._failures):
            return KimiLiteError(
                f"{self.url} sent what cannot be read ({type(error).__name__}).", "Is it OpenAI's API?"
            )
        if isinstance(error, httpx.ConnectTimeout):
            return Unreachable(
                f"{self.url} cannot be reached within {CONNECT_S:g} s.", "Check the address and the network."
            )
        reason = one_line(self.redacted(_reason(error)), 200)
        if isinstance(error, httpx.ConnectError):
            return Unreachable(
                f"Nothing answers at {self.url}: {reason or 'no connection'}.",
                "Start the server there, or correct --endpoint.",
            )
        if isinstance(error, httpx.TimeoutException):
            return self.silent()
        return KimiLiteError(
            f"The connection to {self.url} was lost: {reason or type(error).__name__}.",
            f"What came is kept. {AGAIN}",
        )

    def refusal(self, status: int, headers: Mapping[str, str], body: str) -> Refused:
        try:
            said = message_of(json.loads(body))
        except (ValueError, RecursionError):
            said = message_of(body) if "<html" not in body.lower() else ""
        said = self.redacted(said)
        says, wait_s = f": {said}" if said else "", retry_after_s(headers)
        wait = "a while" if wait_s is None or wait_s >= _LONGEST_WAIT_S else f"{wait_s:g} s"
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
        if _NEEDS_PARSER in said:
            hint = f"Start vLLM with {_NEEDS_PARSER} --tool-call-parser kimi_k2 (or the parser of its model)."
        elif 300 <= status < 400:
            place = one_line(self.redacted(_without_user(headers.get("location", ""))), 200) or "elsewhere"
            hint = f"It points to {place}: give that address with --endpoint."
        else:
            hint = hints.get(
                status, "Look at the server's log." if status >= 500 else "The request did not suit the server."
            )
        need = "no API key was given" if status == 401 and not self._secrets else "refused"
        return Refused(f"{self.url} answered {status} ({need}){says}.".replace("..", "."), hint, status, said, wait_s)


class Unpacker:
    """A body in pieces of bounded size, decompressed as far as each piece is wanted."""

    def __init__(self, encoding: str) -> None:
        """encoding: the header's; KimiLiteError where it is none that was asked for."""
        name = encoding.strip().lower()
        if name not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise KimiLiteError(
                f"The server compresses its answer with {encoding[:40]!r}, unasked.", "Only gzip is read."
            )
        self._zlib = None if name in ("", "identity") else zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What came, unpacked. KimiLiteError where it is damaged."""
        if self._zlib is None:
            yield from (data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))
            return
        try:
            while data:
                yield self._zlib.decompress(data, PIECE_BYTES)
                data = self._zlib.unconsumed_tail
        except zlib.error as error:
            raise KimiLiteError(f"The server's compressed answer is damaged: {error}.", "Ask again.") from error


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


def key_of(endpoint: str, api_key: str | None = None) -> str | None:
    """The key that is given, or the environment's; none where the address itself says who asks."""
    names = () if address_of(endpoint).user else KEY_VARIABLES
    return api_key or next((os.environ[name] for name in names if os.environ.get(name)), None)


def _without_user(address: str) -> str:
    """An address that may be none, without what stands before its @."""
    return re.sub(r"(?<=//)[^/]*@|^[^/]*@", "", address)


def _reason(error: Exception) -> str:
    """What a library says, without numbers and places in its source."""
    text = re.sub(r"\[(?:Errno -?\d+|SSL[^\]]*)\]\s*|\s*\(_ssl\.c:\d+\)", "", str(error)).strip().rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def retry_after_s(headers: Mapping[str, str], now_s: Callable[[], float] = time.time) -> float | None:
    """When to ask again, in seconds from now, as Retry-After says it (RFC 9110, 10.2.3: a number of seconds, or a
    date) or OpenAI's retry-after-ms. None where neither says anything that can be read."""
    milliseconds, text = headers.get("retry-after-ms", "").strip(), headers.get("retry-after", "").strip()
    for number, scale in ((milliseconds, 1e-3), (text, 1.0)):
        if re.fullmatch(r"\d+(\.\d+)?", number, re.ASCII):
            return min(_LONGEST_WAIT_S, scale * float(number))
    try:
        return max(0.0, min(_LONGEST_WAIT_S, parsedate_to_datetime(text).timestamp() - now_s()))
    except (TypeError, ValueError, OverflowError):
        return None
