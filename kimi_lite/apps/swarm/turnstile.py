"""Lets so many agents work at once, and of those that wait the one with the most work before it first."""

import asyncio
import heapq
from itertools import count


class Turnstile:
    """So many places; used on one event loop. Who entered leaves."""

    def __init__(self, most: int) -> None:
        assert most > 0, most
        self._num_free = most
        self._numbers = count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # (-priority, number, who waits), a heap

    async def enter(self, priority: int) -> None:
        """Wait for a place and take it. Highest priority first, and of equal ones who came first."""
        if self._num_free:
            self._num_free -= 1
            return
        place = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-priority, next(self._numbers), place))
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # it was given a place that it does not take
                self.leave()
            raise

    def leave(self) -> None:
        """Give a place back: to who waits."""
        while self._waiting:
            _, _, place = heapq.heappop(self._waiting)
            if not place.done():  # those who were cancelled wait no more
                place.set_result(None)
                return
        self._num_free += 1
