"""Which server a question goes to, and when."""

import asyncio
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.apps.swarm.pool import JITTER, LONGEST_S, QUIET_S, SHRINK_EVERY_S, Capacity, Member, Pool
from kimi_lite.errors import KimiLiteError
from tests.apps.swarm.clock import FakeClock

AGENT = False  # not the orchestrator


def member(weight: float = 1.0, most: int | None = None) -> Member:
    return Member(weight, serves_orchestrator=True, serves_agents=True, most_at_once=most)


def pool(*members: Member) -> Pool[Member]:
    return Pool(members, FakeClock(), seed=0)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=4), st.integers(1, 60))
def test_questions_are_spread_by_weight(weights: Sequence[float], count: int) -> None:
    async def check() -> None:
        servers = pool(*map(member, weights))
        taken = Counter([servers.members.index(await servers.take(AGENT, str(i), 0)) for i in range(count)])
        for i, weight in enumerate(weights):
            assert abs(taken[i] - count * weight / sum(weights)) <= len(weights)

    run(check())


def test_an_agent_stays_where_its_prompt_is_cached_and_goes_elsewhere_when_that_is_closed() -> None:
    async def check() -> None:
        first, second = member(), member(weight=100)
        servers = pool(first, second)
        second.closed_until_s = 10.0
        assert await servers.take(AGENT, "a", 0) is first
        servers.give_back(first)
        second.closed_until_s = 0.0
        assert await servers.take(AGENT, "a", 0) is first  # though the other one has more to give
        assert await servers.take(AGENT, "b", 0) is second
        servers.give_back(first)
        first.closed_until_s = 5.0
        assert await servers.take(AGENT, "a", 0) is second

    run(check())


def test_who_waits_goes_by_priority_then_in_order() -> None:
    async def check() -> None:
        only = member(most=1)
        servers = pool(only)
        await servers.take(AGENT, "first", 0)
        served: list[str] = []

        async def ask(name: str, priority: int) -> None:
            taken = await servers.take(AGENT, name, priority)
            served.append(name)
            servers.give_back(taken)

        tasks = [asyncio.create_task(ask(n, p)) for n, p in (("a", 1), ("b", 5), ("c", 1), ("d", 9))]
        await asyncio.sleep(0)
        servers.give_back(only)
        await asyncio.gather(*tasks)
        assert served == ["d", "b", "a", "c"]

    run(check())


def test_roles_are_kept_and_nobody_left_is_said() -> None:
    async def check() -> None:
        planner = Member(1.0, serves_orchestrator=True, serves_agents=False, most_at_once=None)
        worker = Member(1.0, serves_orchestrator=False, serves_agents=True, most_at_once=None)
        servers = pool(planner, worker)
        assert await servers.take(True, "orchestrator", 0) is planner
        assert await servers.take(AGENT, "a", 0) is worker
        worker.why_out = KimiLiteError("The key is wrong.", "Give another.")
        with pytest.raises(KimiLiteError, match="The key is wrong"):
            await servers.take(AGENT, "b", 0)
        assert await servers.take(True, "orchestrator", 0) is planner

    run(check())


def test_the_waits_double_up_to_a_limit_and_are_stretched_by_chance() -> None:
    async def check() -> None:
        for is_limit, first_s in ((True, 3.0), (False, 1.0)):
            only = member()
            servers, clock = Pool([only], FakeClock(), seed=4), FakeClock()
            servers.clock = clock
            stretched = set()
            for i in range(9):
                wanted_s = min(LONGEST_S, first_s * 2**i)
                servers.failed(only, is_limit)
                wait_s = only.closed_until_s - clock.now_s()
                assert wanted_s <= wait_s <= (1 + JITTER) * wanted_s
                stretched.add(wait_s / wanted_s)
                servers.failed(only, is_limit)  # asked together with the first: one failure
                assert only.closed_until_s - clock.now_s() == wait_s
                clock.pass_s(wait_s)
            assert len(stretched) > 5
            only.has_answered()
            servers.failed(only, is_limit)
            assert only.closed_until_s - clock.now_s() <= (1 + JITTER) * first_s

    run(check())


@pytest.mark.parametrize("is_limit", [True, False])
def test_retry_after_is_honoured(is_limit: bool) -> None:
    async def check() -> None:
        only = member()
        servers = pool(only)
        servers.failed(only, is_limit, retry_after_s=40.0)
        began_s = servers.clock.now_s()
        assert 40.0 <= only.closed_until_s - began_s <= 60.0
        assert await servers.take(AGENT, "a", 0) is only
        assert servers.clock.now_s() - began_s >= 40.0
        await servers.close()

    run(check())


def test_a_limit_of_rate_takes_one_place_at_most_every_two_seconds_and_gives_it_back_after_three_quiet_minutes() -> (
    None
):
    capacity = Capacity(None)
    assert capacity.limit(0.0) is None
    capacity.shrink(8, 0.0)
    capacity.shrink(8, 0.9 * SHRINK_EVERY_S)  # of the same burst
    assert capacity.limit(1.0) == 7
    capacity.shrink(7, SHRINK_EVERY_S)
    assert capacity.limit(SHRINK_EVERY_S) == 6
    last_s = SHRINK_EVERY_S
    assert capacity.limit(last_s + 0.9 * QUIET_S) == 6
    assert capacity.limit(last_s + QUIET_S) == 7
    assert capacity.limit(last_s + 3.5 * QUIET_S) == 9
    for i in range(1, 30):
        capacity.shrink(1, 10_000 + 10.0 * i)
    assert capacity.limit(10_300.0) == 1  # one goes through
    limited = Capacity(4)
    limited.shrink(3, 0.0)
    assert limited.limit(100 * QUIET_S) == 4  # never more than was said


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_happens_limits_hold_and_nobody_waits_for_ever(data: st.DataObject) -> None:
    """Servers with limits; agents take, fail, are refused, cancelled, and give back in any order."""

    async def check() -> None:
        limits = data.draw(st.lists(st.sampled_from([1, 2, 3, None]), min_size=1, max_size=3))
        members = [member(most=most) for most in limits]
        servers = pool(*members)
        waiting: list[asyncio.Task[Member]] = []
        held: list[Member] = []
        num_served = num_cancelled = 0

        async def settle() -> None:
            for _ in range(6):
                await asyncio.sleep(0)
            for task in [task for task in waiting if task.done()]:
                waiting.remove(task)
                held.append(task.result())

        steps = data.draw(st.lists(st.sampled_from(["take", "take", "give", "fail", "limit", "cancel"]), max_size=40))
        for i, step in enumerate(steps):
            if step == "take":
                waiting.append(asyncio.create_task(servers.take(AGENT, f"{i % 7}", i % 3)))
            elif step == "cancel" and waiting:
                task = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                if not task.cancelled():
                    held.append(task.result())
                num_cancelled += task.cancelled()
            elif held and step in ("give", "fail", "limit"):
                one = held.pop(data.draw(st.integers(0, len(held) - 1)))
                if step != "give":
                    servers.failed(one, step == "limit")
                servers.give_back(one)
                num_served += 1
            await settle()
            for one, most in zip(members, limits, strict=True):
                assert most is None or one.num_running <= most
            assert sum(one.num_running for one in members) == len(held)
        while waiting or held:
            while held:
                servers.give_back(held.pop())
                num_served += 1
            await settle()
        assert num_served + num_cancelled == steps.count("take")
        assert all(one.num_running == 0 for one in members)
        await servers.close()

    run(check())
