"""Agents on OpenAI-compatible servers: what is sent where, what comes back, and servers that fail in every way."""

import asyncio
import json
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from kimi_lite.apps.swarm.backend import ChatProgress, ChatSettings, Message, Reply
from kimi_lite.apps.swarm.endpoints import EndpointChoice, parse_endpoint, parse_endpoints, without_password
from kimi_lite.apps.swarm.events import ORCHESTRATOR, Usage
from kimi_lite.apps.swarm.remote import MAX_FAILURES, RemoteBackend
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.types import SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.tools.serve.faulty import FAULTS, Fault, FaultyServer
from tests.apps.fake_openai import Answer, FakeOpenAI, call_delta, sse
from tests.apps.server.running import running, speaking
from tests.apps.swarm.clock import FakeClock

TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2?"}]
USAGE = {"prompt_tokens": 24, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}
SILENCE_S = 0.5  # real, where a server falls silent


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "KIMI_LITE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as server:
        yield server


@pytest.fixture
def other() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(models=[{"id": "other"}]) as server:
        yield server


def as_agent(name: str = "a1") -> ChatSettings:
    return ChatSettings(AnswerSettings(sampling=SamplingParams(max_tokens=20)), agent_id=name)


def asked(
    *choices: EndpointChoice | str, work: Callable[[RemoteBackend], Coroutine[Any, Any, Any]], **more: Any
) -> Any:
    """What `work` makes with a backend on these endpoints."""

    async def run() -> Any:
        found = [parse_endpoint(choice) if isinstance(choice, str) else choice for choice in choices]
        backend = RemoteBackend(found, **{"clock": FakeClock(), "seed": 0} | more)
        try:
            await backend.open()
            return await work(backend)
        finally:
            await backend.close()
            await backend.close()

    return asyncio.run(run())


async def chat(
    backend: RemoteBackend,
    messages: Sequence[Message] = ASKED,
    tools: Sequence[Message] = (),
    settings: ChatSettings | None = None,
    seen: list[ChatProgress] | None = None,
) -> Reply:
    return await backend.chat(messages, tools, settings or as_agent(), (seen if seen is not None else []).append)


# What --endpoint says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("http://a:8000", EndpointChoice("http://a:8000", model="m")),
        ("a:8000=2", EndpointChoice("a:8000", 2.0, "m")),
        ("http://a/v1?x=y", EndpointChoice("http://a/v1?x=y", model="m")),
        ("http://a=0.5,role=agents,model=other", EndpointChoice("http://a", 0.5, "other", "agents")),
        ("https://a,role=orchestrator,key=KEY", EndpointChoice("https://a", 1.0, "m", "orchestrator", None, "KEY")),
        ("http://a,parallel=4", EndpointChoice("http://a", model="m", most_at_once=4)),
    ],
)  # fmt: skip
def test_an_endpoint_is_read(text: str, choice: EndpointChoice) -> None:
    assert parse_endpoint(text, "m") == choice


@pytest.mark.parametrize(
    "text",
    ["", "ftp://a", "http://a=0", "http://a=-1", "http://a=inf", "http://a,role=boss", "http://a,parallel=0",
     "http://a,parallel=x", "http://a,weight", "http://a,model=", "http://a,role=agents,role=agents", "http://a,,"],
)  # fmt: skip
def test_an_endpoint_that_says_nothing_sensible_is_refused(text: str) -> None:
    with pytest.raises(KimiLiteError) as refused:
        parse_endpoint(text)
    assert refused.value.hint


def test_a_password_in_an_endpoint_is_not_shown() -> None:
    with pytest.raises(KimiLiteError) as refused:
        parse_endpoint("http://ann:secret@host,role=boss")
    assert "secret" not in str(refused.value)
    assert without_password("http://ann:secret@host/v1=2,key=A") == "http://host/v1=2,key=A"
    assert without_password("ann:secret@host:1") == "host:1"
    assert without_password("http://host/a@b") == "http://host/a@b"


@pytest.mark.parametrize("role", ["orchestrator", "agents"])
def test_somebody_must_answer_each(role: str) -> None:
    with pytest.raises(KimiLiteError, match="none serves the"):
        parse_endpoints([f"http://a,role={role}"])
    assert len(parse_endpoints([f"http://a,role={role}", "http://b"])) == 2


# One question --------------------------------------------------------------------------------------------------------


def test_a_reply_is_whole_and_progress_is_told(fake: FakeOpenAI) -> None:
    said = sse(
        {"reasoning_content": "hm"}, {"content": "I call."}, call_delta(0, '{"a": ', "add", "functions.add:0"),
        call_delta(0, "1}"), reason="tool_calls", usage=USAGE,
    )  # fmt: skip
    fake.answers.append(Answer([said[:100], said[100:]]))
    seen: list[ChatProgress] = []
    reply = asked(fake.url, work=lambda backend: chat(backend, tools=[TOOL], seen=seen))
    call = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert reply == Reply(
        {"role": "assistant", "content": "I call.", "reasoning_content": "hm", "tool_calls": [call]},
        "tool_calls",
        Usage(24, 8, 9),
    )
    assert list(dict.fromkeys(progress.state for progress in seen)) == ["queued", "reading", "generating"]
    assert seen[-1].text == "I call."
    (body,) = fake.bodies
    assert (body["messages"], body["tools"], body["max_tokens"]) == (ASKED, [TOOL], 20)
    assert "tool_choice" not in body


def test_tools_that_may_not_be_called_stay_declared(fake: FakeOpenAI) -> None:
    fake.answers.append(Answer([sse({"content": "3"})]))
    asked(fake.url, work=lambda backend: chat(backend, tools=[TOOL], settings=ChatSettings(may_call=False)))
    assert (fake.bodies[0]["tools"], fake.bodies[0]["tool_choice"]) == ([TOOL], "none")


def test_a_call_that_cannot_be_read_is_a_reply_with_the_reason(fake: FakeOpenAI) -> None:
    fake.answers.append(Answer([sse(call_delta(0, "{oops", "add", "x"), reason="tool_calls")]))
    reply = asked(fake.url, work=lambda backend: chat(backend, tools=[TOOL]))
    assert "not a JSON object" in reply.error
    assert reply.message["tool_calls"][0]["function"] == {"name": "add", "arguments": "{oops"}


def test_fields_that_a_server_does_not_know_are_left_out_for_all(fake: FakeOpenAI) -> None:
    fake.unknown_field = "stream_options"
    fake.answers += [Answer([sse({"content": "ok"})])] * 3

    async def work(backend: RemoteBackend) -> list[Reply]:
        together = await asyncio.gather(chat(backend), chat(backend, settings=as_agent("a2")))
        return [*together, await chat(backend)]

    assert [reply.message["content"] for reply in asked(fake.url, work=work)] == ["ok"] * 3
    assert sum("stream_options" in body for body in fake.bodies) <= 2


def test_a_budget_for_thinking_is_refused(fake: FakeOpenAI) -> None:
    settings = ChatSettings(AnswerSettings(thinking_budget=5))
    with pytest.raises(KimiLiteError, match="budget for thinking"):
        asked(fake.url, work=lambda backend: chat(backend, settings=settings))


def test_our_own_server_answers() -> None:
    with running(lambda: speaking(lambda prompt: ("hm", "It is 3."))) as url:
        reply = asked(url, work=chat)
    assert (reply.message["content"], reply.message["reasoning_content"]) == ("It is 3.", "hm")
    assert reply.usage.prompt_tokens > 0
    assert reply.usage.generated_tokens > 0


# Several servers -----------------------------------------------------------------------------------------------------


def test_the_orchestrator_and_its_agents_go_where_they_belong(
    fake: FakeOpenAI, other: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with the key that its variable names, and no other."""
    monkeypatch.setenv("PLANNER_KEY", "key-of-the-planner")
    fake.answers += [Answer([sse({"content": "plan"})])]
    other.answers += [Answer([sse({"content": "work"})])] * 3

    async def work(backend: RemoteBackend) -> list[Reply]:
        settings = [ChatSettings(agent_id=name) for name in (ORCHESTRATOR, "a1", "a2", "a3")]
        assert backend.identity == "orchestrator: kimi-k2.5; agents: other"
        return await asyncio.gather(*(chat(backend, settings=each) for each in settings))

    choices = f"{fake.url},role=orchestrator,key=PLANNER_KEY", f"{other.url},role=agents"
    replies = asked(*choices, work=work)
    assert [reply.message["content"] for reply in replies] == ["plan", "work", "work", "work"]
    assert {headers["Authorization"] for headers in fake.headers} == {"Bearer key-of-the-planner"}
    assert all("Authorization" not in headers for headers in other.headers)
    monkeypatch.delenv("PLANNER_KEY")
    with pytest.raises(KimiLiteError, match="PLANNER_KEY, which is not set"):
        asked(*choices, work=work)


def test_a_server_that_dies_leaves_its_work_to_another(other: FakeOpenAI) -> None:
    other.answers += [Answer([sse({"content": "alive"})])] * 6
    with FakeOpenAI() as dying:

        async def work(backend: RemoteBackend) -> list[Reply]:
            dying.close()
            return await asyncio.gather(*(chat(backend, settings=as_agent(f"a{i}")) for i in range(6)))

        replies = asked(f"{dying.url}=2", other.url, work=work)
    assert [reply.message["content"] for reply in replies] == ["alive"] * 6


def test_a_server_that_is_not_there_at_first_is_left_out_with_a_warning(other: FakeOpenAI) -> None:
    other.answers.append(Answer([sse({"content": "alive"})]))
    warnings: list[str] = []
    gone = f"http://127.0.0.1:{free_port()}"
    assert asked(gone, other.url, work=chat, on_warning=warnings.append).message["content"] == "alive"
    assert len(warnings) == 1
    assert "Nothing answers at" in warnings[0]
    assert "asked no more" in warnings[0]
    with pytest.raises(KimiLiteError, match="Nothing answers at") as refused:
        asked(gone, work=chat)
    assert "Start the server" in refused.value.hint


def test_a_server_that_dies_alone_is_given_up_after_a_while() -> None:
    with FakeOpenAI() as dying:

        async def work(backend: RemoteBackend) -> Reply:
            dying.close()
            return await chat(backend)

        with pytest.raises(KimiLiteError, match=f"Nothing answers at .* asked {MAX_FAILURES} times in 1[0-9][0-9] s"):
            asked(dying.url, work=work)


@pytest.mark.parametrize(
    ("status", "said"), [(401, "bad key"), (404, "no such model"), (429, "check your plan and billing details")]
)
def test_a_server_that_will_never_answer_is_left_out(
    fake: FakeOpenAI, other: FakeOpenAI, status: int, said: str
) -> None:
    refusal = Answer([json.dumps({"error": {"message": said}}).encode()], status)
    fake.answers.append(refusal)
    other.answers += [Answer([sse({"content": "alive"})])] * 3
    warnings: list[str] = []

    async def work(backend: RemoteBackend) -> list[Reply]:
        return [await chat(backend, settings=as_agent(f"a{i}")) for i in range(3)]

    replies = asked(f"{fake.url}=9", other.url, work=work, on_warning=warnings.append)
    assert [reply.message["content"] for reply in replies] == ["alive"] * 3
    assert len(fake.bodies) == len(warnings) == 1
    assert said in warnings[0]
    fake.answers.append(refusal)
    with pytest.raises(KimiLiteError, match=said):
        asked(fake.url, work=chat)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_no_server_would_answer_is_not_asked_again(fake: FakeOpenAI, status: int) -> None:
    fake.answers.append(Answer([b'{"error": {"message": "maximum context length is 4096"}}'], status))
    with pytest.raises(KimiLiteError, match="context length"):
        asked(fake.url, work=chat)
    assert len(fake.bodies) == 1


def test_a_limit_of_rate_is_waited_for_and_fewer_are_asked_at_once(fake: FakeOpenAI) -> None:
    refusal = Answer([b'{"error": "slow down"}'], 429, headers={"Retry-After": "30"})
    fake.answers += [refusal, Answer([sse({"content": "ok"})])]
    clock, warnings = FakeClock(), list[str]()
    assert asked(fake.url, work=chat, clock=clock, on_warning=warnings.append).message["content"] == "ok"
    assert 30 <= clock.now_s() <= 45
    (warning,) = warnings
    assert "answered 429 (refused): slow down. It is asked again in" in warning


@pytest.mark.parametrize("status", [429, 503])
def test_who_is_to_be_asked_hours_later_is_left_out(fake: FakeOpenAI, other: FakeOpenAI, status: int) -> None:
    fake.answers.append(Answer([b"{}"], status, headers={"Retry-After": "86400"}))
    other.answers.append(Answer([sse({"content": "alive"})]))
    clock = FakeClock()
    assert asked(f"{fake.url}=9", other.url, work=chat, clock=clock).message["content"] == "alive"
    assert clock.now_s() == 0


def test_a_server_that_fails_often_is_told_of_now_and_then(fake: FakeOpenAI) -> None:
    refusal, ok = Answer([b"{}"], 503, headers={"Retry-After": "1"}), Answer([sse({"content": "ok"})])
    fake.answers += [refusal, ok] * 90
    warnings: list[str] = []

    async def work(backend: RemoteBackend) -> None:
        for _ in range(90):
            await chat(backend)

    asked(fake.url, work=work, on_warning=warnings.append)
    assert 2 <= len(warnings) <= 4  # in 90 to 135 seconds


def test_a_server_that_only_refuses_for_its_limit_of_rate_is_given_up() -> None:
    async def work() -> None:
        async with FaultyServer(chance=1.0, faults=["429"]).listening() as server:
            backend = RemoteBackend([EndpointChoice(server.url)], clock=FakeClock(), seed=1)
            await backend.open()
            with pytest.raises(KimiLiteError, match=r"answered 429 .* asked \d+ times in [0-9]+ s"):
                await chat(backend)
            await backend.close()

    asyncio.run(work())


@pytest.mark.parametrize("fault", ["silence", "silence midway", None])
def test_who_stops_waiting_hangs_up(fault: Fault | None) -> None:
    async def work() -> None:
        faults = [fault] if fault else []
        async with (
            FaultyServer(chance=1.0, faults=faults).listening() as server,
            RemoteContext([EndpointChoice(server.url, most_at_once=2)]) as backend,
        ):
            tasks = [asyncio.create_task(chat(backend, settings=as_agent(f"a{i}"))) for i in range(6)]
            while len(server.asked) == 0:
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert all(task.cancelled() for task in tasks) or fault is None
            async with asyncio.timeout(10):
                while server.connections:
                    await asyncio.sleep(0.001)

    asyncio.run(work())


class RemoteContext(AsyncExitStack):
    """A backend that is open inside the block."""

    def __init__(self, choices: Sequence[EndpointChoice], **more: Any) -> None:
        super().__init__()
        self.backend = RemoteBackend(choices, **{"clock": FakeClock(), "seed": 0} | more)

    async def __aenter__(self) -> RemoteBackend:
        await super().__aenter__()
        self.push_async_callback(self.backend.close)
        await self.backend.open()
        return self.backend


# Faults --------------------------------------------------------------------------------------------------------------


def next_message(messages: Sequence[Message], tools: Sequence[Message]) -> Message:
    """Counts in calls of `add` up to three, then says the sum; a call that could not be read is made again."""
    done = sum(message["role"] == "tool" and message["content"] == "1" for message in messages)
    if done == 3:
        return {"role": "assistant", "content": f"{messages[0]['content']} has counted to {done}."}
    call = {"id": f"functions.add:{len(messages)}", "type": "function"}
    function = {"name": "add", "arguments": json.dumps({"by": 1, "to": done})}
    return {"role": "assistant", "content": "One more.", "tool_calls": [{**call, "function": function}]}


async def counted(backend: RemoteBackend, name: str) -> str:
    """What an agent says at its end: it answers every call, as the loop of agents does."""
    messages: list[Message] = [{"role": "user", "content": name}]
    for _ in range(20):
        reply = await chat(backend, messages, [TOOL], as_agent(name))
        messages.append(reply.message)
        calls = reply.message.get("tool_calls", ())
        if not calls:
            return reply.message["content"]
        for call in calls:
            try:
                is_right = json.loads(call["function"]["arguments"]).get("by") == 1
            except (ValueError, AttributeError):
                is_right = False
            assert is_right or reply.error or call["function"]["arguments"]
            result = "1" if is_right else "That call could not be read."
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    return "too many steps"


async def faulty_run(seed: int, chance: float, faults: Sequence[Fault]) -> tuple[list[str], list[dict], list[dict]]:
    """Eight agents on two such servers; what each one says or why not, what was asked, what failed."""
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(FaultyServer(next_message, 10 * seed + i, chance, faults).listening())
            for i in range(2)
        ]
        choices = [EndpointChoice(server.url) for server in servers]
        backend = await stack.enter_async_context(RemoteContext(choices, read_s=SILENCE_S, stall_s=SILENCE_S))
        ends = await asyncio.gather(*(counted(backend, f"agent {i}") for i in range(8)), return_exceptions=True)
        said = [f"{type(end).__name__}: {end}" if isinstance(end, BaseException) else end for end in ends]
        assert all(isinstance(end, (str, KimiLiteError)) for end in ends), said
        return said, [dict(server.asked) for server in servers], [dict(server.failed) for server in servers]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_lived_with(fault: Fault) -> None:
    chance = 0.15 if fault.startswith("silence") else 0.4
    said, _, failed = asyncio.run(faulty_run(1, chance, [fault]))
    assert said == [f"agent {i} has counted to 3." for i in range(8)]
    assert sum(count for counts in failed for count in counts.values()) > 0


@pytest.mark.parametrize("seed", range(8))
def test_every_run_on_faulty_servers_ends_right_or_with_a_reason(seed: int) -> None:
    said, _, failed = asyncio.run(faulty_run(seed, 0.35, [f for f in FAULTS if not f.startswith("silence")]))
    right = [f"agent {i} has counted to 3." for i in range(8)]
    assert all(end == right[i] or end.startswith("KimiLiteError: ") for i, end in enumerate(said))
    assert sum(map(len, failed)) > 3


def test_servers_that_always_fail_end_every_agent_with_a_sentence() -> None:
    faults = [fault for fault in FAULTS if fault != "spoiled call" and not fault.startswith("silence")]
    said, asked, _ = asyncio.run(faulty_run(3, 1.0, faults))
    assert all(end.startswith("KimiLiteError: ") and "It was asked" in end for end in said), said
    assert max(sum(counts.values()) for counts in asked) < 40 * 8


def test_the_same_seed_fails_in_the_same_way() -> None:
    """Of one server, whatever the order in which questions come."""

    async def run(order: int) -> tuple[list[str], dict, dict]:
        faults = [fault for fault in FAULTS if not fault.startswith("silence")]
        async with FaultyServer(next_message, 5, 0.4, faults).listening() as server:
            async with RemoteContext([EndpointChoice(server.url, most_at_once=3)], seed=order) as backend:
                said = await asyncio.gather(*(counted(backend, f"agent {i}") for i in range(6)[::order]))
            return sorted(said), dict(server.asked), dict(server.failed)

    assert asyncio.run(run(1)) == asyncio.run(run(-1))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
