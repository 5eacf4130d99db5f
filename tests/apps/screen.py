"""What a terminal would show, scrollback included, after everything a rich console wrote to it. For tests of
rendering."""

import io

import pyte

from kimi_lite.terminal import Console


class Screen:
    """`console` writes to it. `text` is all rows from the first that scrolled off to the last that holds anything."""

    def __init__(self, width: int = 60, height: int = 12) -> None:
        self.raw = io.StringIO()
        self.console = Console(
            file=self.raw,
            width=width,
            height=height,
            force_terminal=True,
            color_system="truecolor",
            legacy_windows=False,
        )
        self._screen = pyte.HistoryScreen(width, height, history=100_000, ratio=0.5)
        self._screen.set_mode(pyte.modes.LNM)  # a line feed also returns, as through a terminal's driver
        self._stream = pyte.Stream(self._screen)
        self._num_fed = 0

    def update(self) -> None:
        """Take in what was written since."""
        self._stream.feed(self.raw.getvalue()[self._num_fed :])
        self._num_fed = len(self.raw.getvalue())

    @property
    def scrolled(self) -> list[str]:
        """The rows that have left the screen at its top."""
        self.update()
        return [self._row(line) for line in self._screen.history.top]

    @property
    def text(self) -> str:
        rows = self.scrolled + [self._row(self._screen.buffer[y]) for y in range(self._screen.lines)]
        return "\n".join(rows).rstrip()

    def _row(self, line: dict) -> str:
        return "".join(line[x].data for x in range(self._screen.columns)).rstrip()

    def resize(self, width: int) -> None:
        """The user makes the window narrower or wider."""
        self.update()
        self.console.width = width
        self._screen.resize(columns=width)
