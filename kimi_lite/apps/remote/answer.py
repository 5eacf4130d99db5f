"""One answer of an OpenAI-compatible server: the bytes of its body, as they come, into our tokens.

Streams are read event by event, a body of JSON (a server that does not stream) whole. What breaks off, or is no answer
at all, is told from one that ended.
"""

import json
from collections.abc import Iterator, Mapping

from kimi_lite.apps.remote.deltas import DeltaReader
from kimi_lite.apps.remote.endpoint import MAX_BODY_BYTES, MAX_STREAM_BYTES, Endpoint
from kimi_lite.apps.remote.sse import EventReader
from kimi_lite.engine.types import Token
from kimi_lite.errors import KimiLiteError

DONE = "[DONE]"


class AnswerReader:
    """Feed it the pieces of the body; `deltas` knows what was said so far."""

    def __init__(self, endpoint: Endpoint, deltas: DeltaReader) -> None:
        self._endpoint, self.deltas = endpoint, deltas
        self._events, self._whole = EventReader(), bytearray()
        self._content_type, self._num_bytes = "", 0

    @property
    def is_done(self) -> bool:
        """[DONE] came: not every server closes the connection then."""
        return self.deltas.is_done

    def feed(self, content_type: str, data: bytes) -> Iterator[Token]:
        """The tokens that this piece completes, up to where it is an error, or nothing that the API has: then
        KimiLiteError is raised."""
        self._content_type = content_type
        self._num_bytes += len(data)
        if "json" in content_type:
            self._whole += data
            self._endpoint.require_size(self._num_bytes, MAX_BODY_BYTES)
            return
        self._endpoint.require_size(self._num_bytes, MAX_STREAM_BYTES)
        for event in self._events.feed(data):
            yield from self._read(event)

    def finish(self) -> Iterator[Token]:
        """The rest, and the last token. Raises KimiLiteError where the answer broke off."""
        for event in [self._whole.decode("utf-8", "replace")] if self._whole else self._events.finish():
            yield from self._read(event)
        self._require_end()
        yield from self.deltas.finish()

    def _require_end(self) -> None:
        url, kind = self._endpoint.url, self._content_type
        if not self.is_done and self.deltas.reason is None:
            if kind and "json" not in kind and "event-stream" not in kind:
                raise self._endpoint.no_api(kind)
            if not self.deltas.has_choices:
                raise KimiLiteError(
                    f"{url} sent nothing that OpenAI's API calls an answer.",
                    "Its address ends in /v1 as a rule; the server's log may say more.",
                )
            message = f"{url} ended the answer in the middle: no finish reason, no [DONE]."
            raise KimiLiteError(message, self.deltas.hint)
        if failure := self.deltas.failure():
            raise failure

    def _read(self, text: str) -> Iterator[Token]:
        """The tokens of what stood between two empty lines."""
        for event in _events(text):
            self.deltas.is_done = self.deltas.is_done or event.strip() == DONE
            if not self.deltas.is_done:
                yield from self._read_event(event)

    def _read_event(self, event: str) -> list[Token]:
        try:
            document = json.loads(event)
        except (ValueError, RecursionError) as error:
            said = self._endpoint.redacted(event)[:80]
            raise KimiLiteError(
                f"{self._endpoint.url} sent an event that is no JSON: {said!r}.", "Is it OpenAI's API?"
            ) from error
        try:
            return self.deltas.feed(document) if isinstance(document, Mapping) else []
        except KimiLiteError as error:
            raise KimiLiteError(self._endpoint.redacted(error.message), error.hint) from error


def _events(text: str) -> list[str]:
    """One event, of several lines maybe; or one a line, from servers that leave out the empty lines between."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) < 2 or _is_json(text) or not all(line.strip() == DONE or _is_json(line) for line in lines):
        return [text]
    return lines


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
