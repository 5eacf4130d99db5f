"""The one way to the terminal. Texts come from models, servers, MCP programs, file names and saved conversations: what
in them could move the cursor, recolour, rename the window, fill the clipboard or reverse the order of what is read is
taken out here, for all that print. Our own colours and cursor movements are styles and controls of the writers below.

    Console      rich's, for what has styles, tables and progress
    show_plain   a text on such a console, as it is
    echo         a line without a console; `write` for an answer to stdout
    width        columns of a table or of wrapped lines
    open_prompt  prompt_toolkit's line editor
    send_picture a thumbnail in pixels
    report_crash as `sys.excepthook`
"""

import os
import re
import shutil
import sys
import traceback
import unicodedata
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import rich.console
from rich.segment import Segment

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

# C0 but tab and newline, DEL, C1 (escape sequences begin with one of them); line and paragraph separator; the
# embeddings, overrides and isolates of Unicode's bidirectional algorithm (UAX 9), which show text in another order;
# halves of surrogate pairs, which no encoding has.
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_REPLACEMENT = "\ufffd"
# Letters and marks without ink: Hangul fillers, the empty Braille pattern, combining grapheme joiner, Khmer vowels that
# are not written, variation selectors.
_BLANK = re.compile("[\u115f\u1160\u3164\uffa0\u2800\u034f\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_UNSEEN_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
_SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE")  # with letters that look alike


def harmless(text: str) -> str:
    """`text` with U+FFFD for every character that acts on a terminal instead of being shown, or cannot go there."""
    return _HARMFUL.sub(_REPLACEMENT, text)


def visible(text: str) -> str:
    """`text` for a decision: also what has no ink or no width is shown, as `⟨U+200B⟩`; nothing hides in it."""
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def mixed_words(text: str) -> list[str]:
    """Words with letters of several scripts that look alike, each as `pаy: Latin and Cyrillic letters`."""
    found = {}
    for word in re.findall(r"[^\W\d_]+", text):
        if word.isascii() or word in found:
            continue
        names = {unicodedata.name(char, "").partition(" ")[0] for char in word}
        scripts = [script.capitalize() for script in _SCRIPTS if script in names]
        if len(scripts) > 1:
            found[word] = f"{word}: {' and '.join(scripts)} letters"
    return list(found.values())


class Console(rich.console.Console):
    """rich's console, whose texts are harmless however they come to it: printed, in tables, in progress bars."""

    def render(self, renderable: Any, options: rich.console.ConsoleOptions | None = None) -> Iterable[Segment]:
        """Every segment with text passes here; those that are cursor movements are controls of our own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else _harmless_segment(segment)


def can_redraw(console: Console) -> bool:
    """Whether what is shown can be changed again."""
    return console.is_terminal and not console.is_dumb_terminal


def show_plain(console: Console, text: str, end: str = "\n", style: str | None = None) -> None:
    """Print text as it is: no markup, no highlighting, no wrapping of our own."""
    console.print(text, end=end, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


def send_picture(console: Console, sequences: Iterable[str]) -> None:
    """Escape sequences of our own that draw pixels (`apps.chat.thumbnail`). They hold no text of others': numbers and
    base64 alone."""
    for sequence in sequences:
        console.file.write(sequence)
    console.file.flush()


def echo(text: str = "", *, to_stderr: bool = False, end: str = "\n", colour: str | None = None) -> None:
    """A line to stdout or stderr, with a colour where that is a terminal."""
    import typer

    text = harmless(text)
    typer.echo((typer.style(text, fg=colour) if colour else text) + end, err=to_stderr, nl=False)


def width(most: int = 200) -> int:
    """Columns for tables and wrapped lines: the terminal's, or what COLUMNS says; 80 where output goes to a pipe or a
    file. From 40 to `most`."""
    is_known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return max(40, min(most, shutil.get_terminal_size((80, 24)).columns)) if is_known else 80


def write(stream: TextIO, text: str) -> None:
    """An answer: byte for byte into a pipe or a file, harmless on a terminal."""
    stream.write(harmless(text) if stream.isatty() else text)
    stream.flush()


def open_prompt(*arguments: Any, **options: Any) -> "PromptSession[str]":
    """A prompt_toolkit session. It shows C0 and C1 as `^[` by itself, but would pass on what reorders text."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    output = create_output()
    write_text = output.write
    output.write = lambda data: write_text("\r".join(map(harmless, data.split("\r"))))  # "\r": its own line breaks
    return PromptSession(*arguments, output=output, **options)


def report_crash(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """A traceback, whose message may quote anything."""
    sys.stderr.write(harmless("".join(traceback.format_exception(kind, error, where))))


def _shown(char: str) -> str:
    is_seen = char in " \n\t" or (unicodedata.category(char) not in _UNSEEN_CATEGORIES and not _BLANK.match(char))
    return char if is_seen else f"⟨U+{ord(char):04X}⟩"


def _harmless_segment(segment: Segment) -> Segment:
    text, style, _ = segment
    if style is not None and style.link and _HARMFUL.search(style.link):
        style = style.update_link(None)
    elif not _HARMFUL.search(text):
        return segment
    return Segment(harmless(text), style)
