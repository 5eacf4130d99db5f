"""Clients that hang up, doze, or send what is no HTTP: on bare sockets."""

import asyncio
import json
import socket
import threading
import time
from contextlib import suppress
from itertools import pairwise

import httpx
import pytest

from kimi_lite.apps.server import bodies, connection, sse
from tests.apps.server.running import running, speaking
from tests.engine.fakes import fake_engine

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
LONG = {"messages": [{"role": "user", "content": "long " * 3000}], "max_tokens": 4, "temperature": 0}
ENDPOINTS = {
    "/v1/chat/completions": LONG,
    "/v1/messages": LONG,
    "/v1/responses": {"input": "long " * 3000, "max_output_tokens": 4},
    "/v1/completions": {"prompt": "long " * 3000, "max_tokens": 4},
}

SHORT = {
    "/v1/chat/completions": HELLO,
    "/v1/messages": HELLO | {"max_tokens": 4},
    "/v1/responses": {"input": "Hello"},
    "/v1/completions": {"prompt": "Hello"},
}


def slow_engine(seconds_per_step: float):
    """Reads 64 tokens of a prompt in a step that takes so long."""
    engine = fake_engine(context_length=16384, num_pages=1024, max_step_tokens=64)
    engine.model.before_layer = lambda batch, layer: time.sleep(seconds_per_step / 3)
    return engine


def request(path: str, body: dict) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=120)


def read_to_end(connected: socket.socket) -> bytes:
    data = b""
    while piece := connected.recv(65536):
        data += piece
    return data


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_hanging_up_while_the_prompt_is_read_ends_the_reading(path: str, stream: bool) -> None:
    engines = []

    def open_engine():
        engines.append(slow_engine(0.05))
        return engines[0]

    with running(open_engine) as url:
        connected = connect(url)
        connected.sendall(request(path, ENDPOINTS[path] | {"stream": stream}))
        while not engines[0].model.batches:
            time.sleep(0.01)
        connected.close()
        while not engines[0].is_idle:
            time.sleep(0.01)
        assert len(engines[0].model.batches) < 150, "of 235; some ten where the machine has nothing else to do"
        assert httpx.get(f"{url}/health").json()["running"] == 0


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_stream_shows_signs_of_life_while_the_prompt_is_read(monkeypatch, path: str) -> None:
    monkeypatch.setattr(sse, "KEEPALIVE_S", 0.2)
    with running(lambda: slow_engine(0.005)) as url, httpx.Client(timeout=120) as client:
        started_s, came_s, lines = time.monotonic(), [], []
        with client.stream("POST", f"{url}{path}", json=ENDPOINTS[path] | {"stream": True}) as response:
            for line in response.iter_lines():
                came_s.append(time.monotonic() - started_s)
                lines.append(line)
        assert came_s[0] < max(0.5, came_s[-1] / 2), "the first byte comes at once"  # a busy machine is slow in all
        assert max(b - a for a, b in pairwise(came_s)) < max(0.8, came_s[-1] / 2)
        if path == "/v1/messages":
            assert lines.count("event: ping") >= 3
        else:
            assert lines.count(": keepalive") >= 3
            assert all(after == "" for line, after in pairwise(lines) if line == ": keepalive")
        for line in lines:
            assert line == "" or line.startswith(("data: {", "data: [DONE]", "event: ", ": keepalive"))


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_document_begins_with_blanks_when_it_takes_long(monkeypatch, path: str) -> None:
    monkeypatch.setattr(sse, "DOCUMENT_KEEPALIVE_S", 0.2)
    with running(lambda: slow_engine(0.005)) as url:
        response = httpx.post(f"{url}{path}", json=ENDPOINTS[path], timeout=120)
        assert response.status_code == 200 and response.headers["content-type"] == "application/json"
        assert response.text.startswith("   ") and response.json()["usage"]


def test_progress_is_told_to_those_who_ask() -> None:
    with running(lambda: slow_engine(0.003)) as url:

        def progress(more: dict) -> list[dict]:
            text = httpx.post(f"{url}/v1/chat/completions", json=LONG | {"stream": True} | more, timeout=120).text
            chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
            return [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]

        told = progress({"return_progress": True})
        assert told[0]["cache"] == 0 and 0.99 < told[-1]["processed"] / told[-1]["total"] <= 1
        assert [each["processed"] for each in told] == sorted(each["processed"] for each in told)
        again = progress({"return_progress": True})
        assert again[0]["cache"] == again[0]["processed"] > 10_000
        assert progress({}) == []


def test_slow_clients_are_left(monkeypatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_WITHIN_S", 0.5)
    monkeypatch.setattr(bodies, "PIECE_WITHIN_S", 0.5)
    monkeypatch.setattr(bodies, "BODY_WITHIN_S", 1.0)
    whole = request("/v1/chat/completions", HELLO)
    with running(lambda: speaking(lambda prompt: ("", "Hi"))) as url:
        for start, words in ((b"", b""), (b"POST /v1/chat", b""), (whole[:-5], b" 408 ")):
            connected, started_s = connect(url), time.monotonic()
            connected.sendall(start)
            connected.settimeout(120)
            if words:  # the answer comes, and the connection may go on
                assert words in connected.recv(65536)
            else:
                with suppress(ConnectionResetError):
                    assert connected.recv(1) == b"", "it is hung up on"
            assert time.monotonic() - started_s < connection.HEADERS_WITHIN_S + 20  # half a second, and a busy machine
            connected.close()
        connected = connect(url)
        start = whole.index(b"{")
        connected.sendall(whole[:start])
        with suppress(OSError):
            for byte in whole[start:-1]:  # a byte now and then does not keep a body open
                connected.sendall(bytes([byte]))
                time.sleep(0.05)
        connected.settimeout(120)
        data = connected.recv(65536)
        assert b"408" in data
        assert httpx.post(f"{url}/v1/chat/completions", json=HELLO).status_code == 200


def test_a_client_that_does_not_read_is_left(monkeypatch) -> None:
    monkeypatch.setattr(connection, "READS_WITHIN_S", 0.5)
    engines = []

    def open_engine():
        text = " ".join(map(str, range(2000)))  # nothing that the loop guard would end
        engines.append(speaking(lambda prompt: ("", text), context_length=16384, num_pages=1024))
        return engines[0]

    with running(open_engine) as url:
        connected = socket.socket()
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = url.removeprefix("http://").split(":")
        connected.connect((host, int(port)))
        many = {"stream": True, "logprobs": True, "top_logprobs": 20}
        connected.sendall(request("/v1/chat/completions", HELLO | many))
        until_s = time.monotonic() + 200
        while not engines[0].model.batches or not engines[0].is_idle:
            assert time.monotonic() < until_s, "it still generates"
            time.sleep(0.05)
        assert len(engines[0].model.batches) < 8000, "not to the end"
        connected.close()


GARBAGE = (
    b"\x00" * 100,
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b'POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"me',
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999\r\n\r\n{",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX\xff: \xff\r\n\r\n",
    b"GET /" + b"%00%ff%2e%2e/" * 50 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
)


@pytest.fixture(scope="module")
def url():
    with running(lambda: speaking(lambda prompt: ("", "Hi"))) as address:
        yield address


@pytest.mark.parametrize("half_closes", [False, True])
def test_garbage_is_answered_or_hung_up_on(url, half_closes: bool) -> None:
    for data in GARBAGE:
        connected = connect(url)
        connected.sendall(data)
        if half_closes:
            connected.shutdown(socket.SHUT_WR)
            connected.settimeout(5)
            answer = b""
            with suppress(ConnectionResetError):
                answer = read_to_end(connected)
        else:
            connected.settimeout(0.5)
            try:
                answer = connected.recv(65536)
            except (TimeoutError, ConnectionResetError):
                answer = b""
        assert not answer.startswith(b"HTTP/1.1 5"), (data[:80], answer[:200])
        connected.close()
    assert httpx.get(f"{url}/health").json()["status"] == "ok"


_LARGE = (
    b"[" + b"[]," * (20 << 20) + b"1]",
    b'{"messages": [' + b"{}," * 900_000 + b"{}]}",
    b'{"a": "' + b"[" * (60 << 20) + b'"}',
    b"{" * (1 << 20),
    b'{"tokens": [' + b"1," * (5 << 20) + b"1]}",
    b'"' + b"\\" * (30 << 20) + b'"',
    b" " * (63 << 20),
    b"9" * (30 << 20),
    b'{"a":' * 65 + b"1" + b"}" * 65,
    b"\xff\xfe" * 100_000,
)


@pytest.mark.parametrize("body", _LARGE, ids=range(len(_LARGE)))
def test_large_bodies_hold_up_no_other_client(url, body: bytes) -> None:
    answers = []
    asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/detokenize", content=body, timeout=120)))
    asking.start()
    longest_s = 0.0
    while asking.is_alive():
        started_s = time.monotonic()
        assert httpx.get(f"{url}/health", timeout=120).status_code == 200
        longest_s = max(longest_s, time.monotonic() - started_s)
        time.sleep(0.02)
    assert answers[0].status_code == (200 if b"tokens" in body[:10] else 400), answers[0].text[:200]
    assert longest_s < 3


def test_requests_in_a_pipeline_are_answered_in_order(url) -> None:
    connected = connect(url)
    last = request("/tokenize", {"content": "b"}).replace(b"Host", b"Connection: close\r\nHost")
    connected.sendall(request("/tokenize", {"content": "aa"}) + request("/v1/chat/completions", HELLO) + last)
    data = read_to_end(connected)
    assert data.count(b"HTTP/1.1 200") == 3
    assert data.index(b'"count":2') < data.index(b"chat.completion") < data.index(b'"count":1')


def test_an_error_in_the_middle_of_a_stream_is_told() -> None:
    def broken():
        engine = speaking(lambda prompt: ("", "Hello there"))
        speak, count = engine.model.next_logits, iter(range(10**6))
        engine.model.next_logits = lambda context: speak(context) * (float("nan") if next(count) > 5 else 1.0)
        return engine

    with running(broken) as url:
        text = httpx.post(f"{url}/v1/chat/completions", json=HELLO | {"stream": True}).text
        assert '"error":{"message":"The model' in text and "[DONE]" not in text
        text = httpx.post(f"{url}/v1/messages", json=HELLO | {"stream": True, "max_tokens": 9}).text
        assert "event: error" in text and "message_stop" not in text
        text = httpx.post(f"{url}/v1/responses", json={"input": "x", "stream": True}).text
        assert "event: response.failed" in text and "response.completed" not in text


@pytest.mark.parametrize("path", ENDPOINTS)
def test_an_engine_that_fails_is_a_500_without_its_reason(path: str) -> None:
    def failing():
        engine = speaking(lambda prompt: ("", "Hi"))

        def fail(batch, layer):
            raise FileNotFoundError(2, "No such file", "/home/somebody/model.gguf")

        engine.model.before_layer = fail
        return engine

    with running(failing) as url:
        for _ in range(2):
            response = httpx.post(f"{url}{path}", json=SHORT[path])
            assert response.status_code == 500 and "/home" not in response.text
            assert "log" in response.text
        assert httpx.get(f"{url}/health").status_code == 503


def test_while_it_loads_every_endpoint_says_so() -> None:
    may_load = threading.Event()

    def loading():
        may_load.wait(120)
        return speaking(lambda prompt: ("", "Hi"))

    with running(loading, waits=False) as url:
        try:
            for path, body in SHORT.items():
                response = httpx.post(f"{url}{path}", json=body)
                assert response.status_code == 503 and response.headers["retry-after"] == "5"
                assert "loading" in response.text
            assert httpx.get(f"{url}/health").status_code == 503
        finally:
            may_load.set()


def test_a_full_queue_is_a_429_with_a_time() -> None:
    with running(lambda: slow_engine(0.02), max_waiting=0) as url:

        async def ask_many() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=120) as client:
                asked = [client.post(f"{url}/v1/messages", json=LONG) for _ in range(3)]
                return await asyncio.gather(*asked)

        refused = [r for r in asyncio.run(ask_many()) if r.status_code == 429]
        assert refused and all(int(r.headers["retry-after"]) >= 1 for r in refused)
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
