"""Code coloured line by line as it comes.

A line's colours depend on the lines before it (a docstring, a comment), never on those after it: what is shown stays as
it is. To colour line n without lexing all n again, lexing starts at an earlier line that was found to give the same
colours.
"""

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound
from rich.style import Style
from rich.syntax import ANSI_DARK, ANSISyntaxTheme
from rich.text import Text

MOST_LINES = 32  # more than this are lexed again for a line only if no later start will do
Coloured = list[tuple[str, Style]]


class CodeColours:
    """The highlighter of one code block. A language that is not known stays plain."""

    def __init__(self, language: str) -> None:
        self._lexer = _find_lexer(language)
        self._theme = ANSISyntaxTheme(ANSI_DARK)  # the terminal's own colours
        self._lines: list[str] = []

    def add(self, line: str) -> Text:
        """The next line, coloured."""
        if self._lexer is None:
            return Text(line)
        self._lines.append(line)
        lines = self._colour(self._lines)
        if len(self._lines) > MOST_LINES:
            self._forget(lines)
        return _as_text(lines[-1], line)

    def _forget(self, lines: list[Coloured]) -> None:
        """Start later from now on, where that changes nothing that is in sight."""
        start = next((i for i in range(len(lines) // 2, len(lines) - 4) if self._lines[i][:1].strip()), None)
        if start is not None and self._colour(self._lines[start:]) == lines[start:]:
            del self._lines[:start]
        elif len(self._lines) > 10 * MOST_LINES:
            self._lexer = None

    def _colour(self, lines: list[str]) -> list[Coloured]:
        assert self._lexer is not None
        result: list[Coloured] = [[]]
        for kind, text in self._lexer.get_tokens("\n".join(lines) + "\n"):
            style = self._theme.get_style_for_token(kind)
            first, *others = [[(part, style)] if part else [] for part in text.split("\n")]
            result[-1] += first
            result += others
        return result[: len(lines)] + [[]] * (len(lines) - len(result))


def _as_text(coloured: Coloured, line: str) -> Text:
    """The coloured line; the plain one where a lexer changed the text."""
    text = Text.assemble(*coloured)
    return text if text.plain == line else Text(line)


def _find_lexer(language: str) -> Lexer | None:
    try:
        return get_lexer_by_name(language, stripnl=False) if language else None
    except ClassNotFound:
        return None
