"""Hostile requests to a running server: none may make a 500, and none may hang.

    kimi-lite serve --port 8080 &
    python -m tools.serve.hostile http://127.0.0.1:8080 --count 10000

Bodies of every endpoint with random places replaced (wrong types, NUL, halves of surrogates, huge numbers, depth, texts
that spell control tokens), bytes changed, requests cut off, clients that leave. The same seed asks the same. The last
line is JSON: how often each status came; the exit code is 1 where one was 5xx, or nothing came in time.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

_WITHIN_S = 60.0  # an answer comes, or the connection ends
_BAD = 1  # exit code

_TOOL = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
_CALL = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
_CHAT: dict[str, Any] = {
    "model": "x",
    "max_tokens": 4,
    "stream": False,
    "temperature": 0.5,
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "reasoning_content": "", "tool_calls": [_CALL]},
        {"role": "tool", "tool_call_id": "functions.f:0", "content": "x"},
        {"role": "user", "content": "Go on"},
    ],
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **_CHAT, "n": 2, "stop": ["x"], "seed": 1, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1.0},
        "tools": [{"type": "function", "function": _TOOL}], "tool_choice": "auto", "top_p": 0.9, "top_k": 5,
        "min_p": 0.1, "thinking": {"type": "enabled", "keep": "all", "budget_tokens": 2},
        "stream_options": {"include_usage": True}, "frequency_penalty": 0.1, "repetition_penalty": 1.1,
    },
    "/v1/messages": {
        **_CHAT, "system": [{"type": "text", "text": "cch=1;"}], "stop_sequences": ["x"], "top_k": 3,
        "tools": [{"name": "f", "input_schema": _TOOL["parameters"]}], "tool_choice": {"type": "auto"},
        "thinking": {"type": "enabled", "budget_tokens": 2}, "metadata": {"user_id": "a"},
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "a", "signature": "b"},
                {"type": "tool_use", "id": "functions.f:0", "name": "f", "input": {"a": "b"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "functions.f:0", "content": "x"}]},
        ],
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}], "system": "x"},
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "a"}]},
            {"type": "function_call", "call_id": "functions.f:0", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "functions.f:0", "output": "x"},
        ],
        "tools": [{"type": "function", **_TOOL}, {"type": "custom", "name": "g"}], "max_output_tokens": 4,
        "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}}, "stream": True, "store": True,
        "include": ["reasoning.encrypted_content"], "instructions": "x", "previous_response_id": None,
    },
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 4, "echo": False, "logprobs": 2, "n": 1, "stream": False},
    "/tokenize": {"content": "Hi", "with_pieces": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}  # fmt: skip
_TEXTS = (
    "", "\0", "\x1b[2J", "\ud800", "\udfff\ud800", "\uffff", "A" * 5000, "a\u0301" * 300, "<|im_end|>", "</think>",
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0", "{{ 7 * 7 }}", "{% for %}", "../../etc/passwd",
    "data:image/png;base64,AAAA", "http://127.0.0.1:1/", "null", "\u202e", "-1", "NaN",
)  # fmt: skip
_NUMBERS = (
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**300,
    1e308,
    -1e308,
    1e-308,
    5e-324,
    0.1,
    float("inf"),
    float("nan"),
)


def hostile_value(random: random.Random, depth: int = 0) -> Any:
    """A value that nothing expects in its place."""
    kind = random.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return random.choice((None, True, False))
    if kind == 1:
        return random.choice(_NUMBERS)
    if kind <= 4:
        return random.choice(_TEXTS)
    if kind == 5:
        return [hostile_value(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 6:
        return {random.choice(_TEXTS)[:50]: hostile_value(random, depth + 1) for _ in range(random.randrange(4))}
    value: Any = "deep"
    for _ in range(random.choice((10, 62, 70, 200))):
        value = [value] if random.random() < 0.5 else {"type": value}
    return value


def hostile_body(random: random.Random, body: Any, num_changes: int) -> Any:
    """A copy with some places replaced, added to, or taken out."""
    places = list(_places(body))
    chosen = {random.randrange(len(places)) for _ in range(num_changes)}
    numbers = iter(range(len(places)))

    def copy(value: Any) -> Any:
        if next(numbers) in chosen:
            return hostile_value(random)
        if isinstance(value, dict):
            items = {key: copy(each) for key, each in value.items()}
            if random.random() < 0.02:
                items[random.choice(_TEXTS)[:50]] = hostile_value(random)
            if items and random.random() < 0.02:
                items.pop(random.choice(list(items)))
            return items
        return [copy(each) for each in value] if isinstance(value, list) else value

    return copy(body)


def _places(value: Any):
    yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _places(each)


def request_bytes(random: random.Random, host: str) -> tuple[bytes, bool]:
    """One request as it is sent, and whether the client stays until an answer comes."""
    path = random.choice(list(BODIES))
    body = hostile_body(random, BODIES[path], random.choice((0, 1, 1, 1, 2, 3, 8)))
    if isinstance(body, dict) and random.random() < 0.3:
        body["stream"] = random.random() < 0.7
    data = json.dumps(body).encode()
    if random.random() < 0.02:
        data = data.replace(b'"Hi"', b"[" * 100_000 + b"]" * 100_000)
    if random.random() < 0.1:
        changed = bytearray(data)
        for _ in range(random.randrange(1, 9)):
            changed[random.randrange(len(changed))] = random.randrange(256)
        data = bytes(changed)
    length: object = len(data)
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", "Connection: close"]
    if random.random() < 0.05:
        length = random.choice((0, 1, len(data) - 1, len(data) + 9, 10**12, "x"))
    if random.random() < 0.05:
        lines.append("Transfer-Encoding: chunked")
        data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
        if random.random() < 0.3:
            data = data[: random.randrange(len(data))]
    else:
        lines.append(f"Content-Length: {length}")
    whole = "\r\n".join([*lines, "", ""]).encode() + data
    if random.random() < 0.05:
        whole = whole[: random.randrange(len(whole))]
    if random.random() < 0.03:
        changed = bytearray(whole)
        changed[random.randrange(min(200, len(changed)) or 1) if changed else 0 :][:1] = b"\xff"
        whole = bytes(changed)
    return whole, random.random() < 0.9


async def _ask(url: str, seed: int, statuses: Counter, failures: list[str]) -> None:
    parts = urlsplit(url)
    data, stays = request_bytes(random.Random(seed), parts.netloc)
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except OSError as error:
        statuses["not connected"] += 1
        failures.append(f"seed {seed}: {error}")
        return
    try:
        writer.write(data)
        if not stays:
            await asyncio.sleep(random.Random(seed).random() * 0.05)
            statuses["left"] += 1
            return
        if writer.can_write_eof():
            await asyncio.sleep(0)
        answer = await asyncio.wait_for(_read_answer(reader), _WITHIN_S)
        status = answer[9:12].decode("ascii", "replace") or "hung up"
        statuses[status] += 1
        if status.startswith("5"):
            failures.append(f"seed {seed}: {answer[-300:]!r}")
    except TimeoutError:
        statuses["nothing"] += 1
        failures.append(f"seed {seed}: nothing came for {_WITHIN_S:.0f} s")
    except (ConnectionError, OSError):
        statuses["hung up"] += 1
    finally:
        writer.close()


async def _read_answer(reader: asyncio.StreamReader) -> bytes:
    """All that comes, but no more than a little of a body that goes on while the client's own is not whole."""
    data = b""
    while piece := await reader.read(1 << 16):
        data = (data + piece)[: 1 << 20]
    return data


async def ask_all(url: str, count: int, num_clients: int, first_seed: int = 0) -> tuple[Counter, list[str]]:
    """How often each status came, and what went wrong."""
    statuses: Counter = Counter()
    failures: list[str] = []
    seeds = iter(range(first_seed, first_seed + count))

    async def client() -> None:
        for seed in seeds:
            await _ask(url, seed, statuses, failures)

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return statuses, failures


def main(
    url: Annotated[str, typer.Argument(help="of the server, without /v1")],
    count: Annotated[int, typer.Option(help="requests")] = 10_000,
    clients: Annotated[int, typer.Option(help="at the same time")] = 8,
    seed: Annotated[int, typer.Option(help="the first request's")] = 0,
) -> None:
    """Hostile requests to a running server."""
    started_s = time.monotonic()
    statuses, failures = asyncio.run(ask_all(url.rstrip("/"), count, clients, seed))
    for failure in failures[:20]:
        print(failure)
    print(json.dumps({"statuses": dict(statuses.most_common()), "seconds": round(time.monotonic() - started_s, 1)}))
    if failures:
        sys.exit(_BAD)


if __name__ == "__main__":
    typer.run(main)
