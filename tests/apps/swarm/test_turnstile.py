"""So many at once, the highest priority first, and no place is lost when some are cancelled."""

import asyncio
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.apps.swarm.turnstile import Turnstile


@settings(deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(0, 10**6))
def test_no_place_is_lost(most: int, priorities: list[int], seed: int) -> None:
    chance = Random(seed)

    async def run() -> None:
        turnstile, inside, most_inside = Turnstile(most), 0, 0

        async def work(priority: int) -> None:
            nonlocal inside, most_inside
            await turnstile.enter(priority)
            try:
                inside += 1
                most_inside = max(most_inside, inside)
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                inside -= 1
                turnstile.leave()

        tasks = [asyncio.create_task(work(priority)) for priority in priorities]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            if chance.random() < 0.3:
                chance.choice(tasks).cancel()
        assert inside == 0
        assert most_inside <= most
        for _ in range(most):  # all places are free again
            await asyncio.wait_for(turnstile.enter(0), 10)

    asyncio.run(run())


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=12))
def test_who_waits_enters_by_priority_and_of_equal_ones_in_order(priorities: list[int]) -> None:
    async def run() -> list[int]:
        turnstile, order = Turnstile(1), []
        await turnstile.enter(0)

        async def work(number: int) -> None:
            await turnstile.enter(priorities[number])
            order.append(number)
            turnstile.leave()

        tasks = [asyncio.create_task(work(number)) for number in range(len(priorities))]
        await asyncio.sleep(0)
        turnstile.leave()
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(run()) == sorted(range(len(priorities)), key=lambda number: -priorities[number])
