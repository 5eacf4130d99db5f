"""Responses, asked by OpenAI's own client; every event and document is checked against its types."""

import json

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from kimi_lite.apps.server.errors import ApiError
from kimi_lite.apps.server.files import UploadedFiles
from kimi_lite.apps.server.media import MediaParts
from kimi_lite.apps.server.messages import read_messages
from kimi_lite.apps.server.responses import _opened, messages_of, sealed
from kimi_lite.apps.server.stored import StoredResponse, StoredResponses
from tests.apps.server.running import call, running, speaking

FIND = {"type": "function", "name": "find", "description": "", "parameters": {"type": "object", "properties": {}},
        "strict": False}  # fmt: skip
PATCH = {"type": "custom", "name": "apply_patch", "description": "Patches",
         "format": {"type": "grammar", "syntax": "lark", "definition": "start: /a/"}}  # fmt: skip
PATCH_TEXT = '*** Begin Patch\n+"quoted" \\ 世\n*** End Patch'
EVENT, DOCUMENT = TypeAdapter(ResponseStreamEvent), TypeAdapter(Response)


def answers(prompt: str) -> tuple[str, str]:
    """Calls what it is told to; else says what a tool returned, or good day."""
    question = prompt.rsplit("<|im_user|>", 1)[-1]
    if "Return of" in question:
        return "I know it.", "It is " + prompt.rsplit("\n", 1)[-1].split("<|im_end|>")[0]
    if "patch" in question:
        return "I must patch.", call("apply_patch", json.dumps({"input": PATCH_TEXT}))
    if "find" in question:
        return "I must find.", "Looking." + call("find", '{"what": [1, 2]}')
    return "Let me see.", "Again!" if "Good day" in prompt else "Good day, 世界!"


@pytest.fixture(scope="module")
def url():
    with running(lambda: speaking(answers)) as address:
        yield address


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def streamed(url: str, **body: object) -> list[dict]:
    """The events of a request, each valid, numbered and named."""
    text = httpx.post(f"{url}/v1/responses", json={"stream": True, **body}, timeout=120).text
    events = []
    for lump in text.split("\n\n")[:-1]:
        name, data = lump.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def without_names(response: dict) -> dict:
    """What does not differ between two answers to the same request."""
    output = [{k: v for k, v in item.items() if k != "id"} for item in response["output"]]
    usage = response["usage"] | {"input_tokens_details": None}
    return {**response, "output": output, "id": "", "created_at": 0, "usage": usage}


@pytest.mark.parametrize(
    ("question", "kinds"),
    [
        ("Hello", ["reasoning", "message"]),
        ("find it", ["reasoning", "message", "function_call"]),
        ("patch it", ["reasoning", "custom_tool_call"]),
    ],
)
@pytest.mark.parametrize("more", [{}, {"include": ["reasoning.encrypted_content", "message.output_text.logprobs"]}])
def test_an_answer_whole_and_streamed_is_the_same(url, question: str, kinds: list[str], more) -> None:
    body = {"input": question, "tools": [FIND, PATCH], "temperature": 0, **more}
    whole = httpx.post(f"{url}/v1/responses", json=body, timeout=120).json()
    DOCUMENT.validate_python(whole)
    events = streamed(url, **body)
    last = events[-1]
    assert last["type"] == "response.completed"
    assert without_names(last["response"]) == without_names(whole)
    assert [item["type"] for item in whole["output"]] == kinds
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["item"] for event in done] == last["response"]["output"]
    assert [event["output_index"] for event in done] == list(range(len(kinds)))
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == done[event["output_index"]]["item"]["id"]
    for event, kind in zip(done, kinds, strict=True):
        deltas = "".join(
            e["delta"] for e in events
            if e["type"].endswith(".delta") and e["output_index"] == event["output_index"]
        )  # fmt: skip
        item = event["item"]
        field = {"function_call": "arguments", "custom_tool_call": "input"}.get(kind)
        assert deltas == (item[field] if field else item["content"][0]["text"])
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    if more and kinds[-1] == "message":
        entries = whole["output"][-1]["content"][0]["logprobs"]
        assert b"".join(bytes(e["bytes"]) for e in entries).decode() == whole["output"][-1]["content"][0]["text"]


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize(("question", "kind"), [("find it", "function_call"), ("patch it", "custom_tool_call")])
def test_a_loop_with_a_tool(client, by_id: bool, question: str, kind: str) -> None:
    asked = {"model": "x", "tools": [FIND, PATCH], "temperature": 0, "instructions": "Be brief. " * 20}
    asked["include"] = ["reasoning.encrypted_content"]
    conversation: list = [{"role": "user", "content": [{"type": "input_text", "text": question}]}]
    first = client.responses.create(input=conversation, store=by_id, **asked)
    called = first.output[-1]
    assert called.type == kind and called.call_id.startswith("functions.")
    if kind == "custom_tool_call":
        assert called.input == PATCH_TEXT
    result = {"type": f"{kind}_output", "call_id": called.call_id, "output": "done"}
    if by_id:
        second = client.responses.create(input=[result], previous_response_id=first.id, **asked)
    else:
        items = [item.model_dump(exclude_none=True) for item in first.output]
        for item in items:  # Codex drops the text of reasoning and keeps what is sealed
            if item["type"] == "reasoning":
                del item["content"]
        second = client.responses.create(input=[*conversation, *items, result], store=False, **asked)
    assert second.output_text == "It is done"
    used = second.usage
    assert used.input_tokens_details.cached_tokens > first.usage.input_tokens + 0.5 * first.usage.output_tokens


def test_conversations_go_on_by_their_ids(client) -> None:
    first = client.responses.create(model="x", input="Hello", instructions="Speak.")
    second = client.responses.create(model="x", input="More", previous_response_id=first.id)
    assert second.output_text == "Again!" and second.previous_response_id == first.id
    assert client.responses.retrieve(first.id).output_text == first.output_text
    reference = [{"type": "item_reference", "id": first.output[-1].id}, {"role": "user", "content": "More"}]
    assert client.responses.create(model="x", input=reference).output_text == "Again!"
    client.responses.delete(first.id)
    for ask in (
        lambda: client.responses.retrieve(first.id),
        lambda: client.responses.create(model="x", input="More", previous_response_id=first.id),
        lambda: client.responses.create(model="x", input=[{"type": "item_reference", "id": "msg_0"}]),
    ):
        with pytest.raises(openai.NotFoundError, match="never stored"):
            ask()
    unstored = client.responses.create(model="x", input="Hello", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)


def test_the_store_is_bounded() -> None:
    stored = StoredResponses()
    for i in range(1200):
        stored.add(StoredResponse({"id": str(i)}, (), 10))
    assert stored.get("1199") and stored.get("200")
    with pytest.raises(ApiError):
        stored.get("199")
    stored.add(StoredResponse({"id": "large"}, (), 64 << 20))
    with pytest.raises(ApiError):
        stored.get("1199")


def test_a_limit_makes_it_incomplete(url) -> None:
    last = streamed(url, input="Hello", max_output_tokens=3)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["usage"]["output_tokens"] == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"background": True}, "background"),
        ({"input": ""}, "no input"),
        ({"input": [{"type": "computer_call"}]}, "computer_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:x"}]}]}, "vision"),
        ({"tools": [FIND], "tool_choice": {"type": "function", "name": "other"}}, "other"),
        ({"input": "long " * 5000}, "4,096"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema"),
    ],
)
def test_what_is_wrong_is_named(client, change, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.responses.create(**({"model": "x", "input": "Hello"} | change))


def test_tools_that_run_elsewhere_are_left_out(client) -> None:
    answer = client.responses.create(model="x", input="find it", tools=[{"type": "web_search"}, FIND])
    assert [tool.type for tool in answer.tools] == ["function"] and answer.output[-1].type == "function_call"


@given(st.text(st.characters(codec="utf-8")))
def test_sealed_reasoning_is_opened_again(text: str) -> None:
    assert _opened(sealed(text)) == text
    assert _opened(text) == "" or text == sealed(_opened(text))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_KINDS = (
    "message",
    "reasoning",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
)
_FIELDS = ("role", "content", "summary", "encrypted_content", "name", "arguments", "call_id", "input", "output", "id")
_ITEM = st.dictionaries(st.sampled_from(_FIELDS), st.text(max_size=5) | _JSON).flatmap(
    lambda item: (st.sampled_from(_KINDS) | _JSON).map(lambda kind: {**item, "type": kind})
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_ITEM, max_size=5))
def test_any_items_are_read_or_refused(items) -> None:
    try:
        read = read_messages(messages_of(items), MediaParts(False, UploadedFiles(), 64))
    except ApiError:
        return
    for message in read:
        assert message["role"] in ("system", "user", "assistant", "tool")
        assert isinstance(message["content"], str)
