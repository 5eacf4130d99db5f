"""Server-sent events out of bytes, cut anywhere: `data:` lines up to an empty line are one event.

After https://html.spec.whatwg.org/multipage/server-sent-events.html; comments (pings) and other fields say nothing to
us. An event has a limit, and bytes are looked at once, however they are cut.
"""

import re

from kimi_lite.errors import KimiLiteError

MAX_EVENT_BYTES = 16 << 20
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\n)")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventReader:
    """Feed it what comes; it gives the data of the events that are complete."""

    def __init__(self) -> None:
        self._line: list[bytes] = []  # the parts of the line that has no end yet
        self._data: list[bytes] = []  # the lines of the event that has no end yet
        self._line_bytes = self._data_bytes = 0
        self._is_after_cr = False  # the last byte was \r, whose \n may follow
        self._is_first = True  # no line was complete yet

    def feed(self, data: bytes) -> list[str]:
        """Events that these bytes complete. KimiLiteError where one is too long."""
        if not data:
            return []
        if self._is_after_cr:
            data = data.removeprefix(b"\n")
        self._is_after_cr = data.endswith(b"\r")
        *lines, rest = _LINE_END.split(data)
        events: list[str] = []
        for line in lines:
            events += self._take(b"".join([*self._line, line]))
            self._line, self._line_bytes = [], 0
        self._line.append(rest)
        self._line_bytes += len(rest)
        self._require_size()
        return events

    def finish(self) -> list[str]:
        """The last event, whose empty line never came."""
        rest, self._line = b"".join(self._line), []
        return [*(self._take(rest) if rest else []), *self._take(b"")]

    def _require_size(self) -> None:
        if self._line_bytes + self._data_bytes > MAX_EVENT_BYTES:
            raise KimiLiteError(
                f"The server sent an event of more than {MAX_EVENT_BYTES >> 20} MiB.", "Is it OpenAI's API?"
            )

    def _take(self, line: bytes) -> list[str]:
        if self._is_first:
            self._is_first, line = False, line.removeprefix(_BYTE_ORDER_MARK)
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._data_bytes += len(line)
                self._require_size()
            return []
        data, self._data, self._data_bytes = b"\n".join(self._data), [], 0
        return [data.decode("utf-8", "replace")] if data else []
