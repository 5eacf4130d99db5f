"""The tool calls of an OpenAI-style stream, put together from deltas of every shape that servers send.

By the book a call begins with a delta of its own `index`, with id and name, and its arguments follow under that index.
Met in the field besides (issue trackers of vLLM, SGLang, Ollama, llama-server, OpenRouter, LiteLLM and of their
clients): all calls under index 0; no index, or text; ids missing, the same for all, new or repeated in every chunk;
names in pieces or repeated; arguments as an object, growing, or repeated whole in the last chunk; several calls'
arguments in one; the legacy `function_call`. `CallDeltas` gives the pieces that `text.stream` gives for a local model.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from kimi_lite.text.stream import Piece
from kimi_lite.text.tool_calls import (
    SEVERAL,
    ArgumentReader,
    CallBook,
    ToolCall,
    complaint,
    declared_names,
    read_arguments,
    tool_of,
)


class _Delta(NamedTuple):
    """What one entry says, as far as it can be read."""

    index: int | None
    id: str
    name: str
    arguments: str


class _Call:
    """A call as far as it has come. `event`: which event began it."""

    def __init__(self, index: int | None, event: int) -> None:
        self.index, self.event = index, event
        self.id = self.name = ""
        self.written: list[str] = []  # arguments as they came
        self.reader = ArgumentReader()
        self.announced: ToolCall | None = None
        self.certain = ""  # arguments that are known and not shown
        self.shown: list[str] = []

    def add(self, arguments: str) -> None:
        self.written.append(arguments)
        self.certain += self.reader.feed(arguments)


class CallDeltas:
    """The calls of one answer. `tools` as declared; `num_calls` is how many calls the conversation had before."""

    def __init__(self, tools: Sequence[Mapping] = (), num_calls: int = 0) -> None:
        self._tools, self._names, self._book = tools, frozenset(declared_names(tools)), CallBook(num_calls)
        self._calls: list[_Call] = []
        self._num_events = 0
        self.tool_calls: tuple[ToolCall, ...] = ()  # complete ones, at the end

    def feed(self, entries: object) -> list[Piece]:
        """What is certain after the `tool_calls` of one event (or a `function_call`): of the first call only."""
        self._num_events += 1
        for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
            if isinstance(entry, Mapping):
                self._add(_read(entry))
        first = self._calls[0] if self._calls else None
        if first is None or first.index not in (None, 0) or first.reader.is_empty:
            return []
        return self._show(first, 0)

    def finish(self) -> list[Piece]:
        """The rest of the first call, and the others; with index by that, else as they came."""
        order = sorted(enumerate(self._calls), key=lambda item: (_or(item[1].index, item[0]), item[0]))
        pieces: list[Piece] = []
        complete: list[tuple[_Call, ToolCall]] = []
        for call in _split([call for _, call in order]):
            whole, error = self._whole(call)
            if whole is None:
                pieces.append(Piece("tool_call", error=f"Tool call {call.id!r} cannot be used: it names no tool."))
            elif not _is_repeated(call, whole, complete):
                pieces += self._end(call, whole, error, len(complete))
                complete.append((call, whole))
        self.tool_calls = tuple(call for _, call in complete)
        return pieces

    def _add(self, delta: _Delta) -> None:
        call = self._call_of(delta)
        if call is None:
            call = _Call(delta.index, self._num_events)
            self._calls.append(call)
        call.index = delta.index if call.index is None else call.index
        call.id = call.id or delta.id
        call.name = self._joined(call, delta.name)
        if delta.arguments:
            call.add(delta.arguments)

    def _call_of(self, delta: _Delta) -> _Call | None:
        """The call that a delta goes on with; None: it begins one."""
        if not self._calls:
            return None
        same_id = [call for call in self._calls if delta.id and call.id == delta.id]
        at_index = [call for call in self._calls if call.index == delta.index or delta.index is None]
        both = [call for call in same_id if call in at_index]
        if both:
            return None if self._is_new(both[-1], delta) else both[-1]
        if same_id and not delta.name:  # under another index than before
            return same_id[-1]
        if not at_index:
            is_late_index = self._calls[-1].index is None and not delta.name and not delta.id
            return self._calls[-1] if is_late_index else None
        return None if self._is_new(at_index[-1], delta) else at_index[-1]

    def _is_new(self, call: _Call, delta: _Delta) -> bool:
        """Whether a delta in `call`'s place begins another call."""
        if not delta.name:  # some servers make a new id for every chunk
            return False
        if call.event == self._num_events and delta.index is None and not delta.id:  # whole calls in one list
            return True
        is_same_id = not delta.id or not call.id or delta.id == call.id
        if call.reader.is_empty:  # its name goes on or is repeated
            is_other = {call.name, delta.name} <= self._names and delta.name != call.name
            return not is_same_id or (is_other and call.name + delta.name not in self._names)
        if call.reader.is_closed:
            is_repeated = is_same_id and delta.name == call.name and bool(delta.id) and not delta.arguments
            return not is_repeated
        if not is_same_id:
            return delta.name != call.name or not delta.arguments or delta.arguments.lstrip().startswith("{")
        return delta.name in self._names and delta.name != call.name

    def _joined(self, call: _Call, name: str) -> str:
        """The call's name with what a delta adds: a piece, or the name (so far) again."""
        known = call.name
        if not name or not known or (call.reader.is_empty and known + name in self._names):
            return known + name
        if name.startswith(known):
            return name
        return known + name if call.reader.is_empty else known

    def _show(self, call: _Call, index: int) -> list[Piece]:
        """What is new of a call that can be named."""
        pieces = self._announce(call, self._name(call), index)
        if call.announced and call.certain:
            pieces.append(Piece("tool_call", call.certain, call_index=index))
            call.shown.append(call.certain)
            call.certain = ""
        return pieces

    def _announce(self, call: _Call, name: str, index: int) -> list[Piece]:
        if call.announced or not name:
            return []
        call.announced = ToolCall(self._book.id_for(call.id, name, is_foreign=True), name)
        return [Piece("tool_call", call=call.announced, call_index=index)]

    def _name(self, call: _Call, arguments: str | None = None) -> str:
        if call.name:
            return tool_of(call.name, self._tools) or call.name
        return tool_of(call.id, self._tools, arguments) or ""

    def _whole(self, call: _Call) -> tuple[ToolCall | None, str]:
        """The complete call, its id as it was sent, and what is wrong with its arguments; None: it names no tool."""
        call.certain += call.reader.finish().text
        arguments, error = call.reader.text, read_arguments("".join(call.written)).error
        if error and (grown := _grown(call.written)):
            arguments, error = grown, ""
        name = call.announced.name if call.announced else self._name(call, arguments)
        return (ToolCall(call.id, name, arguments) if name else None), error

    def _end(self, call: _Call, whole: ToolCall, error: str, index: int) -> list[Piece]:
        """The call's last pieces: what was not shown yet, or all again if what was shown was not it."""
        pieces = self._announce(call, whole.name, index)
        assert call.announced is not None
        shown = "".join(call.shown)
        if whole.arguments.startswith(shown):
            rest = whole.arguments[len(shown) :]
            pieces += [Piece("tool_call", rest, call_index=index)] if rest else []
        else:
            again = ToolCall(call.announced.id, whole.name, whole.arguments)
            pieces.append(Piece("tool_call", call=again, call_index=index))
        if error:
            pieces.append(Piece("tool_call", call_index=index, error=complaint(call.announced.id, error)))
        return pieces


def _split(calls: Sequence[_Call]) -> list[_Call]:
    """Several calls whose arguments came as those of one are several calls of its tool."""
    result: list[_Call] = []
    for call in calls:
        text = "".join(call.written)
        objects = _objects(text) if read_arguments(text).error == SEVERAL and not _grown(call.written) else []
        if not objects:
            result.append(call)
        for i, one in enumerate(objects):
            part = _Call(call.index, call.event)
            part.id, part.name = "" if i else call.id, call.name
            if i == 0:
                part.announced, part.shown = call.announced, call.shown
            part.add(one)
            result.append(part)
    return result


def _is_repeated(call: _Call, whole: ToolCall, before: Sequence[tuple[_Call, ToolCall]]) -> bool:
    """Whether a call is an earlier one again: under no other id, in another event, with the same or no arguments."""
    for first, earlier in before:
        is_same_id = not call.id or call.id == first.id
        if not is_same_id or call.event == first.event or whole.name != earlier.name:
            continue
        if not call.written or _value(whole.arguments) == _value(earlier.arguments):
            return True
    return False


def _read(entry: Mapping) -> _Delta:
    """An entry of `tool_calls`, or a legacy `function_call`, whose fields may be of any type."""
    function = entry.get("function")
    function = function if isinstance(function, Mapping) else entry
    arguments = next((function[key] for key in ("arguments", "input", "parameters") if key in function), None)
    if arguments is None or isinstance(arguments, str):
        text = _clean(arguments or "")
    else:
        text = read_arguments(arguments).text
    index, call_id, name = entry.get("index"), entry.get("id"), function.get("name")
    if isinstance(index, str) and index.isdecimal() and len(index) < 6:
        index = int(index)
    is_index = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < 100_000
    if isinstance(call_id, int) and not isinstance(call_id, bool):
        call_id = str(call_id)[:20]
    return _Delta(index if is_index else None, _text(call_id), _text(name), text)


def _text(value: object) -> str:
    return _clean(value) if isinstance(value, str) else ""


def _clean(text: str) -> str:
    """Text that can be encoded: servers may send halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def _grown(written: Sequence[str]) -> str:
    """The last piece, where every piece was the whole so far; else nothing."""
    if len(written) < 2:
        return ""
    text, error = read_arguments(written[-1])
    if error:
        return ""
    first, last = _value(written[0]), _value(text)
    is_more = isinstance(first, dict) and isinstance(last, dict) and first != last and first.items() <= last.items()
    return text if is_more or all(later.startswith(piece) for piece, later in pairwise(written)) else ""


def _objects(text: str) -> list[str]:
    """The JSON objects that `text` is a row of; none where it is something else."""
    decoder, objects, at = json.JSONDecoder(strict=False), [], 0
    while at < len(text):
        if text[at].isspace() or text[at] in ",;":
            at += 1
            continue
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict):
            return []
        objects.append(text[at:end])
        at = end
    return objects


def _value(text: str) -> object:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return text


def _or(value: int | None, other: int) -> int:
    return other if value is None else value
