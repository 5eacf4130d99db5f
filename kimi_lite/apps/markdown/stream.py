"""Markdown on a terminal while it is written: every finished block is printed once and for good, the unfinished one can
change.

    stream = MarkdownStream(console)
    for text in answer: stream.feed(text)
    stream.finish()

Append-only: what was printed is never printed again, so long answers neither flicker nor repeat themselves in the
scrollback. Code is finished line by line, a list item by item, a paragraph or table at its end. What is printed depends
on the text alone, not on the pieces in which it came.
"""

from rich.text import Text

from kimi_lite.apps.markdown.blocks import Blocks, Leaf
from kimi_lite.apps.markdown.code import CodeColours
from kimi_lite.apps.markdown.live import LiveRows
from kimi_lite.apps.markdown.rows import LeafRows, Row, Rows
from kimi_lite.terminal import Console, harmless

MOST_LINES = 100  # of one paragraph; a longer one is printed in parts


class MarkdownStream:
    """One answer."""

    def __init__(self, console: Console) -> None:
        self._console, self._blocks = console, Blocks()
        self._rows, self._live = LeafRows(console, self._blocks), LiveRows(console)
        self._lines: list[str] = []  # complete ones that are still needed to understand the next
        self._base = 0  # the number of the first of them
        self._open = ""  # the line that is not complete
        self._first_number: int | None = None  # of the list that the lines go on with
        self._previous: Leaf | None = None  # printed last
        self._num_printed = 0  # leaves of `_lines` that are printed
        self._code: CodeColours | None = None  # of a block that is printed in part
        self._num_code_lines = 0  # of it, printed

    def feed(self, text: str) -> None:
        """The next piece of the answer."""
        self._open += text
        *complete, self._open = self._open.split("\n")
        if complete:
            rows = [row for line in complete for row in self._take(line)]
            self._print(rows)
        if self._console.is_terminal:
            self._live.draw(self._unfinished)

    def finish(self) -> None:
        """The answer is over: print what is left."""
        rows = self._take(self._open) if self._open else []
        for leaf in self._unprinted(self._lines):
            rows += self._finish_leaf(leaf)
        self._print(rows)
        self.__init__(self._console)

    def _print(self, rows: list[Row]) -> None:
        with self._console:
            if rows:
                self._live.erase()
                self._console.print(Rows(rows), end="", crop=False, soft_wrap=True)

    def _take(self, line: str) -> list[Row]:
        """Take in a complete line; the rows that it completes."""
        self._lines.append(harmless(line.removesuffix("\r")))
        leaves, rows = self._unprinted(self._lines), []
        for i, leaf in enumerate(leaves):
            if i < len(leaves) - 1 or self._is_final(leaf):
                rows += self._finish_leaf(leaf)
            elif leaf.kind == "code":
                rows += self._go_on_with_code(leaf)
        self._drop_lines()
        return rows

    def _unprinted(self, lines: list[str]) -> list[Leaf]:
        return self._blocks.leaves(lines, self._base, self._first_number)[self._num_printed :]

    def _is_final(self, leaf: Leaf) -> bool:
        """Whether the last leaf can no longer change."""
        if leaf.kind == "code":
            return leaf.is_closed_code
        if leaf.kind in ("heading", "rule") or (leaf.kind == "formula" and leaf.is_closed_formula):
            return True
        is_long = leaf.kind == "paragraph" and not leaf.containers and leaf.end - leaf.start >= MOST_LINES
        return (leaf.kind != "empty" and leaf.end < self._base + len(self._lines)) or is_long

    def _finish_leaf(self, leaf: Leaf) -> list[Row]:
        """The rows of a leaf that are not printed yet; it counts as printed."""
        rows = self._go_on_with_code(leaf, is_last=True) if leaf.kind == "code" else self._render(leaf)
        self._previous, self._code, self._num_code_lines = leaf, None, 0
        self._num_printed += 1
        return rows

    def _render(self, leaf: Leaf) -> list[Row]:
        return self._rows.render(leaf, self._previous, self._is_apart(leaf))

    def _is_apart(self, leaf: Leaf) -> bool:
        return self._previous is not None and leaf.start > self._previous.end

    def _go_on_with_code(self, leaf: Leaf, is_last: bool = False) -> list[Row]:
        """The rows of code lines not printed yet."""
        is_first = self._code is None
        self._code = self._code or CodeColours(leaf.language)
        new = leaf.code_lines[self._num_code_lines :]
        self._num_code_lines += len(new)
        code = [self._code.add(line) for line in new]
        return self._rows.render_code(leaf, self._previous, self._is_apart(leaf), code, is_first, is_last)

    def _drop_lines(self) -> None:
        """Forget lines that say nothing about the lines to come."""
        leaves = self._blocks.leaves(self._lines, self._base, self._first_number)
        if not leaves:
            return
        top = leaves[-1].containers[:1]
        if self._num_printed == len(leaves) and not top:
            start, kept = self._base + len(self._lines), []
        else:
            kept = [leaf for leaf in leaves if leaf.containers[:1] == top] if top else leaves[-1:]
            start = top[0].key[0] if top else kept[0].start
        if start == self._base:
            return
        self._num_printed -= len(leaves) - len(kept)
        self._lines, self._base = self._lines[start - self._base :], start
        self._first_number = top[0].number if top else None

    def _unfinished(self) -> list[Row]:
        """What can still change, as it looks for now."""
        open_line = harmless(self._open.removesuffix("\r"))
        if self._code is not None:
            return self._console.render_lines(Text(open_line, overflow="fold"), pad=False) if open_line else []
        leaves = self._unprinted([*self._lines, open_line] if open_line else self._lines)
        rows, previous = [], self._previous
        for leaf in leaves:
            is_apart = previous is not None and leaf.start > previous.end
            if leaf.kind == "code":
                code = [Text(line) for line in leaf.code_lines]
                rows += self._rows.render_code(
                    leaf, previous, is_apart, code, is_first=True, is_last=leaf.is_closed_code
                )
            else:
                rows += self._rows.render(leaf, previous, is_apart)
            previous = leaf
        return rows
