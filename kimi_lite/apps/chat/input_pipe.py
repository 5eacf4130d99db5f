"""Messages from a pipe: a line each, or several lines between triple quotation marks."""

from typing import TextIO

QUOTES = '"""'


class PipeInput:
    """Reads messages from `stream`. Nobody is there to be asked."""

    is_interactive = False

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def read(self, draft: str) -> str:
        """The next message; EOFError at the end. A block that is never closed ends there too."""
        line = self._stream.readline()
        if not line:
            raise EOFError
        if not line.lstrip().startswith(QUOTES):
            return line
        while is_open_block(line) and (more := self._stream.readline()):
            line += more
        return unquote_block(line)

    def choose(self, question: str, answers: str, default: str = "") -> str:
        raise AssertionError(question)


def is_open_block(text: str) -> bool:
    """Whether a text that begins with triple quotation marks still waits for those at its end."""
    return text.lstrip().startswith(QUOTES) and text.count(QUOTES) % 2 == 1


def unquote_block(text: str) -> str:
    """The text between the quotation marks; other text is as it is."""
    body = text.strip()
    if not body.startswith(QUOTES):
        return text
    return body.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
