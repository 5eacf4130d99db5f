"""Arguments in every form that models and servers write, ids to names, and that no cut of the text matters."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.text.tool_calls import (
    MALFORMED,
    SEVERAL,
    ArgumentReader,
    CallBook,
    is_json_object,
    read_arguments,
    tool_of,
)

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8) | st.sampled_from(
    ["'", '"', "\\", "\n\t", "</x>"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=4)
PLAIN = st.text(
    st.characters(min_codepoint=32, exclude_categories=("Cs", "Cc", "Cf", "Zl", "Zp", "Zs", "Cn", "Co")), max_size=6
)


def read_in_parts(text: str, cuts: list[int]) -> tuple[str, str]:
    """What the reader gives for `text` cut at these places."""
    reader, out = ArgumentReader(), ""
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in pairwise(bounds):
        out += reader.feed(text[start:end])
        assert reader.text == out
    rest, error = reader.finish()
    assert reader.text == out + rest
    return reader.text, error


CUTS = st.lists(st.integers(0, 80), max_size=8)


@settings(max_examples=200, deadline=None)
@given(value=OBJECTS, indent=st.none() | st.integers(0, 2), is_ascii=st.booleans(), cuts=CUTS)
def test_json_passes_as_it_is(value: dict, indent: int | None, is_ascii: bool, cuts: list[int]) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii, indent=indent)
    assert read_in_parts(f" {text}\n", cuts) == (text, "")


@settings(max_examples=200, deadline=None)
@given(value=OBJECTS, cuts=CUTS)
def test_control_characters_in_strings_are_escaped(value: dict, cuts: list[int]) -> None:
    written = json.dumps(value, ensure_ascii=False)
    for escape in ("n", "t", "r", "b", "f"):
        written = (
            written.replace("\\\\", "\0")
            .replace(f"\\{escape}", f'"\\{escape}"'.encode().decode("unicode_escape")[1:-1])
            .replace("\0", "\\\\")
        )
    text, error = read_in_parts(written, cuts)
    assert (json.loads(text), error) == (value, "")


PYTHON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | PLAIN,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(PLAIN, children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(value=st.dictionaries(PLAIN, PYTHON, max_size=4), cuts=CUTS)
def test_dicts_as_python_writes_them(value: dict, cuts: list[int]) -> None:
    text, error = read_in_parts(repr(value), cuts)
    assert (json.loads(text), error) == (value, "")


WRAPPED = {
    "as it is": "%s",
    "in a fence": "```json\n%s\n```",
    "in a bare fence": "```\n%s```",
    "with an end tag": "%s</tool_call>",
    "with words after it": "%s\nI call it now.",
    "with a bracket too many": "%s}",
    "after an empty object": "{}%s",
    "before an empty one": "%s\n{}",
    "after a byte order mark": "\ufeff%s",
}


@settings(max_examples=200, deadline=None)
@given(value=OBJECTS, how=st.sampled_from(sorted(WRAPPED)), num_quoted=st.integers(0, 2), cuts=CUTS)
def test_what_stands_around_is_undone(value: dict, how: str, num_quoted: int, cuts: list[int]) -> None:
    text = WRAPPED[how] % json.dumps(value)
    for _ in range(num_quoted):
        text = json.dumps(text)
    text, error = read_in_parts(text, cuts)
    assert (json.loads(text), error) == (value, "")


@settings(max_examples=100, deadline=None)
@given(value=OBJECTS, cuts=CUTS)
def test_a_repeated_object_is_one(value: dict, cuts: list[int]) -> None:
    text, error = read_in_parts(json.dumps(value) + json.dumps(value, indent=1), cuts)
    assert (json.loads(text), error) == (value, "")


@settings(max_examples=300, deadline=None)
@given(text=st.text("{}[]\"'\\:,ntu1 \n`xTrue", max_size=20) | TEXT, cuts=CUTS)
def test_whatever_is_written_every_cut_gives_the_same(text: str, cuts: list[int]) -> None:
    whole = read_in_parts(text, [])
    assert read_in_parts(text, cuts) == whole == tuple(read_arguments(text))
    assert bool(whole[1]) != is_json_object(whole[0]) or whole[1] == SEVERAL


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "{}"),
        ("", "{}"),
        (" null ", "{}"),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        ('{"a": 1,}', '{"a": 1}'),
        ('{"a": [1, 2,], }', '{"a": [1, 2] }'),
        ('{"re": "\\d+\\.", "u": "\\u12"}', '{"re": "\\\\d+\\\\.", "u": "\\\\u12"}'),
        ('{{"a": 1}}', '{"a": 1}'),
        ("{'say': 'it\\'s \"so\"'}", '{"say": "it\'s \\"so\\""}'),
        ('{ \n}{"a": 1}', '{"a": 1}'),
    ],
)
def test_forms(value: object, text: str) -> None:
    assert read_arguments(value) == (text, "")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("[1]", MALFORMED),
        ([1], MALFORMED),
        (7, MALFORMED),
        (float("nan"), MALFORMED),
        ('"words"', MALFORMED),
        ('{"a": NaN}', MALFORMED),
        ('{"a": ', MALFORMED),
        ('{"a": "cut', MALFORMED),
        ("{oops", MALFORMED),
        ('{"a": 1}{"a": 2}', SEVERAL),
        ("[" * 5000, MALFORMED),
        ('{"a":' * 5000, MALFORMED),
        (json.dumps(json.dumps(json.dumps(json.dumps({})))), MALFORMED),
    ],
)
def test_what_is_no_object_says_so(value: object, error: str) -> None:
    assert read_arguments(value).error == error


def test_long_arguments_take_time_in_proportion() -> None:
    """A file of 2 MB, a few characters at a time; quadratic work would take minutes."""
    reader, text = ArgumentReader(), json.dumps({"text": "line of a file\n" * 140_000})
    for start in range(0, len(text), 5):
        reader.feed(text[start : start + 5])
    assert reader.finish() == ("", "")
    assert reader.text == text


def tool(name: str, *properties: str, required: list[str] | None = None) -> dict:
    schema = {"properties": {key: {} for key in properties}, "required": required or []}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [
    tool("read", "path"),
    tool("read_file", "path", "first", required=["path"]),
    tool("exec", "code", required=["code"]),
]


@pytest.mark.parametrize(
    ("call_id", "arguments", "name"),
    [
        ("functions.read:0", None, "read"),
        ("functionsread_file0", None, "read_file"),  # the longer of two names within each other
        ("x-read_file-read-1", None, "read_file"),
        ("exec and read_file", None, None),
        ("call_1", '{"path": "a"}', None),  # two tools take it
        ("call_1", '{"path": "a", "first": 1}', "read_file"),
        ("call_1", "{}", "read"),  # the others need something
        ("call_1", '{"code": "1", "more": 2}', None),
        ("executor", None, None),
        ("functions.unknown:3", None, "unknown"),
    ],
)
def test_the_tool_of_an_id(call_id: str, arguments: str | None, name: str | None) -> None:
    assert tool_of(call_id, TOOLS, arguments) == name


@pytest.mark.parametrize(
    "tools", [["f"], [{}], [{"function": "f"}], [{"function": {"name": 3, "parameters": [], "required": 1}}]]
)
def test_odd_declarations_name_nothing(tools: list) -> None:
    assert tool_of("3", tools, '{"x": 1}') is None


def test_ids_are_given_once() -> None:
    book = CallBook(4)
    given_ids = [book.id_for(written, "f") for written in ("functions.f:0", "functions.f:0", "", "", "7", "call_7x")]
    assert given_ids == [
        "functions.f:0",
        "functions.f:1",
        "functions.f:6",
        "functions.f:7",
        "functions.f:8",
        "functions.f:9",
    ]
    assert CallBook().id_for("call_9aX", "f", is_foreign=True) == "call_9aX"
