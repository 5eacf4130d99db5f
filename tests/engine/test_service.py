"""The engine in its thread: joins, leaves, refusals, failures, the end."""

import asyncio
import threading
from dataclasses import replace

import pytest

from kimi_lite.engine.service import EngineService, Progress, QueueFull, Unavailable
from kimi_lite.engine.types import Token
from kimi_lite.errors import Broken, KimiLiteError, MemoryEnded
from tests.engine.fakes import fake_engine
from tests.engine.test_engine import assert_idle, greedy_by_hand, prompt_of, request


async def ready(engine, **more) -> EngineService:
    service = EngineService(lambda: engine, **more)
    service.start()
    await asyncio.to_thread(service.is_ready.wait, 10)
    return service


async def collect(service: EngineService, wanted) -> list[Token]:
    tokens = []
    async for events in service.submit(wanted):
        tokens += [event for event in events if isinstance(event, Token)]
    return tokens


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens if token.id is not None]


def test_requests_that_join_at_any_time_get_what_they_get_alone():
    async def main() -> None:
        engine = fake_engine(context_length=512, num_pages=40)
        service = await ready(engine)
        prompts = [prompt_of(5 + 13 * i, seed=i) for i in range(12)]

        async def one(i: int) -> None:
            await asyncio.sleep(0.003 * i)
            got = ids(await collect(service, request(str(i), prompts[i], 20, temperature=0, ignore_eos=True)))
            assert got == greedy_by_hand(prompts[i], 20)

        await asyncio.gather(*(one(i) for i in range(12)))
        assert_idle(engine)
        assert service.totals() == {
            "prompt_tokens": sum(map(len, prompts)), "cached_tokens": 0, "generated_tokens": 240, "requests": 12
        }  # fmt: skip
        await service.close(1.0)
        assert engine.is_closed and service.state == "closed"

    asyncio.run(main())


def test_who_leaves_is_cancelled_and_its_pages_are_free():
    async def main() -> None:
        engine = fake_engine(context_length=4096, num_pages=64)
        service = await ready(engine)
        stream = service.submit(request("a", prompt_of(40), 4000, ignore_eos=True))
        async for _ in stream:
            break
        await stream.aclose()
        for _ in range(200):
            if engine.is_idle:
                break
            await asyncio.sleep(0.01)
        assert_idle(engine)
        assert service.load().num_running == service.load().num_waiting == 0
        await service.close(1.0)

    asyncio.run(main())


def test_progress_of_a_prompt_comes_before_its_tokens():
    async def main() -> None:
        service = await ready(fake_engine(context_length=2048, num_pages=40, max_step_tokens=64))
        events = []
        async for group in service.submit(request("a", prompt_of(300), 3)):
            events += group
        seen = [event.done_tokens for event in events if isinstance(event, Progress)]
        first = next(i for i, event in enumerate(events) if isinstance(event, Token))
        assert seen == sorted(seen) and 256 < seen[-1] <= 300 and all(isinstance(e, Progress) for e in events[:first])
        await service.close(1.0)

    asyncio.run(main())


def test_a_full_queue_and_impossible_requests_are_refused():
    async def main() -> None:
        engine = fake_engine(context_length=256, num_pages=4, max_running=1)
        service = await ready(engine, max_waiting=2)
        gate, forward = threading.Event(), engine.model.forward

        def wait(batch, should_stop=None):
            gate.wait(120)
            return forward(batch, should_stop)

        engine.model.forward = wait
        tasks = [asyncio.create_task(collect(service, request(str(i), prompt_of(9, seed=i), 5))) for i in range(3)]
        await asyncio.sleep(0.1)
        with pytest.raises(QueueFull) as refused:
            await collect(service, request("x", prompt_of(9), 5))
        assert refused.value.retry_after_s >= 1
        gate.set()
        await asyncio.gather(*tasks)
        with pytest.raises(KimiLiteError, match="need a context of 301"):
            await collect(service, request("long", prompt_of(300), 5))
        with pytest.raises(KimiLiteError, match="A bias is given for token 9999"):
            await collect(service, request("bias", prompt_of(9), 5, logit_bias=((9999, 1.0),)))
        assert len(ids(await collect(service, request("after", prompt_of(9), 5)))) == 5
        await service.close(1.0)

    asyncio.run(main())


@pytest.mark.parametrize("error", [RuntimeError("a kernel fell over"), Broken("a kernel fell over")])
def test_an_engine_that_breaks_tells_all_and_refuses_from_then_on(error):
    async def main() -> None:
        engine = fake_engine(context_length=256, num_pages=40)
        service = await ready(engine)

        def broken(batch, should_stop=None):
            raise error

        engine.model.forward = broken
        results = await asyncio.gather(
            *(collect(service, request(str(i), prompt_of(9, seed=i), 5)) for i in range(3)), return_exceptions=True
        )
        assert all(isinstance(result, Unavailable) for result in results), results
        assert "a kernel fell over" in results[0].message and service.state == "failed"
        with pytest.raises(Unavailable, match="has stopped"):
            await collect(service, request("late", prompt_of(9), 5))
        await service.close(1.0)
        assert engine.is_closed and service.state == "failed"

    asyncio.run(main())


@pytest.mark.parametrize(
    "error", [MemoryEnded("The GPU ran out of memory."), MemoryError("8 GiB"), KimiLiteError("A shard is cut short.")]
)
@pytest.mark.parametrize("num_long", [1, 2])
def test_who_alone_is_too_much_ends_alone(error, num_long):
    """Together with others it fails them all; they get what they get alone, and the server goes on."""

    async def main() -> None:
        engine = fake_engine(context_length=512, num_pages=64)
        service = await ready(engine)

        def fail_in_long(batch, layer):
            if layer == 1 and batch.positions.max() >= 300:
                raise error

        engine.model.before_layer = fail_in_long
        lengths = [9, *[301 + i for i in range(num_long)], 70]
        prompts = [prompt_of(length, seed=length) for length in lengths]
        results = await asyncio.gather(
            *(collect(service, request(str(i), p, 12, temperature=0, ignore_eos=True)) for i, p in enumerate(prompts))
        )
        for prompt, tokens in zip(prompts, results, strict=True):
            if len(prompt) < 300:
                assert ids(tokens) == greedy_by_hand(prompt, 12)
                continue
            assert not ids(tokens) and tokens[-1].finish_reason == "error"
            assert isinstance(tokens[-1].failure, KimiLiteError) and str(error).split()[0] in str(tokens[-1].failure)
        assert any(len(batch.sequences) > 1 and batch.positions.max() >= 300 for batch in engine.model.batches)
        assert_idle(engine)
        assert service.state == "ready" and len(ids(await collect(service, request("after", prompt_of(20), 3)))) == 3
        await service.close(1.0)

    asyncio.run(main())


def test_memory_that_ends_for_all_together_costs_a_pass_each():
    async def main() -> None:
        engine = fake_engine(context_length=512, num_pages=64)
        service = await ready(engine)

        def fail_together(batch, layer):
            if len(batch.sequences) > 1:
                raise MemoryError

        engine.model.before_layer = fail_together
        prompts = [prompt_of(30, seed=seed) for seed in range(4)]
        asked = [request(str(i), p, 12, temperature=0, ignore_eos=True) for i, p in enumerate(prompts)]
        results = await asyncio.gather(*(collect(service, each) for each in asked))
        assert [ids(tokens) for tokens in results] == [greedy_by_hand(prompt, 12) for prompt in prompts]
        assert any(len(batch.sequences) > 1 for batch in engine.model.batches)
        await service.close(1.0)

    asyncio.run(main())


class _FailingConstraint:
    """A grammar with a mistake in it, that is met at the token `at`."""

    def __init__(self, at: int) -> None:
        self._left = at

    def allowed(self) -> None:
        if self._left == 0:
            raise IndexError("no such rule")

    def accept(self, token_id: int) -> None:
        self._left -= 1


@pytest.mark.parametrize("at", [-1, 0, 3])
def test_a_grammar_that_fails_ends_its_request_alone(at):
    """At its making (-1) or at a token."""

    def make():
        if at < 0:
            raise RecursionError("too deep")
        return _FailingConstraint(at)

    async def main() -> None:
        service = await ready(fake_engine(context_length=512, num_pages=64))
        good = request("good", prompt_of(9), 12, temperature=0, ignore_eos=True)
        bad = replace(request("bad", prompt_of(20), 12, ignore_eos=True), constraint=make)
        results = await asyncio.gather(collect(service, good), collect(service, bad), return_exceptions=True)
        assert ids(results[0]) == greedy_by_hand(prompt_of(9), 12)
        if at < 0:
            assert isinstance(results[1], RecursionError)
        else:
            assert len(ids(results[1])) == at and isinstance(results[1][-1].failure, IndexError)
        assert_idle(service.engine)
        assert service.state == "ready"
        await service.close(1.0)

    asyncio.run(main())


def test_a_model_that_cannot_be_loaded_and_one_that_is_loading():
    async def main() -> None:
        gate = threading.Event()

        def fail():
            gate.wait(120)
            raise KimiLiteError("The file is cut short.", "Fetch it again.")

        service = EngineService(fail)
        service.start()
        with pytest.raises(Unavailable, match="still loading"):
            await collect(service, request("a", prompt_of(3), 1))
        gate.set()
        await asyncio.to_thread(service.is_ready.wait, 10)
        with pytest.raises(Unavailable, match="cut short"):
            service.require_ready()

    asyncio.run(main())


def test_the_end_waits_for_answers_and_cancels_those_that_take_too_long():
    async def main() -> None:
        engine = fake_engine(context_length=4096, num_pages=140)
        service = await ready(engine)
        short = asyncio.create_task(collect(service, request("short", prompt_of(9), 30, ignore_eos=True)))
        endless = asyncio.create_task(
            collect(service, replace(request("endless", prompt_of(9, seed=1), 4000, ignore_eos=True)))
        )
        await asyncio.sleep(0.05)
        await service.close(0.5)
        assert len(ids(await short)) == 30
        assert (await endless)[-1].finish_reason == "cancelled"
        assert engine.is_closed

    asyncio.run(main())


def test_an_answer_that_nobody_reads_is_cancelled():
    async def main() -> None:
        engine = fake_engine(context_length=4096, num_pages=64)
        service = await ready(engine)
        service.submit(request("a", prompt_of(40), 4000, ignore_eos=True))  # dropped at once
        for _ in range(200):
            if not service.load().num_waiting and engine.is_idle:
                break
            await asyncio.sleep(0.01)
        assert_idle(engine)
        await service.close(1.0)

    asyncio.run(main())
