"""Messages, asked by Anthropic's own client."""

import json

import anthropic
import httpx
import pytest
from anthropic.types import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.apps.server.anthropic_messages import MessagesBody, read_conversation, without_attribution
from kimi_lite.apps.server.errors import ApiError
from kimi_lite.apps.server.files import UploadedFiles
from kimi_lite.apps.server.media import MediaParts
from tests.apps.server.running import call, running, speaking

WEATHER = {
    "name": "weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
HELLO = [{"role": "user", "content": "Hello"}]
THINKING = {"type": "enabled", "budget_tokens": 2048}


def answers(prompt: str) -> tuple[str | None, str]:
    """Asks for the weather once, then says what came back."""
    if "late" in prompt.rsplit("<|im_user|>", 1)[-1]:
        return None, "Reasoning after all.</think>The answer."
    if "weather" not in prompt:
        return "Let me see.", "Good day, 世界!"
    if "Return of" in prompt:
        return "I know it.", "It is " + prompt.rsplit("\n", 1)[-1].split("<|im_end|>")[0]
    return "I must ask.", "Asking." + call("weather", '{"city": "Bern"}')


@pytest.fixture(scope="module")
def url():
    with running(lambda: speaking(answers)) as address:
        yield address


@pytest.fixture
def client(url):
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=120)


def test_an_answer_whole_and_streamed_is_the_same(client) -> None:
    asked = {"model": "claude-any", "max_tokens": 100, "messages": HELLO}
    whole = client.messages.create(**asked)
    assert [block.model_dump() for block in whole.content] == [
        {"type": "text", "text": "Good day, 世界!", "citations": None}
    ]
    assert (whole.stop_reason, whole.stop_sequence) == ("end_turn", None)
    with client.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert [b.model_dump(exclude_none=True) for b in streamed.content] == [
        b.model_dump(exclude_none=True) for b in whole.content
    ]
    assert streamed.stop_reason == whole.stop_reason
    used, used_too = whole.usage, streamed.usage
    assert used.output_tokens == used_too.output_tokens > 5
    total = used.input_tokens + (used.cache_read_input_tokens or 0)
    assert used_too.input_tokens + (used_too.cache_read_input_tokens or 0) == total
    assert client.messages.count_tokens(model="claude-any", messages=HELLO).input_tokens == total


def test_events_come_in_anthropics_order_and_shape(url) -> None:
    body = {"model": "claude-x", "max_tokens": 200, "messages": [{"role": "user", "content": "weather?"}],
            "tools": [WEATHER], "thinking": THINKING, "stream": True, "temperature": 0}  # fmt: skip
    lines = httpx.post(f"{url}/v1/messages?beta=true", json=body, timeout=120).text.split("\n\n")
    events = []
    for lump in lines[:-1]:
        name, data = lump.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert events[0]["type"] == "message_start" and events[0]["message"]["usage"]["input_tokens"] > 20
    Message.model_validate(events[0]["message"], strict=True)
    assert events[1] == {"type": "ping"}
    started = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert started == ["thinking", "text", "tool_use"]
    open_blocks: list[int] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(open_blocks)
            open_blocks.append(event["index"])
        if event["type"] == "content_block_delta":
            assert event["index"] == open_blocks[-1]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(d.get("thinking", "") for d in deltas) == "I must ask."
    assert "".join(d.get("text", "") for d in deltas) == "Asking."
    assert json.loads("".join(d.get("partial_json", "") for d in deltas)) == {"city": "Bern"}
    assert [d["type"] for d in deltas].count("signature_delta") == 1
    assert events[-2]["type"] == "message_delta" and events[-1] == {"type": "message_stop"}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


@pytest.mark.parametrize("as_blocks", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_loop_with_a_tool(client, as_blocks: bool, streamed: bool) -> None:
    conversation = [{"role": "user", "content": "weather?"}]
    asked = {"model": "claude-x", "max_tokens": 300, "tools": [WEATHER], "thinking": THINKING}

    def say() -> Message:
        if not streamed:
            return client.messages.create(messages=conversation, **asked)
        with client.messages.stream(messages=conversation, **asked) as stream:
            return stream.get_final_message()

    first = say()
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
    assert first.content[0].signature
    called = first.content[2]
    assert (called.id, called.name, called.input) == ("functions.weather:0", "weather", {"city": "Bern"})
    result = [{"type": "text", "text": "sunny"}] if as_blocks else "sunny"
    conversation += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": called.id, "content": result}]},
    ]
    second = say()
    assert (second.content[-1].text, second.stop_reason) == ("It is sunny", "end_turn")
    assert second.usage.cache_read_input_tokens > 0.8 * second.usage.input_tokens


@pytest.mark.parametrize(("thinking", "has_thinking"), [(None, False), ("disabled", False), ("adaptive", True)])
def test_thinking_is_off_unless_it_is_asked_for(client, thinking, has_thinking: bool) -> None:
    more = {"thinking": {"type": thinking}} if thinking else {}
    answer = client.messages.create(model="claude-x", max_tokens=300, messages=HELLO, extra_body=more)
    assert ("thinking" in [block.type for block in answer.content]) is has_thinking


def test_a_budget_ends_the_thinking(client) -> None:
    answer = client.messages.create(
        model="c", max_tokens=300, messages=HELLO,
        extra_body={"thinking": {"type": "enabled", "budget_tokens": 3}},
    )  # fmt: skip
    assert len(answer.content[0].thinking) < len("Let me see.")


def test_a_stop_sequence_is_named(client) -> None:
    answer = client.messages.create(model="c", max_tokens=300, messages=HELLO, stop_sequences=["never", "day"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "day")
    assert answer.content[0].text == "Good "
    answer = client.messages.create(
        model="c",
        max_tokens=3,
        messages=HELLO,
    )
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 3)


def test_a_late_end_of_thinking(client) -> None:
    """A document tells thinking and answer apart; a stream, which cannot take back, says nothing twice."""
    asked = {"model": "c", "max_tokens": 100, "messages": [{"role": "user", "content": "late"}]}
    whole = client.messages.create(**asked)
    assert (whole.content[0].thinking, whole.content[1].text) == ("Reasoning after all.", "The answer.")
    assert len(whole.content) == 2 and whole.content[0].signature
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert [block.text for block in streamed.content] == ["Reasoning after all.", "The answer."]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "vision"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "Well"}]}, "last message"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "other"),
        ({"messages": [{"role": "user", "content": "long " * 5000}]}, "4,096"),
    ],
)
def test_what_is_wrong_is_named(client, change, words: str) -> None:
    asked = {"model": "claude-x", "max_tokens": 10, "messages": HELLO} | change
    with pytest.raises(anthropic.BadRequestError, match=words) as raised:
        client.messages.create(**asked)
    assert raised.value.body["type"] == "error"
    assert raised.value.body["error"]["type"] == "invalid_request_error"


def test_models_in_anthropics_shape(client, url) -> None:
    listed = client.models.list()
    assert [model.type for model in listed.data] == ["model"] and listed.has_more is False
    assert client.models.retrieve("claude-sonnet-4-5").id == listed.data[0].id
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("gpt-4")
    missing = httpx.post(f"{url}/v1/v1/messages", json={}, headers={"anthropic-version": "2023-06-01"})
    assert missing.status_code == 404 and "before /v1" in missing.json()["error"]["message"]


def test_what_clients_send_more_is_tolerated(client) -> None:
    history = [
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "of another server"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "Hello"},
        ]},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Go on"},
    ]  # fmt: skip
    answer = client.messages.create(
        model="claude-x", max_tokens=100, messages=history, system=[{"type": "text", "text": "You are kind."}],
        extra_body={"context_management": {"edits": []}, "output_config": {"effort": "high"}, "unknown": [1]},
        extra_headers={"anthropic-beta": "something-2026-01-01"},
    )  # fmt: skip
    assert answer.content[0].text == "Good day, 世界!"


def test_a_changing_attribution_changes_no_prompt(client) -> None:
    def asked(cch: str, as_blocks: bool) -> dict:
        line = f"x-anthropic-billing-header: cc_version=2.1.3{cch[0]}; cc_entrypoint=cli; cch={cch};"
        text = "You are kind and know " + "much. " * 40
        blocks = [{"type": "text", "text": line}, {"type": "text", "text": text}]
        system = blocks if as_blocks else f"{line}\n{text}"
        return {"model": "claude-x", "system": system, "messages": HELLO}

    counts = {
        client.messages.count_tokens(**asked(cch, as_blocks)).input_tokens
        for cch in ("00000", "a1b2c")
        for as_blocks in (False, True)
    }
    assert len(counts) == 1
    for as_blocks in (False, True):
        for cch in ("12345", "fffff"):
            last = client.messages.create(**asked(cch, as_blocks), max_tokens=5)
    assert last.usage.cache_read_input_tokens == last.usage.input_tokens + last.usage.cache_read_input_tokens - 1


@given(st.text(st.characters(exclude_characters="\n", codec="utf-8")).filter(lambda line: "cch=" not in line.lower()))
def test_other_lines_stay(line: str) -> None:
    if not line.strip().lower().startswith("x-anthropic-"):
        assert without_attribution(f"{line}\nmore") == f"{line}\nmore"
    assert without_attribution(f"x-anthropic-billing-header: {line}\nmore") == "more"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_KINDS = ("text", "image", "tool_use", "tool_result", "thinking", "redacted_thinking", "document")
_FIELDS = ("text", "thinking", "id", "name", "input", "tool_use_id", "content", "source", "is_error", "data")
_BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(_KINDS) | _JSON}, optional=dict.fromkeys(_FIELDS, st.text(max_size=5) | _JSON)
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system"]) | _JSON, "content": st.lists(_BLOCK) | _JSON}
        ),
        min_size=1,
        max_size=4,
    ),
    st.lists(_BLOCK, max_size=2) | st.text(max_size=5),
)
def test_any_conversation_is_read_or_refused(messages, system) -> None:
    try:
        read = read_conversation(
            system, MessagesBody(max_tokens=1, messages=messages).messages, MediaParts(False, UploadedFiles(), 64)
        )
    except ApiError:
        return
    for message in read:
        assert message["role"] in ("system", "user", "assistant", "tool")
        assert isinstance(message["content"], str)
