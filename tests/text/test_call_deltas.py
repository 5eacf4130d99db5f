"""The same calls, streamed as servers stream them and cut anywhere, are the same calls."""

import json
from collections.abc import Callable, Iterable
from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.text.call_deltas import CallDeltas
from kimi_lite.text.stream import Piece
from kimi_lite.text.tool_calls import ToolCall

NAMES = ["read", "read_file", "add", "search.web", "x-1"]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"properties": {"a": {}}}}} for name in NAMES]
CALL = st.tuples(
    st.sampled_from(NAMES), st.dictionaries(st.text("ab", max_size=2), st.integers() | st.text(max_size=5), max_size=3)
)
Call = tuple[str, dict]
Entry = dict


def streamed(pieces: Iterable[Piece]) -> tuple[list[ToolCall], list[str]]:
    """The calls as a client puts them together, and the errors."""
    calls: dict[int, ToolCall] = {}
    errors = []
    for piece in pieces:
        if piece.error:
            errors.append(piece.error)
        if piece.call:
            calls[piece.call_index] = piece.call
        elif piece.text:
            call = calls[piece.call_index]
            calls[piece.call_index] = ToolCall(call.id, call.name, call.arguments + piece.text)
    assert list(calls) == list(range(len(calls)))
    return list(calls.values()), errors


def read(events: Iterable[list[Entry] | Entry], num_calls: int = 0) -> tuple[list[ToolCall], list[str]]:
    deltas = CallDeltas(TOOLS, num_calls)
    pieces = [piece for event in events for piece in deltas.feed(event)] + deltas.finish()
    calls, errors = streamed(pieces)
    assert [(c.name, c.arguments) for c in calls] == [(c.name, c.arguments) for c in deltas.tool_calls]
    return calls, errors


def cut(text: str, cuts: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(at for at in cuts if at < len(text))})
    return [text[start:end] for start, end in pairwise(bounds)]


def entry(index: object, call_id: str | None, name: str | None, arguments: object) -> Entry:
    function = ({} if name is None else {"name": name}) | {"arguments": arguments}
    return (
        {"function": function}
        | ({} if index is None else {"index": index})
        | ({} if call_id is None else {"id": call_id})
    )


def by_the_book(calls: list[Call], cuts: list[int]) -> list[list[Entry]]:
    events = []
    for i, (name, arguments) in enumerate(calls):
        events.append([entry(i, f"call_{i}x", name, "")])
        events += [[entry(i, None, None, piece)] for piece in cut(json.dumps(arguments), cuts)]
    return events


def in_turns(calls: list[Call], cuts: list[int]) -> list[list[Entry]]:
    """All headers first, then a piece of each in turn."""
    parts = [cut(json.dumps(arguments), cuts) for _, arguments in calls]
    events = [[entry(i, f"call_{i}x", name, "") for i, (name, _) in enumerate(calls)]]
    for step in range(max(map(len, parts), default=0)):
        events += [[entry(i, None, None, part[step])] for i, part in enumerate(parts) if step < len(part)]
    return events


def backwards(calls: list[Call], cuts: list[int]) -> list[list[Entry]]:
    """The last index first."""
    events = []
    for i, (name, arguments) in reversed(list(enumerate(calls))):
        events += [[entry(str(i), f"call_{i}x", name, ""), entry(i, None, None, json.dumps(arguments))]]
    return events


def all_index_0(calls: list[Call], cuts: list[int]) -> list[list[Entry]]:
    return [[e | {"index": 0} for e in event] for event in by_the_book(calls, cuts)]


def no_index(calls: list[Call], cuts: list[int]) -> list[list[Entry]]:
    return [[{key: e[key] for key in e if key != "index"} for e in event] for event in by_the_book(calls, cuts)]


def whole_objects(calls: list[Call], cuts: list[int]) -> list[list[Entry]]:
    """As Ollama did: no index, arguments as objects, all in one event."""
    return [[entry(None, None, name, arguments) for name, arguments in calls]]


def whole_with_index_0(calls: list[Call], cuts: list[int]) -> list[list[Entry]]:
    return [[entry(0, f"call_{i}x", name, json.dumps(arguments))] for i, (name, arguments) in enumerate(calls)]


def repeated_at_the_end(calls: list[Call], cuts: list[int]) -> list[list[Entry]]:
    last = [entry(i, f"call_{i}x", name, json.dumps(arguments)) for i, (name, arguments) in enumerate(calls)]
    return [*by_the_book(calls, cuts), last]


def new_ids(calls: list[Call], cuts: list[int]) -> list[list[Entry]]:
    """A random id with every chunk."""
    numbers = count()
    return [[e | {"id": f"chatcmpl-tool-{next(numbers)}z"} for e in event] for event in by_the_book(calls, cuts)]


def ids_and_names_again(calls: list[Call], cuts: list[int]) -> list[list[Entry]]:
    events = []
    for i, (name, arguments) in enumerate(calls):
        events += [[entry(i, f"call_{i}x", name, piece)] for piece in ["", *cut(json.dumps(arguments), cuts)]]
    return events


def names_in_pieces(calls: list[Call], cuts: list[int]) -> list[list[Entry]]:
    events = []
    for i, (name, arguments) in enumerate(calls):
        first, *others = cut(name, cuts)
        events.append([entry(i, f"call_{i}x", first, "")])
        events += [[entry(i, None, other, "")] for other in others]
        events += [[entry(i, None, None, piece)] for piece in cut(json.dumps(arguments), cuts)]
    return events


def growing(calls: list[Call], cuts: list[int]) -> list[list[Entry]]:
    """Every chunk has the arguments so far."""
    events = []
    for i, (name, arguments) in enumerate(calls):
        text = json.dumps(arguments)
        events.append([entry(i, f"call_{i}x", name, "")])
        events += [
            [entry(i, None, None, text[:end])]
            for end in sorted({len(text), *(at for at in cuts if 0 < at < len(text))})
        ]
    return events


def names_in_ids(calls: list[Call], cuts: list[int]) -> list[list[Entry]]:
    events = []
    for i, (name, arguments) in enumerate(calls):
        events += [[entry(i, f"functions.{name}:{i}", None, "")], [entry(i, None, None, json.dumps(arguments))]]
    return events


STYLES: list[Callable[[list[Call], list[int]], list[list[Entry]]]] = [
    by_the_book, in_turns, backwards, all_index_0, no_index, whole_objects, whole_with_index_0, repeated_at_the_end,
    new_ids, ids_and_names_again, names_in_pieces, growing, names_in_ids,
]  # fmt: skip


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
@settings(max_examples=60, deadline=None)
@given(calls=st.lists(CALL, min_size=1, max_size=4), cuts=st.lists(st.integers(1, 40), max_size=6))
def test_every_style_gives_the_calls(style: Callable, calls: list[Call], cuts: list[int]) -> None:
    found, errors = read(style(calls, cuts))
    assert ([(c.name, json.loads(c.arguments)) for c in found], errors) == (calls, [])
    assert len({c.id for c in found}) == len(calls)


def test_the_legacy_function_call() -> None:
    events = [{"name": "add", "arguments": ""}, {"arguments": '{"a": '}, {"arguments": "1}"}]
    assert read(events) == ([ToolCall("functions.add:0", "add", '{"a": 1}')], [])


def test_one_id_and_index_for_all() -> None:
    """As a server behind OpenRouter does."""
    events = [[entry(0, "call", name, f'{{"a": {i}}}')] for i, name in enumerate(["add", "add", "read"])]
    calls, errors = read(events, 5)
    assert [(c.id, c.name, c.arguments) for c in calls] == [
        ("call", "add", '{"a": 0}'), ("functions.add:6", "add", '{"a": 1}'), ("functions.read:7", "read", '{"a": 2}'),
    ]  # fmt: skip
    assert errors == []


def test_several_calls_in_one() -> None:
    calls, errors = read([[entry(0, "call_1x", "add", '{"a": 1}\n{"a"')], [entry(0, None, None, ': 2}{"a": 3}')]])
    assert [(c.name, c.arguments) for c in calls] == [("add", f'{{"a": {i}}}') for i in (1, 2, 3)]
    assert (len({c.id for c in calls}), errors) == (3, [])


def test_what_cannot_be_used_says_so() -> None:
    calls, errors = read([[entry(0, "x9", None, "{oops")], [entry(1, None, "add", "{oops")]])
    assert [(c.id, c.arguments) for c in calls] == [("functions.add:0", "{oops")]
    assert errors == [
        "Tool call 'x9' cannot be used: it names no tool.",
        "Tool call functions.add:0 has arguments that are not a JSON object (malformed, or cut off).",
    ]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["index", "id", "function", "name", "arguments", "input"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(events=st.lists(JUNK, max_size=4))
def test_whatever_comes_nothing_raises(events: list) -> None:
    calls, _ = read(events)
    assert all(isinstance(c.name, str) and c.name for c in calls)
