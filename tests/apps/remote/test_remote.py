"""A conversation with an OpenAI-compatible endpoint: what is sent, what is read however it is cut, and every way to
fail."""

import copy
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.apps.remote.deltas import DeltaReader
from kimi_lite.apps.remote.endpoint import address_of, retry_after_s
from kimi_lite.apps.remote.http import Server
from kimi_lite.apps.remote.session import RemoteSession
from kimi_lite.apps.remote.sse import EventReader
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.documents import to_document
from kimi_lite.engine.turns import AnswerRecord
from kimi_lite.engine.types import SamplingParams, Token
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.tool_calls import ToolCall
from tests.apps.fake_openai import Answer, FakeOpenAI, call_delta, sse

USAGE = {"prompt_tokens": 24, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}
FULL = sse(
    {"role": "assistant", "content": ""},
    {"reasoning_content": "hm 你"},
    {"reasoning": "好\u2028"},
    {"content": "I call.\n"},
    call_delta(0, "", "add", "functions.add:0"),
    call_delta(0, '{"a": '),
    call_delta(0, "1}"),
    call_delta(1, '{"b"', "sub", "functions.sub:1"),
    call_delta(1, ": 2}"),
    reason="tool_calls",
    usage=USAGE,
)
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "KIMI_LITE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def texts(tokens: list[Token]) -> dict[str, str]:
    return {
        kind: "".join(token.text for token in tokens if token.kind == kind)
        for kind in ("reasoning", "content", "tool_call")
    }


def read(pieces: list[bytes], **options: object) -> list[Token]:
    """As the session reads a stream."""
    events, reader, tokens = EventReader(), DeltaReader("a", **options), []
    for event in [event for piece in pieces for event in events.feed(piece)] + events.finish():
        tokens += reader.feed(json.loads(event)) if event != "[DONE]" else []
    return tokens + reader.finish()


def essence(tokens: list[Token]) -> list[tuple]:
    return [
        (token.kind, token.text, token.call, token.call_index, token.finish_reason, token.error) for token in tokens
    ]


def test_a_stream_becomes_tokens() -> None:
    tokens = read([FULL])
    assert texts(tokens) == {"reasoning": "hm 你好\u2028", "content": "I call.\n", "tool_call": '{"a": 1}{"b": 2}'}
    assert [token.call for token in tokens if token.call] == [
        ToolCall("functions.add:0", "add"),
        ToolCall("functions.sub:1", "sub"),
    ]
    last = tokens[-1]
    assert (last.finish_reason, last.stats.prompt_tokens, last.stats.cached_tokens) == ("tool_calls", 24, 8)
    assert last.stats.generated_tokens == 9
    unknown = read([sse({"content": "a"}, {"content": "b"})])[-1].stats  # a server that does not count
    assert (unknown.prompt_tokens, unknown.prompt_tok_s, unknown.generated_tokens) == (0, None, 2)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, len(FULL)), max_size=30), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_any_chunks_give_the_same_tokens(points: list[int], line_end: bytes) -> None:
    data = FULL.replace(b"\n", line_end)
    ends = [0, *sorted(points), len(data)]
    assert essence(read([data[a:b] for a, b in pairwise(ends)])) == essence(read([FULL]))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text("<think>/ab", max_size=4), max_size=20))
def test_think_tags_in_the_content_are_found_however_they_are_cut(pieces: list[str]) -> None:
    text = "<think>" + "".join(pieces) + "</think>rest"
    whole = texts(read([sse({"content": text})]))
    assert texts(read([sse(*[{"content": char} for char in text])])) == whole
    assert whole["reasoning"] + "</think>" + whole["content"] == text.removeprefix("<think>")


def test_content_that_only_looks_like_thinking_stays() -> None:
    assert texts(read([sse({"content": "<thin"}, {"content": "g> x"})]))["content"] == "<thing> x"
    assert texts(read([sse({"content": "<th"})]))["content"] == "<th"


def test_calls_that_come_interleaved_are_kept_apart() -> None:
    deltas = [
        call_delta(0, '{"a"', "f", "x"),
        call_delta(1, '{"b"', "g", "y"),
        call_delta(0, ":1}"),
        call_delta(1, ":2}"),
    ]
    tokens = read([sse(*deltas)])
    assert texts(tokens)["tool_call"] == '{"a":1}{"b":2}'
    assert tokens[-1].finish_reason == "tool_calls"


def test_calls_without_ids_get_kimis() -> None:
    tokens = read([sse(call_delta(0, "", "f"), call_delta(1, "no json", "g"))])
    assert [token.call.id for token in tokens if token.call] == ["functions.f:0", "functions.g:1"]
    assert texts(tokens)["tool_call"] == "{}no json"
    assert [token.error for token in tokens if token.error] == [
        "Tool call functions.g:1 has arguments that are not a JSON object (malformed, or cut off)."
    ]


def test_halves_of_surrogate_pairs_do_no_harm() -> None:
    data = b'data: {"choices": [{"delta": {"content": "a\\ud83db"}}]}\n\n'
    assert texts(read([data]))["content"] == "a?b"


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as server:
        yield server


def opened(fake: FakeOpenAI, *answers: Answer | bytes, **options: object) -> RemoteSession:
    fake.answers += [Answer([answer]) if isinstance(answer, bytes) else answer for answer in answers]
    return RemoteSession.open(fake.url, **options)


def test_a_conversation(fake: FakeOpenAI) -> None:
    sampling = SamplingParams(top_k=5, seed=7, max_tokens=20)
    answer_settings = AnswerSettings(is_thinking=False, sampling=sampling)
    session = opened(
        fake, FULL, sse({"content": "3"}, usage=USAGE), api_key="secret", system="be brief", settings=answer_settings
    )
    assert (session.info.name, session.context_length) == ("kimi-k2.5", 4096)
    tokens = list(session.ask("1+2?", tools=[TOOL]))
    assert tokens[-1].finish_reason == "tool_calls"
    assert session.pending_calls == (
        ToolCall("functions.add:0", "add", '{"a": 1}'),
        ToolCall("functions.sub:1", "sub", '{"b": 2}'),
    )
    list(session.answer_calls([("functions.add:0", "3"), ("functions.sub:1", "no")]))
    first, second = fake.bodies
    assert first["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+2?"}]
    assert (first["model"], first["stream"], first["temperature"], first["top_p"]) == ("kimi-k2.5", True, 0.6, 0.95)
    assert (first["top_k"], first["seed"], first["max_tokens"]) == (5, 7, 20)
    assert first["chat_template_kwargs"] == {"thinking": False}
    assert first["tools"] == [TOOL]
    assert "min_p" not in first
    assistant, *results = second["messages"][2:]
    assert assistant["reasoning_content"] == "hm 你好\u2028"
    assert [call["id"] for call in assistant["tool_calls"]] == ["functions.add:0", "functions.sub:1"]
    assert [(r["tool_call_id"], r["content"]) for r in results] == [("functions.add:0", "3"), ("functions.sub:1", "no")]
    assert all(headers["Authorization"] == "Bearer secret" for headers in fake.headers)
    assert session.turns[-1].content == "3"
    session.close()


def test_what_past_calls_carry_is_json_for_the_server(fake: FakeOpenAI) -> None:
    session = opened(fake, sse(call_delta(0, "{oops", "add", "functions.add:0")), sse({"content": "ok"}))
    list(session.ask("?", tools=[TOOL]))
    list(session.answer_calls([("functions.add:0", "Error")]))
    assert json.loads(fake.bodies[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"malformed": "{oops"}


def test_images_go_as_data_urls(fake: FakeOpenAI) -> None:
    session = opened(fake, sse({"content": "a cat"}))
    parts = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "text", "text": "what?"},
    ]
    list(session.ask(parts))
    assert fake.bodies[0]["messages"][0]["content"] == parts


def test_a_server_that_does_not_stream(fake: FakeOpenAI) -> None:
    message = {"role": "assistant", "content": "whole", "reasoning_content": "r"}
    document = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": USAGE}
    data = json.dumps(document).encode()
    session = opened(fake, Answer([data[:20], data[20:]], 200, "application/json"))
    tokens = list(session.ask("?"))
    assert texts(tokens) == {"reasoning": "r", "content": "whole", "tool_call": ""}
    assert tokens[-1].stats.prompt_tokens == 24


def test_fields_that_a_server_does_not_know_are_left_out_if_that_changes_nothing(fake: FakeOpenAI) -> None:
    refusals = [
        Answer([json.dumps({"error": {"message": f"Unknown field {name}"}}).encode()], 400)
        for name in ("stream_options", "x")
    ]
    session = opened(fake, refusals[0], sse({"content": "ok"}))
    assert texts(list(session.ask("?")))["content"] == "ok"
    assert ["stream_options" in body for body in fake.bodies] == [True, False]
    fake.answers.append(refusals[1])
    with pytest.raises(KimiLiteError, match=r"answered 400 .*Unknown field x"):
        list(session.ask("?"))
    fake.answers.append(Answer([b'{"error": {"message": "no chat_template_kwargs"}}'], 400))
    session.set_thinking(False)
    with pytest.raises(KimiLiteError, match="chat_template_kwargs"):
        list(session.ask("?"))


@pytest.mark.parametrize(
    ("answer", "message", "hint"),
    [
        (Answer([b'{"error": {"message": "bad key"}}'], 401), "401 .no API key was given.*bad key", "--api-key"),
        (Answer([b'{"detail": "no model"}'], 404), "404 .*no model", "/v1"),
        (Answer([b'{"error": "slow down"}'], 429, headers={"Retry-After": "7"}), "429 .*slow down", "Wait 7 s"),
        (Answer([b"<html>bad gateway</html>"], 502), "502 .refused.[.]\n", "log"),
        (Answer([b'{"message": "maximum context length is 4096"}'], 400), "context length is 4096", "request"),
        (Answer([b""], 307, headers={"Location": "http://there/v1"}), "307", "http://there/v1"),
        (Answer([sse({"content": "par"}, reason=None, is_done=False)]), "ended the answer in the middle", "/regen"),
        (Answer([b'data: {"error": {"message": "out of memory"}}\n\n']), "broke off: out of memory", "/regen"),
        (Answer([b"data: {oops\n\n"]), "no JSON", "OpenAI"),
        (Answer([b"<html></html>"], 200, "text/html"), "no OpenAI-compatible API: it answers with text/html", "/v1"),
        (Answer([sse({"content": "par"}, reason=None, is_done=False)], is_cut=True), "was lost", "/regen"),
    ],
)
def test_every_failure_is_a_sentence(fake: FakeOpenAI, answer: Answer, message: str, hint: str) -> None:
    session = opened(fake, answer, model="m")
    with pytest.raises(KimiLiteError, match=message) as caught:
        list(session.ask("?"))
    assert hint in caught.value.hint
    said = texts([])["content"] if b"par" not in b"".join(answer.pieces) else "par"
    assert [turn.content for turn in session.turns if turn.role == "assistant"] == ([said] if said else [])


def test_a_key_is_never_shown(fake: FakeOpenAI) -> None:
    session = opened(
        fake, Answer([b'{"error": {"message": "Incorrect key sk-123 given"}}'], 401), model="m", api_key="sk-123"
    )
    with pytest.raises(KimiLiteError) as caught:
        list(session.ask("?"))
    assert "sk-123" not in str(caught.value)
    assert "sk-123" not in repr(vars(session))
    with pytest.raises(KimiLiteError, match="no header can carry"):
        Server("http://x", "ключ")


def test_the_key_comes_from_the_environment(fake: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    opened(fake)
    monkeypatch.setenv("KIMI_LITE_API_KEY", "own")
    opened(fake)
    opened(fake, api_key="given")
    assert [headers["Authorization"] for headers in fake.headers] == ["Bearer other", "Bearer own", "Bearer given"]


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(KimiLiteError, match="Nothing answers at"):
        RemoteSession.open(f"http://127.0.0.1:{port}")


def test_silence_is_not_awaited_for_ever(fake: FakeOpenAI) -> None:
    fake.answers.append(Answer([b""], wait_s=1.0))
    server = Server(fake.url, None, read_s=0.1)
    with pytest.raises(KimiLiteError, match="silent"):
        list(server.post("/chat/completions", {}, lambda: False))


@pytest.mark.parametrize("is_before_headers", [True, False])
def test_cancelling_closes_the_connection_and_keeps_what_came(fake: FakeOpenAI, is_before_headers: bool) -> None:
    pieces = [sse({"content": f"{i} "}, reason=None, is_done=False) for i in range(400)]
    session = opened(fake, Answer(pieces, pause_s=0.1, wait_s=40.0 if is_before_headers else 0.0))
    threading.Timer(0.3, session.cancel).start()
    began_s = time.perf_counter()
    tokens = list(session.ask("?"))
    assert time.perf_counter() - began_s < 30  # of the 40 that it would take
    assert tokens[-1].finish_reason == "cancelled"
    assert fake.is_dropped.wait(120)
    said = texts(tokens)["content"]
    assert said == "" if is_before_headers else said.startswith("0 1 ")
    assert session.messages[-1]["role"] == ("user" if is_before_headers else "assistant")


def test_the_model_is_chosen_if_there_is_a_choice() -> None:
    with FakeOpenAI(models=[{"id": "a"}, {"id": "moonshotai/Kimi-K2.5"}]) as fake:
        assert RemoteSession.open(fake.url).info.name == "moonshotai/Kimi-K2.5"
    with FakeOpenAI(models=[{"id": "a"}, {"id": "b"}]) as fake:
        with pytest.raises(KimiLiteError, match="2 models: a, b"):
            RemoteSession.open(fake.url)
        assert RemoteSession.open(fake.url, model="b").info.name == "b"
    with FakeOpenAI(models=Answer([b"no"], 404)) as fake:
        assert RemoteSession.open(fake.url, model="b").context_length is None
        with pytest.raises(KimiLiteError, match="404"):
            RemoteSession.open(fake.url)


def test_the_vendor_has_its_own_switch() -> None:
    session = RemoteSession(
        Server("https://api.moonshot.ai/v1", "k"), "kimi-k2.5", None, "", AnswerSettings(is_thinking=False)
    )
    body = session.dialect.body([], session.settings)
    assert body["thinking"] == {"type": "disabled"}
    assert "chat_template_kwargs" not in body


def test_a_budget_for_thinking_is_refused() -> None:
    session = RemoteSession(Server("http://x", None), "m", None, "", None)
    with pytest.raises(KimiLiteError, match="budget"):
        session.require_budget()


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("https://h/api/v3/chat/completions", "https://h/api/v3"),
    ],
)
def test_addresses(endpoint: str, url: str) -> None:
    assert address_of(endpoint) == (url, "", "")


@pytest.mark.parametrize("endpoint", ["", "ftp://x", "http://", "http://x:99999"])
def test_addresses_that_are_none(endpoint: str) -> None:
    with pytest.raises(KimiLiteError, match="no address"):
        address_of(endpoint)


def test_a_user_in_the_address_is_sent_and_never_shown(fake: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    address = fake.url.replace("http://", "http://ann:pass%20word@")
    assert address_of(address) == (fake.url, "ann", "pass word")
    monkeypatch.setenv("OPENAI_API_KEY", "of another server")
    fake.answers.append(Answer([b'{"error": "ann, pass word and YW5uOnBhc3Mgd29yZA== are wrong"}'], 401))
    session = RemoteSession.open(address, model="m")
    with pytest.raises(KimiLiteError) as caught:
        list(session.ask("?"))
    assert fake.headers[-1]["Authorization"] == "Basic YW5uOnBhc3Mgd29yZA=="
    for text in (str(caught.value), json.dumps(to_document(session)), session.model_key(), str(session.info)):
        assert "pass word" not in text
        assert "YW5u" not in text
    with pytest.raises(KimiLiteError, match="a request carries one"):
        RemoteSession.open(address, "key")
    with pytest.raises(KimiLiteError) as refused:
        address_of("ftp://ann:secret@h")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("event", [b"data: no json, key sk-1234\n\n", b'data: {"error": "key sk-1234 expired"}\n\n'])
def test_a_key_in_an_event_is_not_shown(fake: FakeOpenAI, event: bytes) -> None:
    session = opened(fake, event, api_key="sk-1234")
    with pytest.raises(KimiLiteError) as caught:
        list(session.ask("?"))
    assert "sk-1234" not in str(caught.value)
    assert "(key)" in str(caught.value)


def test_what_a_library_says_is_told_without_numbers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(KimiLiteError) as caught:
        RemoteSession.open(f"http://127.0.0.1:{port}")
    assert caught.value.message == f"Nothing answers at http://127.0.0.1:{port}/v1: connection refused."


BOMB = gzip.compress(b" " * (40 << 20))


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_an_answer_has_a_largest_size(fake: FakeOpenAI, encoding: str) -> None:
    """40 MiB of blanks, compressed to 40 KB or not: as a list of models, a refusal and an answer."""
    data = BOMB if encoding == "gzip" else b" " * (40 << 20)
    header = {"Content-Encoding": encoding}
    whole = Answer([data], 200, "application/json", header)
    with FakeOpenAI(models=whole) as other, pytest.raises(KimiLiteError, match="more than the 32 MiB"):
        RemoteSession.open(other.url)
    session = opened(fake, whole, model="m")
    with pytest.raises(KimiLiteError, match="more than the 32 MiB"):
        list(session.ask("?"))
    fake.answers.append(Answer([data], 500, "application/json", header))
    with pytest.raises(KimiLiteError, match="answered 500"):
        list(session.ask("?"))
    fake.answers.append(Answer([b"data: ", data], 200, headers=header if encoding == "identity" else {}))
    if encoding == "identity":
        with pytest.raises(KimiLiteError, match="an event of more than 16 MiB"):
            list(session.ask("?"))


def test_compressed_streams_are_read_and_other_encodings_refused(fake: FakeOpenAI) -> None:
    session = opened(fake, Answer([gzip.compress(sse({"content": "packed"}))], headers={"Content-Encoding": "gzip"}))
    assert texts(list(session.ask("?")))["content"] == "packed"
    for encoding, data in (("br", b"x"), ("gzip", b"no gzip")):
        fake.answers.append(Answer([data], headers={"Content-Encoding": encoding}))
        with pytest.raises(KimiLiteError, match="compresse"):
            list(session.ask("?"))


def test_a_fast_server_waits_for_its_reader(fake: FakeOpenAI) -> None:
    """What nobody has read yet stays with the server: some MB in queues and sockets, not the whole stream."""
    event = sse({"content": "word " * 2000}, reason=None, is_done=False)
    session = opened(fake, Answer([event] * 6000))  # 60 MB
    tokens = session.ask("?")
    next(token for token in tokens if token.text)
    time.sleep(1.0)
    assert not fake.is_written.is_set()
    tokens.close()
    assert fake.is_dropped.wait(120)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=10))
def test_bytes_cut_anywhere_are_the_same_events(data: bytes, points: list[int]) -> None:
    data = b"\xef\xbb\xbfdata: a\r\n" + data.replace(b"z", b"\ndata:\r").replace(b"y", b"\n\n")
    whole, parts = EventReader(), EventReader()
    expected = whole.feed(data) + whole.finish()
    ends = [0, *sorted(point for point in points if point < len(data)), len(data)]
    found = [event for a, b in pairwise(ends) for event in parts.feed(data[a:b])] + parts.finish()
    assert found == expected


VALUES = [None, -1, "x", [], {}, [None], [1], [[]], {"a": 1}, True, 1e999, "\ud800", 10**400, 3.5, ["x"], [{"text": 5}]]
VALUES += [{"index": 10**30}, [{"index": -1}], [{"function": 5}], [{"delta": 5}], [{"name": 1}], float("nan")]
EVENTS = [
    {
        "choices": [
            {
                "index": 0,
                "delta": {
                    "role": "assistant",
                    "reasoning_content": "r",
                    "content": "c",
                    "tool_calls": [{"index": 0, "id": "i", "function": {"name": "f", "arguments": "{}"}}],
                },
                "finish_reason": None,
                "usage": {"prompt_tokens": 1},
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
    },
    {"choices": [{"delta": {}, "finish_reason": "stop"}]},
]


def paths(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Where something stands in a document."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from paths(item, (*path, key))


@settings(deadline=None, max_examples=600)
@given(st.data())
def test_malformed_events_are_read_or_refused_in_a_sentence(data: st.DataObject) -> None:
    events = copy.deepcopy(EVENTS)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(paths(events))))
        place = events
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
    reader, tokens, said = DeltaReader("a", tools=[TOOL]), [], ""
    try:
        for event in events:
            tokens += reader.feed(event) if isinstance(event, dict) else []
    except KimiLiteError as error:
        said = error.message
    assert said.isprintable()
    tokens += reader.finish()
    json.dumps([token.text for token in tokens]).encode()
    assert tokens[-1].finish_reason


def answered(tokens: list[Token]) -> AnswerRecord:
    record = AnswerRecord()
    for token in tokens:
        record.add(token)
    return record


THOUGHT = [{"content": "Let me think"}, {"content": " about it.</thi"}, {"content": "nk>\n\nIt is 4."}]


@pytest.mark.parametrize("is_watched", [True, False])
def test_an_end_of_thinking_that_nothing_began(fake: FakeOpenAI, is_watched: bool) -> None:
    session = opened(
        fake, sse(*THOUGHT), sse(*THOUGHT), sse({"content": "No thought this time."}), sse({"content": "x"})
    )
    session.is_watched = is_watched
    first = list(session.ask("2+2?"))
    record = answered(first)
    assert (record.texts["reasoning"], record.texts["content"]) == ("Let me think about it.", "\n\nIt is 4.")
    said = [token.text for token in first if token.kind == "content" and token.text]
    assert ("Let me think" in said) is is_watched
    second = list(session.ask("again?"))  # learned: it comes as reasoning from the beginning
    assert (second[0].kind, second[0].text, second[0].unsaid) == ("reasoning", "Let me think", "")
    third = answered(list(session.ask("and now?")))
    assert (third.texts["reasoning"], third.texts["content"]) == ("", "No thought this time.")
    list(session.ask("and then?"))
    sent = [message for message in fake.bodies[-1]["messages"] if message["role"] == "assistant"]
    assert [message["content"] for message in sent] == ["\n\nIt is 4.", "\n\nIt is 4.", "No thought this time."]
    assert "think" not in json.dumps([message["content"] for message in sent])


def test_think_tags_are_words_where_reasoning_has_its_field_or_is_off(fake: FakeOpenAI) -> None:
    text = "Write </think> to end it."
    session = opened(fake, sse({"reasoning_content": "hm"}, {"content": text}), sse({"content": text}))
    assert answered(list(session.ask("?"))).texts["content"] == text
    session.set_thinking(False)
    assert answered(list(session.ask("?"))).texts["content"] == text


@pytest.mark.parametrize("field", ["content", "reasoning_content"])
def test_kimis_markers_in_the_text_are_calls(fake: FakeOpenAI, field: str) -> None:
    call = '<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{"a": 1}'
    call += "<|tool_call_end|><|tool_calls_section_end|>"
    pieces = [{field: text} for text in ("I add.", call[:40], call[40:90], call[90:])]
    session = opened(fake, sse(*pieces), sse({"content": "3"}))
    record = answered(list(session.ask("?", tools=[TOOL])))
    assert (record.calls, record.last.finish_reason) == ([ToolCall("functions.add:0", "add", '{"a": 1}')], "tool_calls")
    assert "<|" not in record.texts["content"] + record.texts["reasoning"]
    echoed = read([sse({"content": call}, call_delta(0, '{"a": 1}', "add", "functions.add:0"))], tools=[TOOL])
    assert answered(echoed).calls == [ToolCall("functions.add:0", "add", '{"a": 1}')]
    assert answered(read([sse({"content": call})])).texts["content"] == call  # no tools: it is text


def test_only_the_first_choice_and_no_repeated_message_are_read() -> None:
    events = [
        {"choices": [{"index": 1, "delta": {"content": "other"}}, {"index": 0, "delta": {"content": "one"}}]},
        {"choices": [{"index": 0, "delta": {}, "message": {"content": "one"}, "finish_reason": "stop"}]},
    ]
    data = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    assert texts(read([data.encode()]))["content"] == "one"
    both = {"function_call": {"name": "f", "arguments": "{}"}, "tool_calls": [{"function": {"name": "f"}}]}
    assert len(answered(read([sse(both)], tools=[TOOL])).calls) == 1


BROKEN = {  # how answers end before their end, after "It is" came
    "the line drops": Answer([sse({"content": "It is"}, reason=None, is_done=False)], is_cut=True),
    "no end": Answer([sse({"content": "It is"}, reason=None, is_done=False)]),
    "an error": Answer([sse({"content": "It is"}, reason=None, is_done=False) + b'data: {"error": "full"}\n\n']),
    "no JSON": Answer([sse({"content": "It is"}, reason=None, is_done=False) + b"data: {oops\n\n"]),
    "an error as the reason": Answer([sse({"content": "It is"}, reason="error")]),
    "a filter": Answer([sse({"content": "It is"}, reason="content_filter")]),
    "a busy vendor": Answer([sse({"content": "It is"}, reason="insufficient_system_resource")]),
}


@pytest.mark.parametrize("is_watched", [True, False])
@pytest.mark.parametrize("ending", BROKEN)
def test_what_came_before_an_answer_broke_off_is_given_out(fake: FakeOpenAI, ending: str, is_watched: bool) -> None:
    session = opened(fake, BROKEN[ending])
    session.is_watched = is_watched  # if not, what may be reasoning after all is held back
    tokens: list[Token] = []
    with pytest.raises(KimiLiteError):
        tokens.extend(session.ask("?"))
    assert texts(tokens)["content"] == "It is"


def test_nothing_is_said_to_be_kept_where_nothing_came(fake: FakeOpenAI) -> None:
    session = opened(fake, b'data: {"error": "full"}\n\n')
    with pytest.raises(KimiLiteError, match="full") as caught:
        list(session.ask("?"))
    assert "kept" not in caught.value.hint


@pytest.mark.parametrize("after", [b"", b"data: {oops\n\n", sse({"content": " LATE"})])
def test_done_ends_an_answer_though_the_connection_stays_open(fake: FakeOpenAI, after: bytes) -> None:
    session = opened(fake, Answer([sse({"content": "all"}) + after, b": ping\n\n"], pause_s=1.5))
    assert texts(list(session.ask("?")))["content"] == "all"
    assert not fake.is_written.is_set(), "it waited for the connection's end"


@given(st.lists(st.text(max_size=5), min_size=1, max_size=6))
@settings(max_examples=25)
def test_events_without_empty_lines_between_are_read(contents: list[str]) -> None:
    stream = sse(*({"content": text} for text in contents)).replace(b"\n\n", b"\n")
    with FakeOpenAI(stream, sse(*({"content": text} for text in contents))) as fake:
        session = opened(fake)
        assert texts(list(session.ask("?"))) == texts(list(session.ask("?")))
        session.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"message": {"content": "of Ollama"}, "done": true}\n',
        b'data: {"type": "message_start", "message": {"id": "m", "content": []}}\n\n',
        b'data: {"type": "response.output_text.delta", "delta": "Hi"}\n\n',
    ],
)
def test_answers_of_another_api_are_said_to_be_such(fake: FakeOpenAI, body: bytes) -> None:
    with pytest.raises(KimiLiteError, match="nothing that OpenAI's API calls an answer"):
        list(opened(fake, body).ask("?"))


def test_a_list_of_faults_is_read_out(fake: FakeOpenAI) -> None:
    detail = [{"loc": ["body", "top_k"], "msg": "not permitted", "type": "extra"}, {"msg": "too long"}]
    refusal = Answer([json.dumps({"detail": detail}).encode()], 422, "application/json")
    with pytest.raises(KimiLiteError, match=r"refused.: top_k: not permitted; too long"):
        list(opened(fake, refusal).ask("?"))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, 0.0),
        ({"retry-after": "99999999999999"}, 1e6),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
    ],
)
def test_when_to_ask_again(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers, lambda: 60.0) == seconds


@given(st.text(max_size=40))
def test_whatever_a_server_says_of_when_to_ask_again_is_a_time_or_nothing(text: str) -> None:
    seconds = retry_after_s({"retry-after": text}, lambda: 0.0)
    assert seconds is None or 0 <= seconds <= 1e6
