"""Whatever a conversation holds, what is sent has the form that strict servers demand."""

import json
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.apps.remote.portable import NO_OUTPUT, NOT_RUN, portable, typed_tools


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, *calls: tuple[str, str, str], reasoning: str = "") -> dict:
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    function = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls]
    return message | ({"tool_calls": function} if calls else {})


def tool(call_id: str, content: str) -> dict:
    return {"role": "tool", "content": content, "tool_call_id": call_id, "name": "f"}


TEXT = st.sampled_from(["", " \n", "a", "b\n"])
IDS = st.sampled_from(["functions.f:0", "functions.f:1", "call_1x", ""])
CALLS = st.lists(
    st.tuples(IDS, st.sampled_from(["f", "9 x", "é"]), st.sampled_from(["{}", "{oops", "", '{"a":\t1}'])), max_size=3
)
MESSAGES = st.one_of(
    st.builds(user, TEXT | st.lists(st.builds(lambda text: {"type": "text", "text": text}, TEXT), max_size=2)),
    st.builds(lambda content, calls, reasoning: assistant(content, *calls, reasoning=reasoning), TEXT, CALLS, TEXT),
    st.builds(tool, IDS, TEXT),
)


def is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


@settings(max_examples=400, deadline=None)
@given(messages=st.lists(MESSAGES, max_size=8))
def test_any_conversation_is_put_right(messages: list[dict]) -> None:
    sent = portable([{"role": "system", "content": "s"}, *messages])
    ids: set[str] = set()
    waiting: list[str] = []
    for before, message in zip([None, *sent], sent, strict=False):
        if message["role"] == "tool":
            waiting.remove(message["tool_call_id"])
            assert message["content"].strip()
            continue
        assert waiting == [], "a call without its result"
        content = message.get("content")
        if message["role"] == "assistant":
            assert content is None if "content" not in message else content.strip()
            assert content or message["tool_calls"]
            assert (
                "reasoning_content" in message if message.get("tool_calls") else message.get("reasoning_content") != ""
            )
            waiting = [call["id"] for call in message.get("tool_calls", ())]
            assert ids.isdisjoint(waiting) and len(set(waiting)) == len(waiting)
            ids |= set(waiting)
            for call in message.get("tool_calls", ()):
                assert call["id"]
                assert is_object(call["function"]["arguments"])
                assert call["function"]["name"].isascii() and call["function"]["name"].replace("_", "a").isalnum()
        else:
            assert content
            is_text = isinstance(content, str) and before is not None and isinstance(before.get("content"), str)
            assert not (is_text and before["role"] == message["role"] == "user")
    assert waiting == []


def test_a_sound_conversation_stays_as_it_is() -> None:
    messages = [
        {"role": "system", "content": "s"},
        user("q"),
        assistant("look", ("functions.f:0", "f", '{"a": 1}'), ("functions.f:1", "f", "{}"), reasoning="hm"),
        tool("functions.f:0", "1"),
        tool("functions.f:1", "2"),
        assistant("done", reasoning="so"),
        user([{"type": "image_url", "image_url": {"url": "data:x"}}, {"type": "text", "text": "what?"}]),
    ]
    assert portable(messages) == messages


def test_what_moonshot_refuses() -> None:
    """Thinking on and a call without reasoning_content; "text content is empty"; results that are missing or apart."""
    calls = ("a", "f", '{"t": "1\t2"}'), ("b", "f", "nothing")
    sent = portable(
        [user("q"), assistant("", *calls), tool("b", ""), tool("c", "lost"), user("go on"), tool("a", "late")]
    )
    assert sent == [
        user("q"),
        {
            "role": "assistant",
            "reasoning_content": "",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"t": "1\\t2"}'}},
                {"id": "b", "type": "function", "function": {"name": "f", "arguments": '{"malformed": "nothing"}'}},
            ],
        },
        {**tool("b", NO_OUTPUT)},
        {"role": "tool", "tool_call_id": "a", "content": NOT_RUN},
        user("go on"),
    ]


def test_names_that_are_declared_stay() -> None:
    sent = portable([assistant("x", ("1x", "a.b/c", "{}"), ("2x", "d.e", "{}"))], ["a.b/c"])
    assert [call["function"]["name"] for call in sent[0]["tool_calls"]] == ["a.b/c", "d_e"]


def untyped(schema: object) -> bool:
    """Whether some schema in it says no type."""
    if not isinstance(schema, Mapping):
        return True
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", ()), *schema.get("$defs", {}).values()]
    inner += [schema[key] for key in ("items", "additionalProperties") if isinstance(schema.get(key), Mapping)]
    has_type = any(key in schema for key in ("type", "anyOf", "$ref"))
    return not has_type or any(map(untyped, inner))


SCHEMAS = st.recursive(
    st.sampled_from(
        [{}, {"description": "d"}, {"enum": ["a"]}, {"const": 1}, {"type": "string"}, {"$ref": "#/$defs/x"}]
    ),
    lambda inner: (
        st.builds(lambda p: {"properties": p}, st.dictionaries(st.sampled_from("abc"), inner, max_size=3))
        | st.builds(lambda items: {"items": items}, inner)
        | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2))
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(schema=SCHEMAS)
def test_every_schema_gets_a_type(schema: dict) -> None:
    parameters = {"properties": {"x": schema}}
    (sent,) = typed_tools([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    assert not untyped(sent["function"]["parameters"])
    assert sent["function"]["parameters"]["type"] == "object"
    assert typed_tools([sent]) == [sent]


def test_typed_schemas_stay() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert typed_tools(tools) == tools
    assert (
        typed_tools([{"type": "function", "function": {"name": "f"}}])[0]["function"]["parameters"]["type"] == "object"
    )


@pytest.mark.parametrize("content", [None, "", []])
def test_empty_messages_are_left_out(content: object) -> None:
    assert portable([user("a"), {"role": "assistant", "content": content}, user("b")]) == [user("a\n\nb")]
