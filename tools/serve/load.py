"""Many clients at once against a server: are their answers those they would get alone, does anything leak, how long do
they wait?

    python -m kimi_lite.tools.serve.load --clients 32 --seconds 600          # starts a server with the demo
    python -m kimi_lite.tools.serve.load --url http://127.0.0.1:8080 --pid N

Every prompt is asked alone first, greedily. Then clients ask them in random order: streamed or whole, to the end, or
hanging up before or in the middle of the answer. The last line is JSON; exit code 1 says that something was wrong.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import httpx
import numpy as np
import psutil
import typer

Kind = Literal["streamed", "whole", "hung up early", "hung up midway"]
_KINDS: tuple[Kind, ...] = ("streamed", "whole", "hung up early", "hung up midway")
_SHARES = (0.5, 0.25, 0.1, 0.15)
_TEXT = "the model reads a page of text and says what comes next while others wait for their turn in the queue"
_TIMEOUT_S = 600.0
_IDLE_WITHIN_S = 30.0
_TOOL = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}}},
}


@dataclass(frozen=True, slots=True)
class Question:
    """A body without `stream`, and the answer that it gets alone."""

    body: Mapping[str, Any]
    alone: str = ""


@dataclass(frozen=True, slots=True)
class Use:
    """What the server's process holds."""

    rss_bytes: int
    num_threads: int
    num_descriptors: int

    @classmethod
    def of(cls, pid: int) -> "Use":
        process = psutil.Process(pid)
        return cls(process.memory_info().rss, process.num_threads(), process.num_fds())


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    counts: Counter[str] = field(default_factory=Counter)  # requests by kind
    wrong: list[str] = field(default_factory=list)  # what must not be, in words
    first_s: list[float] = field(default_factory=list)  # until the first token of a streamed answer
    gaps_s: list[float] = field(default_factory=list)  # between two of its pieces
    num_tokens: int = 0
    elapsed_s: float = 0.0
    uses: list[Use] = field(default_factory=list)  # before, after half of the time, after all of it

    def summary(self) -> dict[str, Any]:
        """Figures in seconds and bytes."""

        def percentiles(values: list[float]) -> dict[str, float]:
            return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in (50, 99)} if values else {}

        return {
            "requests": dict(self.counts),
            "wrong": self.wrong[:20],
            "time_to_first_token_s": percentiles(self.first_s),
            "between_tokens_s": percentiles(self.gaps_s),
            "tokens_per_s": round(self.num_tokens / self.elapsed_s, 1) if self.elapsed_s else 0.0,
            "uses": [asdict(use) for use in self.uses],
        }


def questions(
    count: int, seed: int, has_tools: bool, max_prompt_words: int = 600, max_tokens: int = 64
) -> list[Question]:
    """Prompts of random lengths, some of which begin alike; a fourth of them with a tool."""
    rng, words = random.Random(seed), _TEXT.split()
    found = []
    shared = " ".join(rng.choices(words, k=max_prompt_words // 3))
    for i in range(count):
        text = " ".join(rng.choices(words, k=rng.randint(1, max_prompt_words)))
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": f"{shared} {i} {text}" if i % 3 == 0 else f"{i} {text}"}],
            "temperature": 0,
            "max_tokens": rng.randint(2, max_tokens),
        }
        if has_tools and i % 4 == 0:
            body["tools"] = [_TOOL]
        found.append(Question(body))
    return found


async def run(
    url: str, pid: int, num_clients: int, seconds: float, seed: int = 0, num_questions: int = 24, **lengths: int
) -> Outcome:
    """Ask alone, then all together for so long; `lengths` go to `questions`."""
    outcome = Outcome()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits, trust_env=False) as client:
        (model,) = (await client.get("/v1/models")).json()["data"]
        asked = questions(num_questions, seed, model["supports_tools"], **lengths)
        asked = [Question(each.body, await _whole(client, each.body)) for each in asked]
        outcome.uses.append(Use.of(pid))
        started_s = time.monotonic()
        halves = asyncio.create_task(_use_after(outcome, pid, seconds / 2))
        until_s = started_s + seconds
        await asyncio.gather(
            *(_client(client, asked, outcome, random.Random(f"{seed} {i}"), until_s) for i in range(num_clients))
        )
        outcome.elapsed_s = time.monotonic() - started_s
        await halves
        await _require_idle(client, outcome)
    await asyncio.sleep(0.5)  # connections are closed
    outcome.uses.append(Use.of(pid))
    _compare_uses(outcome)
    return outcome


async def _use_after(outcome: Outcome, pid: int, seconds: float) -> None:
    await asyncio.sleep(seconds)
    outcome.uses.append(Use.of(pid))


async def _client(
    client: httpx.AsyncClient, asked: Sequence[Question], outcome: Outcome, rng: random.Random, until_s: float
) -> None:
    while time.monotonic() < until_s:
        question, (kind,) = rng.choice(asked), rng.choices(_KINDS, _SHARES)
        try:
            await _ask(client, question, kind, outcome, rng)
        except Exception as error:
            outcome.wrong.append(f"{kind}: {type(error).__name__}: {error}")
        outcome.counts[kind] += 1


async def _ask(client: httpx.AsyncClient, question: Question, kind: Kind, outcome: Outcome, rng: random.Random) -> None:
    if kind == "whole":
        said = await _whole(client, question.body)
        if said != question.alone:
            outcome.wrong.append(f"whole: {said!r} instead of {question.alone!r}")
        return
    num_wanted = {"hung up early": 0, "hung up midway": rng.randint(1, 4)}.get(kind)
    said, asked_s = "", time.monotonic()
    last_s = asked_s
    pieces = _pieces(client, {**question.body, "stream": True}, num_wanted)
    async for piece in pieces:
        now_s = time.monotonic()
        if said or last_s != asked_s:
            outcome.gaps_s.append(now_s - last_s)
        else:
            outcome.first_s.append(now_s - asked_s)
        said, last_s = said + piece, now_s
        outcome.num_tokens += 1
    is_right = said == question.alone if kind == "streamed" else question.alone.startswith(said)
    if not is_right:
        outcome.wrong.append(f"{kind}: {said!r} instead of {question.alone!r}")


async def _whole(client: httpx.AsyncClient, body: Mapping[str, Any]) -> str:
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    message = response.json()["choices"][0]["message"]
    return _text(message)


async def _pieces(client: httpx.AsyncClient, body: Mapping[str, Any], num_wanted: int | None) -> AsyncIterator[str]:
    """The text of each delta that has one; hangs up after so many of them, None: never."""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        num_got, is_done = 0, False
        async for line in response.aiter_lines():
            if num_wanted is not None and num_got >= num_wanted:
                return
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                is_done = True
                break
            event = json.loads(line[6:])
            assert "error" not in event, event
            text = _text(event["choices"][0]["delta"]) if event["choices"] else ""
            if text:
                num_got += 1
                yield text
        assert is_done, "the stream ended without [DONE]"


def _text(message: Mapping[str, Any]) -> str:
    """Reasoning, content and calls of a message or a delta, one after the other."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = "".join(function.get("name", "") + function.get("arguments", "") for function in functions)
    return (message.get("reasoning_content") or "") + (message.get("content") or "") + calls


async def _require_idle(client: httpx.AsyncClient, outcome: Outcome) -> None:
    """When all are gone nothing runs, nothing waits, and no page is held."""
    until_s = time.monotonic() + _IDLE_WITHIN_S
    while True:
        status = (await client.get("/status")).json()
        held = status["counters"]["kv_pages_held"]
        if not (status["running"] or status["waiting"] or held):
            return
        if time.monotonic() > until_s:
            outcome.wrong.append(
                f"after the end {status['running']} run, {status['waiting']} wait, {held} pages are held"
            )
            return
        await asyncio.sleep(0.2)


def _compare_uses(outcome: Outcome) -> None:
    """Descriptors are as many as before; threads (of a pool, too) and memory have stopped growing after half of the
    time."""
    before, half, after = outcome.uses
    if after.num_threads > half.num_threads:
        outcome.wrong.append(f"{after.num_threads} threads instead of {half.num_threads}")
    if after.num_descriptors > before.num_descriptors + 2:
        outcome.wrong.append(f"{after.num_descriptors} descriptors instead of {before.num_descriptors}")
    if after.rss_bytes > 1.05 * half.rss_bytes + (64 << 20):
        outcome.wrong.append(f"{after.rss_bytes:,} bytes of memory instead of {half.rss_bytes:,}")


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """A server of its own: (URL, process id)."""
    command = [sys.executable, "-m", "kimi_lite", "serve", "--port", "0", "--log-level", "warning", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            if " listens on " in line:
                yield line.split()[-1], process.pid
                break
        else:
            raise SystemExit(process.wait())
    finally:
        process.terminate()
        process.wait(60)


def main(
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 32,
    seconds: Annotated[float, typer.Option(help="How long they ask.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of the prompts and the clients' choices.")] = 0,
    prompts: Annotated[int, typer.Option(help="Prompts that they ask.")] = 24,
    url: Annotated[str | None, typer.Option(help="A server that runs; with --pid.")] = None,
    pid: Annotated[int | None, typer.Option(help="Its process.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="For kimi-lite serve, after --.")] = None,
) -> None:
    """Put a server under load and say what came of it."""
    if url is not None:
        outcome = asyncio.run(run(url, pid or os.getpid(), clients, seconds, seed, prompts))
    else:
        with server(arguments or []) as (own_url, own_pid):
            outcome = asyncio.run(run(own_url, own_pid, clients, seconds, seed, prompts))
    print(json.dumps(outcome.summary()))
    raise typer.Exit(1 if outcome.wrong else 0)


if __name__ == "__main__":
    typer.run(main)
