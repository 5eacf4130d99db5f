"""Messages from a pipe: a line each, or several lines between triple quotation marks; in UTF-8, or in UTF-16 as
PowerShell pipes it.
"""

from typing import TextIO

from kimi_lite.files import encoding_of

QUOTES = '"""'


class PipeInput:
    """Reads messages from `stream`. It cannot be asked anything."""

    is_interactive = False

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._has_begun = False

    def read(self, draft: str) -> str:
        """The next message; EOFError at the end. A block that is never closed ends there too."""
        if not self._has_begun:
            self._has_begun = True
            _set_encoding(self._stream)
        line = self._stream.readline().removeprefix("\ufeff")
        if not line:
            raise EOFError
        if not line.lstrip().startswith(QUOTES):
            return line
        while is_open_block(line) and (more := self._stream.readline()):
            line += more
        return unquote_block(line)

    def choose(self, question: str, answers: str, default: str = "") -> str:
        raise AssertionError(question)


def _set_encoding(stream: TextIO) -> None:
    """By how it begins, whatever the locale. Bytes that are not text are kept, for the message is refused then."""
    encoding = encoding_of(stream.buffer.peek(1)) if hasattr(stream.buffer, "peek") else "utf-8"
    stream.reconfigure(encoding=encoding, errors="surrogateescape" if encoding.startswith("utf-8") else "replace")


def is_open_block(text: str) -> bool:
    """Whether a text that begins with triple quotation marks still waits for those at its end."""
    return text.lstrip().startswith(QUOTES) and text.count(QUOTES) % 2 == 1


def unquote_block(text: str) -> str:
    """The text between the quotation marks; other text is as it is."""
    body = text.strip()
    if not body.startswith(QUOTES):
        return text
    return body.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
