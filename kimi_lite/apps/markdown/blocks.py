"""Markdown source to leaves: the paragraphs, headings, tables and code blocks of a text in order, each with what
contains it.

Leaves are what `apps.markdown` commits to the screen one by one. The dialect is CommonMark with tables and
strikethrough, less what needs the whole document (link definitions) or turns words that models write into something
else (HTML, underlined headings).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

LeafKind = Literal["paragraph", "heading", "code", "rule", "table", "formula", "empty"]
_KINDS: dict[str, LeafKind] = {
    "paragraph_open": "paragraph",
    "heading_open": "heading",
    "fence": "code",
    "code_block": "code",
    "hr": "rule",
    "table_open": "table",
    "formula": "formula",
}
_MATH = (("\\[", "\\]"), ("\\(", "\\)"), ("$$", "$$"), ("$", "$"))


@dataclass(frozen=True, slots=True)
class Container:
    """A list item or a quotation. `marker` stands before its first row, `indent` before all others."""

    key: tuple[int, int]  # its first line, its depth: one container, one key
    marker: str
    indent: str
    is_item: bool
    number: int | None = None  # of an item of a numbered list


@dataclass(frozen=True, slots=True)
class Leaf:
    """A block that contains no other. Lines count from the beginning of the whole text."""

    kind: LeafKind
    tokens: tuple[Token, ...]
    containers: tuple[Container, ...]  # outermost first
    start: int
    end: int  # the line after it

    @property
    def is_closed_code(self) -> bool:
        """Whether its closing fence was seen."""
        token = self.tokens[0]
        return token.type == "fence" and token.content.count("\n") == self.end - self.start - 2

    @property
    def is_closed_formula(self) -> bool:
        return bool(self.tokens[0].meta.get("is_closed"))

    @property
    def code_lines(self) -> list[str]:
        return self.tokens[0].content.split("\n")[:-1]

    @property
    def language(self) -> str:
        """The first word after the opening fence."""
        return self.tokens[0].info.strip().partition(" ")[0]


class Blocks:
    """The parser. Inline text is parsed only where a leaf is shown: most parses are thrown away, a line later."""

    def __init__(self) -> None:
        options = {"html": False}
        unwanted = ["reference", "lheading"]
        self._block = MarkdownIt("commonmark", options).enable("table").disable([*unwanted, "inline", "text_join"])
        self._block.block.ruler.before("fence", "formula", _formula, {"alt": ["paragraph", "blockquote", "list"]})
        self._inline = MarkdownIt("commonmark", options).enable("strikethrough")
        self._inline.inline.ruler.before("escape", "math", _math)

    def leaves(self, lines: Sequence[str], base: int = 0, first_number: int | None = None) -> list[Leaf]:
        """All leaves of complete lines, the first of which is line `base` of the text. `first_number` is that of the
        first item where the lines go on with a numbered list."""
        tokens = self._block.parse("".join(line + "\n" for line in lines))
        return _Walk(tokens, base, first_number).leaves

    def inline(self, token: Token) -> list[Token]:
        """The inline tokens of an `inline` token: text, emphasis, code, links."""
        return [child for parsed in self._inline.parseInline(token.content) for child in parsed.children or []]


class _Walk:
    """One pass over the tokens of a text that keeps the stack of open containers."""

    def __init__(self, tokens: list[Token], base: int, first_number: int | None) -> None:
        self.leaves: list[Leaf] = []
        self._tokens, self._base, self._first_number = tokens, base, first_number
        self._stack: list[Container] = []
        self._numbers: list[int | None] = []  # of the next item of each open list
        at = 0
        while at < len(tokens):
            at = self._visit(at)

    def _visit(self, at: int) -> int:
        """Handle the token at `at`; the index of the next one to handle."""
        token = self._tokens[at]
        if token.type in _KINDS:
            end = at if token.nesting == 0 else self._close_of(at)
            self._add(_KINDS[token.type], tuple(self._tokens[at : end + 1]), token)
            return end + 1
        if token.type in ("bullet_list_open", "ordered_list_open"):
            number = int(token.attrs.get("start", 1)) if token.type == "ordered_list_open" else None
            if number is not None and at == 0 and self._first_number is not None:
                number = self._first_number
            self._numbers.append(number)
        elif token.type in ("bullet_list_close", "ordered_list_close"):
            self._numbers.pop()
        elif token.type == "list_item_open":
            self._open_item(at, token)
        elif token.type == "blockquote_open":
            self._stack.append(Container(self._key(token), "▌ ", "▌ ", is_item=False))
        elif token.type in ("list_item_close", "blockquote_close"):
            self._stack.pop()
        return at + 1

    def _open_item(self, at: int, token: Token) -> None:
        number = self._numbers[-1]
        marker = "• " if number is None else f"{number}{token.markup} "
        self._stack.append(Container(self._key(token), marker, " " * len(marker), is_item=True, number=number))
        if number is not None:
            self._numbers[-1] = number + 1
        if self._tokens[at + 1].type == "list_item_close":
            self._add("empty", (), token)

    def _add(self, kind: LeafKind, tokens: tuple[Token, ...], token: Token) -> None:
        start, end = token.map
        self.leaves.append(Leaf(kind, tokens, tuple(self._stack), self._base + start, self._base + end))

    def _key(self, token: Token) -> tuple[int, int]:
        return self._base + token.map[0], len(self._stack)

    def _close_of(self, at: int) -> int:
        level = self._tokens[at].level
        return next(
            i
            for i in range(at + 1, len(self._tokens))
            if self._tokens[i].level == level and self._tokens[i].nesting == -1
        )


def _formula(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A formula on lines of its own, from `$$` or `\\[` to its end or to an empty line: kept as written, for as
    above."""
    text = _line(state, start)
    close = next((close for begin, close in _MATH[::2] if text.startswith(begin)), None)
    rest = text[2:]
    if close is None or state.is_code_block(start) or (close in rest and not rest.endswith(close)):
        return False
    if silent:
        return True
    last = start
    is_closed = close in rest
    while (
        not is_closed and last + 1 < end and not state.isEmpty(last + 1) and state.sCount[last + 1] >= state.blkIndent
    ):
        last += 1
        is_closed = close in _line(state, last)
    state.line = last + 1
    token = state.push("formula", "", 0)
    token.map, token.content = [start, last + 1], state.getLines(start, last + 1, state.blkIndent, False)
    token.meta["is_closed"] = is_closed
    return True


def _line(state: StateBlock, number: int) -> str:
    return state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]].rstrip()


def _math(state: StateInline, silent: bool) -> bool:
    """Formulas stay as written: their backslashes, underscores and stars are not markdown's."""
    for begin, end in _MATH:
        if not state.src.startswith(begin, state.pos):
            continue
        start = state.pos + len(begin)
        stop = state.src.find(end, start, state.posMax)
        is_formula = stop > start and (
            begin != "$" or not (state.src[start].isspace() or state.src[stop - 1].isspace())
        )
        if not is_formula:
            return False
        if not silent:
            state.push("text", "", 0).content = state.src[state.pos : stop + len(end)]
        state.pos = stop + len(end)
        return True
    return False
