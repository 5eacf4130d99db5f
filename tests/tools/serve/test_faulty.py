"""The server that fails: without chance it is right, and what it does is determined by its seed."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from kimi_lite.tools.serve.faulty import FAULTS, Fault, FaultyServer

ASKED = {"messages": [{"role": "user", "content": "Say it."}]}


async def asked(server: FaultyServer, body: dict[str, Any]) -> str:
    """The status and the body, or how the connection ended."""
    is_silent = any(fault.startswith("silence") for fault in server.faults)
    async with httpx.AsyncClient(timeout=0.3 if is_silent else 60, trust_env=False) as client:
        try:
            response = await client.post(f"{server.url}/chat/completions", json=body)
        except httpx.HTTPError as error:
            return type(error).__name__
        return f"{response.status_code} {response.text}"


def run(*bodies: dict[str, Any], **more: Any) -> list[str]:
    async def work() -> list[str]:
        async with FaultyServer(**more).listening() as server:
            return [await asked(server, body) for body in bodies]

    return asyncio.run(work())


def test_without_faults_it_streams_what_the_script_says() -> None:
    (said,) = run(ASKED, chance=0.0)
    events = [line.removeprefix("data: ") for line in said.removeprefix("200 ").split("\n\n") if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"] for event in events[:-1]]
    assert "".join(one[0]["delta"].get("content") or "" for one in deltas if one) == "You said: Say it."


@pytest.mark.parametrize(
    ("fault", "begins"),
    [
        ("429", "429 "), ("500", "500 "), ("502", "502 "), ("503", "503 "), ("page", "200 <html>"),
        ("reset", "Re"), ("silence", "ReadTimeout"), ("silence midway", "ReadTimeout"),
    ],
)  # fmt: skip
def test_each_fault_is_what_it_is_called(fault: Fault, begins: str) -> None:
    (said,) = run(ASKED, chance=1.0, faults=[fault])
    assert said.startswith(begins)


@pytest.mark.parametrize(("fault", "word"), [("cut", ""), ("error", "out of memory"), ("junk", "oops")])
def test_answers_that_break_off_have_no_end(fault: Fault, word: str) -> None:
    (said,) = run(ASKED, chance=1.0, faults=[fault])
    assert said.startswith("200 ")
    assert word in said
    assert "[DONE]" not in said
    assert '"finish_reason": "stop"' not in said


def test_the_same_seed_does_the_same_to_the_same_question_in_any_order() -> None:
    bodies = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(12)]
    faults = [fault for fault in FAULTS if not fault.startswith(("silence", "reset"))]
    first = run(*bodies, *bodies, seed=7, chance=0.5, faults=faults)
    second = run(*bodies[::-1], *bodies[::-1], seed=7, chance=0.5, faults=faults)
    assert first == second[:12][::-1] + second[12:][::-1]
    assert first != run(*bodies, *bodies, seed=8, chance=0.5, faults=faults)
