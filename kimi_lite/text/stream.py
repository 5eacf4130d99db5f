"""Generated tokens to reasoning, content and tool calls, piece by piece as they come.

Markers (`</think>`, `<|tool_call_begin|>`, ...) arrive as one control token, or spelled out in ordinary tokens, cut
anywhere: text that may be the start of a marker or a stop string is held back until it is known. Nothing the model
writes raises: a malformed call is a piece with `error`. However the same text is cut into tokens, the pieces join to
the same result.
"""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from kimi_lite.errors import KimiLiteError
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.text.tool_calls import OpenCall, ToolCall, is_json_object, name_by_arguments, name_in_id

Kind = Literal["reasoning", "content", "tool_call"]

THINK, END_THINK = "<think>", "</think>"
CALL_BEGIN, ARGUMENTS_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
SECTION_BEGIN = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")  # the model writes either
SECTION_END = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
TOOL_MARKERS = (*SECTION_BEGIN, *SECTION_END, CALL_BEGIN, ARGUMENTS_BEGIN, CALL_END)


@dataclass(frozen=True, slots=True)
class Piece:
    """A step of the answer. Of a tool call the first piece has `call` (id and name), the next ones its argument
    text."""

    kind: Kind
    text: str = ""
    call: ToolCall | None = None
    call_index: int = -1  # which call of this answer, from 0
    error: str = ""  # what is wrong with a tool call


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    SECTION = auto()  # before, between and after the calls of a section
    CALL_ID = auto()
    ARGUMENTS = auto()


class StreamParser:
    """The parser of one answer. `tools`, as declared to the model, name the call whose id is a bare number."""

    def __init__(
        self, tokenizer: Tokenizer, starts_in_reasoning: bool, stop: Sequence[str] = (), tools: Sequence[Mapping] = ()
    ) -> None:
        if not all(stop):
            raise KimiLiteError("A stop string is empty; it would stop every answer before it begins.", "Leave it out.")
        self._tokenizer, self._stop, self._tools = tokenizer, tuple(stop), tools
        self._has_think = starts_in_reasoning or THINK in tokenizer.special
        self._tool_markers = TOOL_MARKERS if CALL_BEGIN in tokenizer.special else ()
        names = (THINK, END_THINK, *self._tool_markers)
        self._markers = {tokenizer.special[name]: name for name in names if name in tokenizer.special}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._state = _State.REASONING if starts_in_reasoning else _State.CONTENT
        self._is_start = True  # nothing shown yet: a think marker spelled here is a marker, later it is a word
        self._held = self._space = ""
        self._open = OpenCall()
        self._pieces: list[Piece] = []
        self.tool_calls: tuple[ToolCall, ...] = ()  # all calls with a name, complete
        self.is_stopped = False  # a stop string was met; it and what follows is not shown

    @property
    def kind(self) -> Kind:
        """Of what the next token probably is."""
        kinds: dict[_State, Kind] = {_State.REASONING: "reasoning", _State.CONTENT: "content"}
        return kinds.get(self._state, "tool_call")

    def feed(self, token_id: int) -> list[Piece]:
        """The pieces that this token settles: often one, none while text is held back."""
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

    def finish(self) -> list[Piece]:
        """What was held back, when no token will follow; a call cut off here says so."""
        self._flush()
        if self._state is _State.ARGUMENTS:
            self._end_call()
        elif self._state is _State.CALL_ID:
            self._fail("it ends before its arguments")
        self._state = _State.CONTENT
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _flush(self) -> None:
        self._on_text(self._decoder.decode(b"", final=True), is_final=True)

    def _on_text(self, text: str, is_final: bool = False) -> None:
        """Show text up to the first marker or stop string in it, act on that, go on behind it; hold back what is
        undecided."""
        self._held += text
        while self._held and not self.is_stopped:
            if self._is_start and self._has_think:
                if not is_final and any(
                    marker.startswith(self._held) for marker in (THINK, END_THINK) if marker != self._held
                ):
                    return
                self._is_start = False
                literal = next((marker for marker in (THINK, END_THINK) if self._held.startswith(marker)), "")
                if literal:
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
            return (CALL_END, CALL_BEGIN, *SECTION_END)
        return self._tool_markers if self._state is _State.CALL_ID else (*self._tool_markers, *self._stop)

    def _on_literal(self, start: int, literal: str) -> None:
        self._show(self._held[:start])
        if self._state is _State.ARGUMENTS and self._open.is_in_string:  # a marker inside a JSON string is data
            self._show(self._held[start])
            self._held = self._held[start + 1 :]
            return
        self._held = self._held[start + len(literal) :]
        if literal in self._stop:
            self.is_stopped, self._held = True, ""
        else:
            self._on_marker(literal)

    def _show(self, text: str) -> None:
        if not text:
            return
        if self._state is _State.REASONING:
            self._pieces.append(Piece("reasoning", text))
        elif self._state is _State.CONTENT:
            self._pieces.append(Piece("content", text))
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
                self._pieces.append(Piece("content", body))

    def _on_marker(self, marker: str) -> None:
        self._is_start = False
        is_in_call = self._state in (_State.CALL_ID, _State.ARGUMENTS)
        if marker in (THINK, END_THINK):
            if is_in_call:
                self._show(marker)
            elif marker == THINK:
                self._state = _State.REASONING
            elif self._state is _State.REASONING:
                self._state = _State.CONTENT
        elif marker == ARGUMENTS_BEGIN:
            if self._state is _State.CALL_ID:
                self._begin_arguments()
        elif marker not in (CALL_END, *SECTION_END) or self._state is _State.SECTION or is_in_call:
            self._change_section(marker)

    def _change_section(self, marker: str) -> None:
        """A call or section begins or ends; whatever call is open ends with it, its end marker missing or not."""
        if self._state is _State.ARGUMENTS:
            self._end_call()
        elif self._state is _State.CALL_ID and (marker != CALL_BEGIN or self._open.header.strip()):
            self._fail("it ends before its arguments")
        self._space = ""
        if marker == CALL_BEGIN:
            self._open, self._state = OpenCall(), _State.CALL_ID
        else:
            self._state = _State.CONTENT if marker in SECTION_END else _State.SECTION

    def _begin_arguments(self) -> None:
        call_id = self._open.header.strip()
        name = name_in_id(call_id)
        if name:
            self._announce(ToolCall(call_id, name))
        self._state = _State.ARGUMENTS

    def _announce(self, call: ToolCall) -> None:
        self._open.call = call
        self._pieces.append(Piece("tool_call", call=call, call_index=len(self.tool_calls)))

    def _end_call(self) -> None:
        """Name a call that only had a number, complete empty arguments, and say it if they are not a JSON object."""
        number, arguments, index = self._open.header.strip(), self._open.arguments, len(self.tool_calls)
        if self._open.call is None:
            name = name_by_arguments(arguments, self._tools) if number.isdecimal() else None
            if name is None:
                self._fail(f"its id names no tool; its arguments are {arguments[:200]!r}")
                return
            self._announce(ToolCall(f"functions.{name}:{number}", name))
            self._pieces.append(Piece("tool_call", arguments, call_index=index))
        elif not arguments:
            arguments = "{}"
            self._pieces.append(Piece("tool_call", arguments, call_index=index))
        call = self._open.call
        assert call is not None
        self.tool_calls += (ToolCall(call.id, call.name, arguments),)
        if not is_json_object(arguments):
            error = f"Tool call {call.id} has arguments that are not a JSON object (malformed, or cut off)."
            self._pieces.append(Piece("tool_call", call_index=index, error=error))

    def _fail(self, reason: str) -> None:
        error = f"Tool call {self._open.header.strip()[:80]!r} cannot be used: {reason}."
        self._pieces.append(Piece("tool_call", error=error))


def _first_complete(text: str, literals: Sequence[str]) -> tuple[int, str]:
    """The literal that is complete first, whichever way the text arrived, and where it starts; (0, "") if none is."""
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
