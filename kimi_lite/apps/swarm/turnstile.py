"""Lets so many through at once, and of those who wait the one with the most work before it.

async with turnstile.turn(priority): ...
"""

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count


class Turnstile:
    """Used on one event loop."""

    def __init__(self, most: int) -> None:
        assert most > 0, most
        self._num_free = most
        self._numbers = count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # (-priority, number, who waits), a heap

    @asynccontextmanager
    async def turn(self, priority: int) -> AsyncIterator[None]:
        """Inside the block one of the places is taken. Highest priority first, and of equal ones who came first."""
        await self._enter(priority)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, priority: int) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        place = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-priority, next(self._numbers), place))
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # it was given a place that it does not take
                self._leave()
            raise

    def _leave(self) -> None:
        while self._waiting:
            _, _, place = heapq.heappop(self._waiting)
            if not place.done():  # those who were cancelled wait no more
                place.set_result(None)
                return
        self._num_free += 1
