"""Generated text to reasoning, content and tool calls, piece by piece as it comes.

Markers (`</think>`, `<|tool_call_begin|>`, ...) arrive as one control token, or spelled out in ordinary tokens, cut
anywhere: text that may be the start of a marker or a stop string is held back until it is known. Nothing the model
writes raises: a malformed call is a piece with `error`. However the same text is cut into tokens, the pieces join to
the same result. `StreamParser` reads a local model's tokens, `TextParser` (its base) an endpoint's texts.
"""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from kimi_lite.errors import KimiLiteError
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.text.tool_calls import ArgumentReader, CallBook, ToolCall, complaint, tool_of

Kind = Literal["reasoning", "content", "tool_call"]

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Dialect:
    """The markers a family of models writes calls in. `section_*`: any of them."""

    section_begin: tuple[str, ...]
    section_end: tuple[str, ...]
    call_begin: str
    arguments_begin: str  # between what names the call and its arguments
    call_end: str
    has_ids: bool  # what names the call is Kimi's id, else the tool's name

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.section_begin, *self.section_end, self.call_begin, self.arguments_begin, self.call_end)


KIMI = Dialect(
    ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>"),  # the model writes either
    ("<|tool_calls_section_end|>", "<|tool_call_section_end|>"),
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    has_ids=True,
)
# V3 and R1 write `function`, the separator, the name on a line and the arguments in a code fence; V3.1 the name, the
# separator and the arguments.
DEEPSEEK = Dialect(
    ("<｜tool▁calls▁begin｜>",),
    ("<｜tool▁calls▁end｜>",),
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    has_ids=False,
)


def dialect_of(special: Mapping[str, int]) -> Dialect | None:
    """The dialect whose markers a vocabulary has; None: calls of such a model cannot be read."""
    return next((d for d in (KIMI, DEEPSEEK) if d.call_begin in special and d.arguments_begin in special), None)


@dataclass(frozen=True, slots=True)
class Piece:
    """A step of the answer. Of a tool call the first piece has `call` (id and name), the next ones its argument
    text."""

    kind: Kind
    text: str = ""
    call: ToolCall | None = None
    call_index: int = -1  # which call of this answer, from 0
    error: str = ""  # what is wrong with a tool call
    unsaid: str = ""  # what came as content (or reasoning) and turned out to be this piece's text instead


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    SECTION = auto()  # before, between and after the calls of a section
    CALL_ID = auto()
    ARGUMENTS = auto()


class _OpenCall:
    """The call being received: what names it, and its arguments."""

    def __init__(self) -> None:
        self.header = ""
        self.name_line: str | None = None  # DeepSeek V3: the arguments begin with the name on a line; None: they do not
        self.reader = ArgumentReader()
        self.call: ToolCall | None = None

    def add(self, text: str) -> str:
        """Append argument text; returns what of the arguments is certain."""
        if self.name_line is not None and not self.name_line.endswith("\n"):
            line, end, text = text.partition("\n")
            self.name_line += line + end
        return self.reader.feed(text)


class TextParser:
    """The parser of one answer's text.

    `tools`, as declared to the model, name calls whose id does not; `num_calls` is how many calls the conversation had
    before. `knows_bare_end`: a `</think>` spelled in content ends reasoning whose beginning the prompt held.
    """

    def __init__(
        self,
        dialect: Dialect | None,
        has_think: bool,
        starts_in_reasoning: bool,
        stop: Sequence[str] = (),
        tools: Sequence[Mapping] = (),
        num_calls: int = 0,
        knows_bare_end: bool = False,
    ) -> None:
        if not all(stop):
            raise KimiLiteError("A stop string is empty; it would stop every answer before it begins.", "Leave it out.")
        self._dialect, self._stop, self._tools = dialect, tuple(stop), tools
        self._has_think, self._knows_bare_end = has_think, knows_bare_end
        self._tool_markers = dialect.markers if dialect else ()
        self._state = _State.REASONING if starts_in_reasoning else _State.CONTENT
        self._is_start = True  # nothing shown yet: a think marker spelled here is a marker, later it is a word
        self._said: list[str] | None = None if starts_in_reasoning else []  # content that may be reasoning after all
        self._held = self._space = ""
        self._open, self._book = _OpenCall(), CallBook(num_calls)
        self._pieces: list[Piece] = []
        self.tool_calls: tuple[ToolCall, ...] = ()  # all calls with a name, complete
        self.stopped_by: str | None = None  # the stop string that was met; it and what follows is not shown

    @property
    def kind(self) -> Kind:
        """Of what comes next, probably."""
        kinds: dict[_State, Kind] = {_State.REASONING: "reasoning", _State.CONTENT: "content"}
        return kinds.get(self._state, "tool_call")

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was met."""
        return self.stopped_by is not None

    @property
    def may_be_reasoning(self) -> bool:
        """Whether what came as content may still turn out to be reasoning."""
        return self._knows_bare_end and self._said is not None

    def feed_text(self, text: str) -> list[Piece]:
        """The pieces that this text makes certain: often one, none while text is held back."""
        if not self.is_stopped:
            self._on_text(text)
        return self._take()

    def enter(self, kind: Literal["reasoning", "content"]) -> list[Piece]:
        """From here on the text is of this kind, whatever it says itself; an open call goes on."""
        state = _State.REASONING if kind == "reasoning" else _State.CONTENT
        if self._state is not state and self._state in (_State.REASONING, _State.CONTENT):
            self._flush()
            self._state, self._said = state, None
        return self._take()

    def finish(self) -> list[Piece]:
        """What was held back, when nothing will follow; a call cut off here says so."""
        self._flush()
        if self._state is _State.ARGUMENTS:
            self._end_call()
        elif self._state is _State.CALL_ID:
            self._end_header()
        self._state = _State.CONTENT
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _flush(self) -> None:
        self._on_text("", is_final=True)

    def _on_text(self, text: str, is_final: bool = False) -> None:
        """Show text up to the first marker or stop string in it, act on that, go on behind it; hold back what is
        undecided."""
        self._held += text
        while self._held and not self.is_stopped:
            if self._is_start and self._has_think:
                begun = self._held.lstrip()
                if not is_final and any(m.startswith(begun) for m in (THINK, END_THINK) if m != begun):
                    return
                self._is_start = False
                literal = next((marker for marker in (THINK, END_THINK) if begun.startswith(marker)), "")
                if literal:
                    self._held = begun
                    self._on_literal(0, literal)
                    continue
            literals = self._literals()
            start, literal = _first_complete(self._held, literals)
            if literal:
                self._on_literal(start, literal)
                continue
            shown = len(self._held) - (0 if is_final else _num_undecided(self._held, literals))
            self._show(self._held[:shown])
            self._held = self._held[shown:]
            return

    def _literals(self) -> tuple[str, ...]:
        """What ends the text of this state where it is spelled out."""
        if self._state is _State.REASONING:
            return (END_THINK, *self._tool_markers) if self._has_think else self._tool_markers
        if self._state is _State.ARGUMENTS:
            assert self._dialect is not None
            return (self._dialect.call_end, self._dialect.call_begin, *self._dialect.section_end)
        if self._state is _State.CALL_ID:
            return self._tool_markers
        bare_end = (END_THINK,) if self._knows_bare_end and self._said is not None else ()
        return (*self._tool_markers, *bare_end, *self._stop)

    def _on_literal(self, start: int, literal: str) -> None:
        self._show(self._held[:start])
        if self._state is _State.ARGUMENTS and self._open.reader.is_in_string:  # a marker inside a JSON string is data
            self._show(self._held[start])
            self._held = self._held[start + 1 :]
            return
        self._held = self._held[start + len(literal) :]
        if literal in self._stop:
            self.stopped_by, self._held = literal, ""
        else:
            self._on_marker(literal)

    def _show(self, text: str) -> None:
        if not text:
            return
        if self._state is _State.REASONING:
            self._said = None
            self._pieces.append(Piece("reasoning", text))
        elif self._state is _State.CONTENT:
            self._say(text)
        elif self._state is _State.CALL_ID:
            self._open.header += text
        elif self._state is _State.ARGUMENTS:
            body = self._open.add(text)
            if body and self._open.call:
                self._pieces.append(Piece("tool_call", body, call_index=len(self.tool_calls)))
        else:  # words between calls are content; blanks around them are layout
            text = self._space + text
            body = text.rstrip()
            self._space = text[len(body) :]
            if body:
                self._say(body)

    def _say(self, text: str) -> None:
        if self._said is not None:
            self._said.append(text)
        self._pieces.append(Piece("content", text))

    def _on_marker(self, marker: str) -> None:
        self._is_start = False
        is_in_call = self._state in (_State.CALL_ID, _State.ARGUMENTS)
        if marker in (THINK, END_THINK):
            if is_in_call:
                self._show(marker)
            elif marker == THINK:
                self._state, self._said = _State.REASONING, None
            elif self._state is _State.REASONING:
                self._state = _State.CONTENT
            elif self._state is _State.CONTENT:
                self._unsay()
            return
        assert self._dialect is not None
        if marker == self._dialect.arguments_begin:
            if self._state is _State.CALL_ID:
                self._begin_arguments()
            return
        is_end = marker in (self._dialect.call_end, *self._dialect.section_end)
        if not is_end or self._state not in (_State.CONTENT, _State.REASONING):
            self._change_section(marker)

    def _unsay(self) -> None:
        """A `</think>` that nothing opened: if it is the first, what came so far was reasoning."""
        text, self._said = "".join(self._said or ()), None
        if text:
            self._pieces.append(Piece("reasoning", text, unsaid=text))

    def _change_section(self, marker: str) -> None:
        """A call or section begins or ends; whatever call is open ends with it, its end marker missing or not."""
        assert self._dialect is not None
        self._said = None
        if self._state is _State.ARGUMENTS:
            self._end_call()
        elif self._state is _State.CALL_ID and (marker != self._dialect.call_begin or self._open.header.strip()):
            self._end_header()
        self._space = ""
        if marker == self._dialect.call_begin:
            self._open, self._state = _OpenCall(), _State.CALL_ID
        else:
            self._state = _State.CONTENT if marker in self._dialect.section_end else _State.SECTION

    def _begin_arguments(self) -> None:
        assert self._dialect is not None
        header = self._open.header = self._open.header.strip()
        if not self._dialect.has_ids and header == "function":
            self._open.name_line = ""
        else:
            name = tool_of(header, self._tools) or (None if self._dialect.has_ids else header)
            if name:
                self._announce(name)
        self._state = _State.ARGUMENTS

    def _end_header(self) -> None:
        """A call that ends before the marker of its arguments; these may stand behind the id all the same."""
        header, brace, arguments = self._open.header.partition("{")
        if not brace:
            self._fail("it ends before its arguments")
            return
        self._open.header = header
        self._begin_arguments()
        self._show(brace + arguments)
        self._end_call()

    def _announce(self, name: str) -> None:
        assert self._dialect is not None
        call_id = self._book.id_for(self._open.header if self._dialect.has_ids else "", name)
        self._open.call = ToolCall(call_id, name)
        self._pieces.append(Piece("tool_call", call=self._open.call, call_index=len(self.tool_calls)))

    def _end_call(self) -> None:
        """Name a call that nothing named yet, complete its arguments, and say it if they are not a JSON object."""
        opened, index = self._open, len(self.tool_calls)
        rest, error = opened.reader.finish()
        arguments = opened.reader.text
        if opened.call is None:
            name = tool_of((opened.name_line or opened.header).strip(), self._tools, arguments)
            name = name or (opened.name_line or "").strip()
            if not name:
                self._fail(f"its id names no tool; its arguments are {arguments[:200]!r}")
                return
            self._announce(name)
            rest = arguments
        if rest:
            self._pieces.append(Piece("tool_call", rest, call_index=index))
        assert opened.call is not None
        self.tool_calls += (ToolCall(opened.call.id, opened.call.name, arguments),)
        if error:
            self._pieces.append(Piece("tool_call", call_index=index, error=complaint(opened.call.id, error)))

    def _fail(self, reason: str) -> None:
        error = f"Tool call {self._open.header.strip()[:80]!r} cannot be used: {reason}."
        self._pieces.append(Piece("tool_call", error=error))


class StreamParser(TextParser):
    """The parser of one answer of a local model: tokens in, pieces out."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        starts_in_reasoning: bool,
        stop: Sequence[str] = (),
        tools: Sequence[Mapping] = (),
        num_calls: int = 0,
        is_plain: bool = False,
    ) -> None:
        """is_plain: all is content; markers mean nothing and, like other control tokens, have no text."""
        dialect = None if is_plain else dialect_of(tokenizer.special)
        has_think = not is_plain and (starts_in_reasoning or THINK in tokenizer.special)
        super().__init__(dialect, has_think, starts_in_reasoning, stop, tools, num_calls)
        names = () if is_plain else (THINK, END_THINK, *self._tool_markers)
        self._tokenizer = tokenizer
        self._markers = {tokenizer.special[name]: name for name in names if name in tokenizer.special}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> list[Piece]:
        """The pieces that this token makes certain."""
        if self.is_stopped:
            return []
        if token_id in self._markers:
            self._flush()
            if not self.is_stopped:
                self._on_marker(self._markers[token_id])
        elif self._tokenizer.is_control(token_id):
            self._flush()
        else:
            self._on_text(self._decoder.decode(self._tokenizer.decode_bytes(token_id)))
        return self._take()

    def _flush(self) -> None:
        self._on_text(self._decoder.decode(b"", final=True), is_final=True)


def _first_complete(text: str, literals: Sequence[str]) -> tuple[int, str]:
    """The literal that is complete first, however the text was cut, and where it starts; (0, "") if none is."""
    found = [(text.find(literal), literal) for literal in literals]
    return min(
        ((at, literal) for at, literal in found if at >= 0),
        key=lambda hit: (hit[0] + len(hit[1]), hit[0]),
        default=(0, ""),
    )


def _num_undecided(text: str, literals: Sequence[str]) -> int:
    """Length of the longest end of `text` that some literal begins with."""
    longest = max(map(len, literals), default=1) - 1
    sizes = range(min(len(text), longest), 0, -1)
    return next((size for size in sizes if any(literal.startswith(text[-size:]) for literal in literals)), 0)
