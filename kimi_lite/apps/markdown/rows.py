"""Leaves of markdown to rows of a terminal: rich wraps and colours, the markers of lists and quotations stand before.
Rows are lists of rich segments without line ends, so that they can be counted, compared and cut.
"""

from collections.abc import Iterable

from rich import box
from rich.console import ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from kimi_lite.apps.markdown.blocks import Blocks, Container, Leaf
from kimi_lite.terminal import Console

Row = list[Segment]
DIM, CODE = Style(dim=True), Style(color="cyan")
HEADINGS = {"h1": "bold underline", "h2": "bold", "h3": "bold italic"}
INLINES = {"strong": "bold", "em": "italic", "s": "strike"}
LONGEST_RULE = 60
LEAST_WIDTH = 10  # markers of deep lists leave at least this to the text


class Rows:
    """Rows as something that rich can print."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for row in self.rows:
            yield from row
            yield Segment.line()


class LeafRows:
    """Renders leaves in the order of the text; `previous` is the leaf before."""

    def __init__(self, console: Console, blocks: Blocks) -> None:
        self._console, self._blocks = console, blocks

    def render(self, leaf: Leaf, previous: Leaf | None, is_blank_between: bool) -> list[Row]:
        """All rows of a leaf that is no code, and the blank row before it if there is one."""
        rows = self.gap(leaf, previous, is_blank_between)
        return rows + self._behind_markers(self._body(leaf), leaf, previous)

    def render_code(
        self,
        leaf: Leaf,
        previous: Leaf | None,
        is_blank_between: bool,
        code: Iterable[Text],
        is_first: bool,
        is_last: bool,
    ) -> list[Row]:
        """The rows of a few lines of a code block; the fences, dim, with the first and the last."""
        lines = list(code)
        if leaf.tokens[0].type == "fence":
            begin, end = [Text(f"```{leaf.language}", DIM)] * is_first, [Text("```", DIM)] * is_last
            lines = [*begin, *lines, *end]
        rows = [list(line.render(self._console, end="")) for line in _expanded(lines)]
        gap = self.gap(leaf, previous, is_blank_between) if is_first else []
        return gap + self._prefixed(rows, leaf, previous if is_first else leaf)

    def gap(self, leaf: Leaf, previous: Leaf | None, is_blank_between: bool) -> list[Row]:
        """The blank row between two leaves: in a list or a quotation only where the source has one."""
        if previous is None:
            return []
        common = [a for a, b in zip(leaf.containers, previous.containers, strict=False) if a.key == b.key]
        is_same = bool(leaf.containers and previous.containers) and _is_list(leaf) == _is_list(previous)
        return [_indents(common)] if is_blank_between or not is_same else []

    def _behind_markers(self, body: RenderableType, leaf: Leaf, previous: Leaf | None) -> list[Row]:
        width = max(self._console.width - sum(len(c.indent) for c in leaf.containers), LEAST_WIDTH)
        options = self._console.options.update(width=width, height=None)
        return self._prefixed(self._console.render_lines(body, options, pad=False), leaf, previous)

    def _prefixed(self, rows: list[Row], leaf: Leaf, previous: Leaf | None) -> list[Row]:
        """Markers of the items that begin with this leaf before its first row, indents before the others."""
        begun = {c.key for c in previous.containers} if previous else set()
        first = [Segment(c.indent if c.key in begun else c.marker, DIM) for c in leaf.containers]
        rest = _indents(leaf.containers)
        return [[*(rest if i else first), *row] for i, row in enumerate(rows)]

    def _body(self, leaf: Leaf) -> RenderableType:
        if leaf.kind == "rule":
            return Text("─" * min(LONGEST_RULE, self._console.width), DIM)
        if leaf.kind == "table":
            return self._table(leaf)
        if leaf.kind == "formula":
            return Text(leaf.tokens[0].content, overflow="fold")
        if leaf.kind == "empty":
            return Text(" ")
        text = self._text(leaf.tokens[1])
        if leaf.kind == "heading":
            text.stylize_before(HEADINGS.get(leaf.tokens[0].tag, "italic"))
        return text

    def _table(self, leaf: Leaf) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, border_style=DIM)
        row: list[Text] = []
        for i, token in enumerate(leaf.tokens):
            if token.type == "th_open":
                style = str(token.attrs.get("style", ""))
                table.add_column(self._text(leaf.tokens[i + 1]), justify=_justify(style), overflow="fold")
            elif token.type == "td_open":
                row.append(self._text(leaf.tokens[i + 1]))
            elif token.type == "tr_close" and row:
                table.add_row(*row)
                row = []
        return table

    def _text(self, inline: object) -> Text:
        """Styled text of an inline token."""
        text, styles, urls = Text(overflow="fold"), [Style.null()], []
        for token in self._blocks.inline(inline):
            style = Style.combine(styles)
            if token.type in ("softbreak", "hardbreak"):
                text.append("\n")
            elif token.type == "code_inline":
                text.append(token.content, style + CODE)
            elif token.type == "image":
                text.append(f"{token.content} ({token.attrs.get('src', '')})", style)
            elif token.type == "link_open":
                urls.append((len(text), str(token.attrs.get("href", ""))))
            elif token.type == "link_close":
                start, url = urls.pop()
                text.append("" if text.plain[start:] == url else f" ({url})", style + DIM)
            elif token.tag in INLINES:
                styles = [*styles, Style.parse(INLINES[token.tag])] if token.nesting == 1 else styles[:-1]
            else:
                text.append(token.content, style)
        return text


def _indents(containers: Iterable[Container]) -> Row:
    return [Segment(c.indent, DIM) for c in containers]


def _is_list(leaf: Leaf) -> bool:
    return leaf.containers[0].is_item


def _justify(style: str) -> str:
    return next((side for side in ("right", "center") if f"text-align:{side}" in style), "left")


def _expanded(lines: list[Text]) -> list[Text]:
    """Tabs become spaces: a row's width must be known."""
    for line in lines:
        line.expand_tabs(4)
    return lines
