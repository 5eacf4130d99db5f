"""What is asked of a hub: the files of a repository, and bytes of one of them. huggingface_hub knows its interface, its
tokens, and $HF_ENDPOINT; bytes come through httpx, which follows the hub's redirects to where they are kept and leaves
the token behind at the border of the host.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from kimi_lite.arch.reader import shown
from kimi_lite.errors import KimiLiteError
from kimi_lite.hub.cache import require_online
from kimi_lite.hub.names import HubName
from kimi_lite.hub.quants import Quant, RemoteFile, find_quant, find_tower, group

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 30.0  # without a byte
_DEFAULT_ENDPOINT = "https://huggingface.co"
_TRIED_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_MOST_WAIT_S = 300.0
_ETAG, _COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_NO_HUB = "Check that HF_ENDPOINT is a hub."
_TOKEN_HINT = "Set HF_TOKEN, or log in with: hf auth login"


@dataclass(frozen=True, slots=True)
class Repository:
    """What a repository held at one commit."""

    name: HubName
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def quants(self) -> tuple[Quant, ...]:
        return group(self.files)

    def find(self, wanted: str) -> Quant:
        """Raises KimiLiteError with the list where it is not one."""
        return find_quant(self.quants, wanted, self.name.repository)

    def tower_of(self, quant: Quant) -> RemoteFile | None:
        return find_tower(self.files, quant)


class NoAccess(KimiLiteError):
    """The hub will not show the files to who asks: none of them."""


class Unavailable(Exception):
    """The hub did not answer, or not now: worth another try after `wait_s`."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.wait_s = reason, wait_s


WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # between tries that brought nothing


class Patience:
    """How often a thing is tried again: a few times without success, and anew after each success."""

    def __init__(self, pause: Callable[[float], object] = time.sleep) -> None:
        self._pause, self._num_failed = pause, 0

    def reset(self) -> None:
        self._num_failed = 0

    def wait(self, failure: Unavailable, what: str) -> None:
        """Before the next try. Raises KimiLiteError where there were enough of them."""
        if self._num_failed == len(WAITS_S):
            tries = self._num_failed + 1
            hint = "Repeat the command: it goes on where it was."
            raise KimiLiteError(f"{what} cannot be fetched: {failure.reason}, {tries} times in a row.", hint)
        self._pause(max(failure.wait_s, WAITS_S[self._num_failed]))
        self._num_failed += 1


class Hub:
    """A hub: $HF_ENDPOINT or huggingface.co. Close it."""

    def __init__(self) -> None:
        import httpx

        self.endpoint = (os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT).rstrip("/")
        self._library = _import_library()
        limits = httpx.Limits(max_connections=32)
        self._client = httpx.Client(timeout=TIMEOUT_S, follow_redirects=True, limits=limits)

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def repository(self, name: HubName) -> Repository:
        """Its files at the revision. Raises KimiLiteError."""
        require_online(name)
        api = self._library.HfApi(endpoint=self.endpoint)
        try:
            info = api.model_info(name.repository, revision=name.revision, timeout=TIMEOUT_S)
        except Exception as error:
            raise self._explained(error, name) from error
        commit = _checked(info.sha, _COMMIT, "commit")
        try:
            tree = list(api.list_repo_tree(name.repository, recursive=True, revision=commit))
        except Exception as error:
            raise self._explained(error, name) from error
        files = tuple(_remote_file(entry) for entry in tree if hasattr(entry, "blob_id"))  # else a folder
        return Repository(name, commit, files)

    def read(self, repository: Repository, file: RemoteFile, start: int, stop: int) -> bytes:
        """Bytes start..stop of a file. Raises KimiLiteError, and Unavailable."""
        with self.stream(repository, file, start, stop) as answer:
            data = bytearray()
            at = start if answer.status_code == 206 else 0
            for piece in answer.iter_bytes():
                data += piece
                if at + len(data) >= stop:
                    break
        wanted = bytes(data[start - at : stop - at])
        if len(wanted) < stop - start:
            raise Unavailable(f"the answer ended after {len(wanted):,} of {stop - start:,} bytes")
        return wanted

    @contextmanager
    def stream(
        self, repository: Repository, file: RemoteFile, start: int = 0, stop: int | None = None
    ) -> "Iterator[httpx.Response]":
        """The answer with a file's bytes from `start` on, or from 0 where its status is 200. Raises KimiLiteError, and
        Unavailable where another try may do."""
        import httpx

        address = f"{self.endpoint}/{repository.name.repository}/resolve/{repository.commit}/{quote(file.path)}"
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        try:
            with self._client.stream("GET", address, headers=headers) as answer:
                self._require_good(answer, repository, file, start)
                yield answer
        except httpx.HTTPError as error:
            raise Unavailable(str(error) or type(error).__name__) from error

    @cached_property
    def _headers(self) -> Mapping[str, str]:
        return self._library.utils.build_hf_headers(library_name="kimi-lite")

    def _require_good(self, answer: "httpx.Response", repository: Repository, file: RemoteFile, start: int) -> None:
        status = answer.status_code
        if status in (200, 206):
            begins = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
            if status == 206 and (not begins or int(begins[1]) != start):
                raise Unavailable(f"asked for bytes from {start:,} on, the answer has {begins and begins[1]}")
            return
        if status in _TRIED_AGAIN:
            raise Unavailable(f"HTTP {status}", retry_after(answer.headers))
        if status == 416:
            raise Unavailable(f"HTTP 416: the file has no byte {start:,}")
        raise self._refusal(status, answer.headers.get("X-Error-Code", ""), repository.name, file.path)

    def _explained(self, error: Exception, name: HubName) -> Exception:
        """What the library raises, as a sentence; a bug of ours stays what it is."""
        answer = getattr(error, "response", None)
        status = getattr(answer, "status_code", None)
        if status is not None:
            return self._refusal(status, answer.headers.get("X-Error-Code", ""), name)
        if isinstance(error, (KeyError, TypeError)) or type(error).__name__ == "JSONDecodeError":
            return KimiLiteError(f"{self.endpoint} does not answer as a hub does.", _NO_HUB)
        root = type(error).__module__.partition(".")[0]
        if root in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "huggingface_hub"):
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            return KimiLiteError(f"{self.endpoint} cannot be reached: {reason}.", _network_hint(self.endpoint))
        return error

    def _refusal(self, status: int, code: str, name: HubName, path: str = "") -> KimiLiteError:
        page = f"{self.endpoint}/{name.repository}"
        what = f"{path} of {name.repository}" if path else name.repository
        has_token = "authorization" in {key.lower() for key in self._headers}
        if code == "GatedRepo" or (status == 403 and not code):
            steps = f"Open {page} in a browser, accept its conditions"
            return NoAccess(
                f"{what} is gated: its publisher grants access, and the hub says {status}.",
                f"{steps}, then repeat the command." if has_token else f"{steps}, then: {_TOKEN_HINT}",
            )
        if code == "RevisionNotFound":
            return KimiLiteError(f"{name.repository} has no revision {name.revision!r}.", f"Its branches: {page}")
        if status in (401, 404) and not path:
            access = "your token gives access to it" if has_token else "it is public, or log in"
            hint = f"Check the name, and that {access}: {page}" + ("" if has_token else f"\n{_TOKEN_HINT}")
            return KimiLiteError(
                f"{name.repository} is not on {self.endpoint}, or it is private (HTTP {status}).", hint
            )
        if status in (401, 404):
            return KimiLiteError(f"{self.endpoint} gives no {what}: HTTP {status}.", f"Look at {page}")
        if status == 429:
            more = "" if has_token else f"; logged in more is allowed. {_TOKEN_HINT}"
            hint = f"Wait some minutes and repeat the command{more}"
            return KimiLiteError(f"{self.endpoint} has had too many requests from here (HTTP 429).", hint)
        return KimiLiteError(f"{self.endpoint} answers {what} with HTTP {status}.", _network_hint(self.endpoint))


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks to wait: a number or a date."""
    said = headers.get("Retry-After", "")
    if re.fullmatch(r"\d{1,6}", said):
        return min(float(said), _MOST_WAIT_S)
    try:
        return min(max(0.0, parsedate_to_datetime(said).timestamp() - time.time()), _MOST_WAIT_S)
    except (TypeError, ValueError):
        return 0.0


def _remote_file(entry: Any) -> RemoteFile:
    """Paths and checksums come from elsewhere and become names of files here, so they are looked at first."""
    etag = _checked(entry.lfs.sha256 if entry.lfs else entry.blob_id, _ETAG, f"checksum of {shown(entry.path)}")
    parts = entry.path.split("/")
    if not entry.path.isprintable() or "\\" in entry.path or any(part in ("", ".", "..") for part in parts):
        raise KimiLiteError(f"The hub names a file {shown(entry.path)}, which is no path.", _NO_HUB)
    return RemoteFile(entry.path, entry.lfs.size if entry.lfs else entry.size, etag)


def _checked(text: object, form: re.Pattern, what: str) -> str:
    if not isinstance(text, str) or not form.fullmatch(text):
        raise KimiLiteError(f"The hub's {what} is {shown(text)}, which is none.", _NO_HUB)
    return text


def _network_hint(endpoint: str) -> str:
    if endpoint == _DEFAULT_ENDPOINT:
        return "Check the network, or set HF_ENDPOINT to a mirror; what is here already: kimi-lite models"
    return f"HF_ENDPOINT is {endpoint}: check it and the network; what is here already: kimi-lite models"


def _import_library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.utils
    except ImportError as error:
        raise KimiLiteError("Downloads need the package huggingface_hub.", "pip install 'kimi-lite[pull]'") from error
    return huggingface_hub
