"""What clients send of messages, tools and choices, read or refused by name; never a 500."""

import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.apps.server.errors import ApiError
from kimi_lite.apps.server.files import UploadedFiles
from kimi_lite.apps.server.media import MediaParts
from kimi_lite.apps.server.messages import read_choice, read_messages, read_tools
from kimi_lite.engine.engine import Engine
from kimi_lite.errors import MemoryEnded
from tests.apps.server.running import running, speaking

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def objects(fields: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    """Objects with some of these fields, each right or anything."""
    return st.fixed_dictionaries({}, optional={name: right | _JSON for name, right in fields.items()})


_FUNCTION = objects({"name": st.sampled_from(["f", "g", "$web"]), "arguments": st.just("{}") | st.just({"a": 1}),
                     "parameters": st.just({"type": "object"}), "description": st.text(max_size=3)})  # fmt: skip
_CALL = objects({"id": st.just("functions.f:0"), "type": st.just("function"), "function": _FUNCTION})
_PART = objects({"type": st.sampled_from(["text", "input_text", "image_url", "refusal"]), "text": st.text(max_size=3)})
_MESSAGE = objects({
    "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"]),
    "content": st.text(max_size=5) | st.lists(_PART, max_size=2), "name": st.just("f"),
    "reasoning_content": st.text(max_size=3), "reasoning": st.text(max_size=3),
    "tool_call_id": st.just("functions.f:0"),
    "tool_calls": st.lists(_CALL, max_size=2), "function_call": _FUNCTION,
})  # fmt: skip
_TOOL = objects({"type": st.sampled_from(["function", "builtin_function"]), "function": _FUNCTION})
_CHOICE = st.sampled_from(["auto", "none", "required"]) | objects({"function": _FUNCTION, "name": st.just("f")})


@settings(max_examples=200, deadline=None)
@given(st.lists(_MESSAGE, max_size=4), st.lists(_TOOL, max_size=3), _CHOICE)
def test_anything_is_read_or_refused(messages, tools, choice) -> None:
    for work in (
        lambda: read_messages(messages, MediaParts(False, UploadedFiles(), 64)),
        lambda: read_choice(choice, read_tools(tools, True, "x")),
    ):
        try:
            work()
        except ApiError as error:
            problem = error
        else:
            continue
        assert problem.status == 400 and problem.message
    try:
        read = read_messages(messages, MediaParts(False, UploadedFiles(), 64))
    except ApiError:
        return
    for message in read:
        assert isinstance(message["content"], str)
        for each in message.get("tool_calls", []):
            assert isinstance(each["function"]["name"], str) and isinstance(each["function"]["arguments"], str)


def echo(prompt: str) -> tuple[str, str]:
    """The end of the prompt, its control tokens as text."""
    return "Hm.", prompt[-300:].replace("<", "(")


@pytest.fixture(scope="module")
def url():
    with running(lambda: speaking(echo)) as address:
        yield address


@settings(max_examples=60, deadline=None)
@given(st.lists(_MESSAGE, min_size=1, max_size=4), st.lists(_TOOL, max_size=3), _CHOICE, st.booleans())
def test_anything_is_answered_or_refused(url, messages, tools, choice, stream: bool) -> None:
    body = {"messages": messages, "tools": tools, "tool_choice": choice, "max_tokens": 3, "stream": stream}
    response = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(body), timeout=120)
    assert response.status_code in (200, 400), response.text
    assert "internal_error" not in response.text and "engine_stopped" not in response.text


def _forgetful() -> Engine:
    """Whose memory ends in prompts of more than 1,000 tokens."""
    engine = speaking(echo)

    def fail_in_long(batch, layer) -> None:
        if batch.positions.max() > 1000:
            raise MemoryEnded("The GPU ran out of memory.", "Allow fewer experts there.")

    engine.model.before_layer = fail_in_long
    return engine


def test_memory_that_ends_is_told_and_a_smaller_request_is_answered() -> None:
    paths = {"/v1/chat/completions": "messages", "/v1/messages": "messages", "/v1/responses": "input"}
    with running(_forgetful) as url:
        for path, field in paths.items():
            for stream in (False, True):
                body = {"model": "fake", "max_tokens": 100, "stream": stream}
                long, short = (body | {field: [{"role": "user", "content": text}]} for text in ("long " * 300, "Hi"))
                refused = httpx.post(url + path, json=long)
                assert refused.status_code == (200 if stream else 503), refused.text
                assert "The GPU ran out of memory." in refused.text and "engine_stopped" not in refused.text
                response = httpx.post(url + path, json=short)
                assert response.status_code == 200 and "ran out" not in response.text
        assert httpx.get(f"{url}/health").json()["status"] == "ok"


_KEYWORDS = ("type", "properties", "required", "items", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs",
             "pattern", "minLength", "maximum", "multipleOf", "additionalProperties", "format", "not", "if", "default",
             "minItems", "prefixItems", "description", "nullable", "patternProperties", "uniqueItems")  # fmt: skip
_TYPES = ("object", "string", "array", "integer", "number", "boolean", "null")
_LEAF = st.sampled_from([{"type": name} for name in _TYPES])
_ANY = st.dictionaries(st.sampled_from(_KEYWORDS), _JSON, max_size=3)


def _nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    properties = st.dictionaries(st.text(max_size=4), inner, max_size=3)
    of_objects = st.fixed_dictionaries({"type": st.just("object"), "properties": properties})
    return of_objects | st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=3)})


_SCHEMA = st.recursive(_LEAF | _ANY, _nested, max_leaves=6)


@settings(max_examples=80, deadline=None)
@given(_SCHEMA, st.booleans(), st.booleans())
def test_any_schema_is_followed_or_refused(url, schema, of_a_tool: bool, is_strict: bool) -> None:
    body: dict = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "thinking": {"type": "disabled"}}
    if of_a_tool:
        function = {"name": "f", "parameters": schema, "strict": is_strict}
        body |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    else:
        wanted = {"name": "x", "schema": schema, "strict": is_strict}
        body["response_format"] = {"type": "json_schema", "json_schema": wanted}
    response = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(body), timeout=120)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}, {"role": "system", "content": "late"}, {"role": "user", "content": "b"}],
        [{"role": "developer", "content": "late"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "reasoning": "r"},
         {"role": "user", "content": ["late", {"type": "text", "text": "b"}]}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
         {"role": "function", "name": "f", "content": "late"}],
    ],
)  # fmt: skip
def test_forms_of_messages_that_clients_send(url, messages) -> None:
    body = {"messages": messages, "functions": [{"name": "f"}], "function_call": "none"}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert "late" in answer["content"]
