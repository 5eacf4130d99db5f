"""Server-sent events out of bytes, cut anywhere: `data:` lines up to an empty line are one event.

After https://html.spec.whatwg.org/multipage/server-sent-events.html; comments (pings) and other fields say nothing to
us.
"""

import re

_LINE_END = re.compile(rb"\r\n|\n|\r(?!\n)")


class EventReader:
    """Feed it what comes; it gives the data of the events that are complete."""

    def __init__(self) -> None:
        self._open = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[str]:
        """Events that these bytes complete."""
        data = self._open + data
        held = b"\r" if data.endswith(b"\r") else b""  # its \n may follow
        *lines, rest = _LINE_END.split(data.removesuffix(held) if held else data)
        self._open = rest + held
        return [event for line in lines for event in self._take(line)]

    def finish(self) -> list[str]:
        """The last event, whose empty line never came."""
        rest, self._open = self._open.rstrip(b"\r"), b""
        return self._take(rest) + self._take(b"")

    def _take(self, line: bytes) -> list[str]:
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return []
        data, self._data = b"\n".join(self._data), []
        return [data.decode("utf-8", "replace")] if data else []
