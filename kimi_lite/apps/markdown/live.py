"""The last rows of a terminal as something that can still change: drawn over in place, never scrolled off, erased at
the end.

`apps.markdown` shows the unfinished block here and `apps.chat.render` the reasoning. What has scrolled off is never
touched: the rows are always fewer than the screen has. If the window changes its width meanwhile, a fragment may
remain, but nothing is lost.
"""

import time
from collections.abc import Callable

from rich.control import Control
from rich.segment import ControlType, Segment
from wcwidth import wcwidth

from kimi_lite.apps.markdown.rows import Row
from kimi_lite.terminal import Console

LIVE_SHARE = 0.2  # of the time at most goes into showing what will change anyway
_EMOJI_STYLE = "\ufe0f"  # some terminals show what stands before it in one cell more


class LiveRows:
    """At most `most_rows` rows at the cursor, whose last one has the cursor at its end."""

    def __init__(self, console: Console, most_rows: int | None = None) -> None:
        self._console, self._most_rows = console, most_rows
        self._rows: list[Row] = []
        self.next_draw_s = 0.0

    @property
    def limit(self) -> int:
        """How many rows can be shown."""
        screen = max(self._console.height - 1, 1)
        return screen if self._most_rows is None else min(self._most_rows, screen)

    def draw(self, render: Callable[[], list[Row]]) -> None:
        """Show the last of the rows that `render` gives in place of those shown now; not more often than is cheap."""
        began_s = time.perf_counter()
        if began_s >= self.next_draw_s:
            self._show(render())
            self.next_draw_s = began_s + (time.perf_counter() - began_s) / LIVE_SHARE

    def _show(self, rows: list[Row]) -> None:
        rows = [_clipped(row, self._console.width) for row in rows[-self.limit :]]
        num_same = 0
        while num_same < min(len(rows), len(self._rows)) - 1 and rows[num_same] == self._rows[num_same]:
            num_same += 1
        if rows == self._rows:
            return
        with self._console:  # one write
            self._erase(len(self._rows) - num_same)
            for i, row in enumerate(rows[num_same:]):
                self._console.print(_Line(row, has_break=i > 0), end="", crop=False, soft_wrap=True)
        self._rows = rows

    def erase(self) -> None:
        """Take the rows away; the cursor stands where they began."""
        if self._rows:
            self._erase(len(self._rows))
            self._rows = []

    def _erase(self, num_rows: int) -> None:
        """From the row with the cursor upwards; the cursor stands at the beginning of the highest."""
        if num_rows:
            ups = min(num_rows, self._console.height) - 1
            erase = (ControlType.ERASE_IN_LINE, 2)
            self._console.control(
                Control(ControlType.CARRIAGE_RETURN, erase, *((ControlType.CURSOR_UP, 1), erase) * ups)
            )


class _Line:
    """A row with the line break, if any, before it."""

    def __init__(self, row: Row, has_break: bool) -> None:
        self._row, self._has_break = row, has_break

    def __rich_console__(self, console: Console, options: object):
        if self._has_break:
            yield Segment.line()
        yield from self._row


def _clipped(row: Row, width: int) -> Row:
    """As much of a row as surely fits, however the terminal counts joined emoji: a row that wraps could not be
    erased."""
    left, result = width, []
    for text, style, _ in row:
        for i, char in enumerate(text):
            left -= 1 if char == _EMOJI_STYLE else max(wcwidth(char), 0)
            if left < 0:
                return [*result, Segment(text[:i], style)]
        result.append(Segment(text, style))
    return result
