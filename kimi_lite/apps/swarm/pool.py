"""Which of several servers a question goes to, and when: weights, limits of rate, servers that fail and come back.

A question waits until a server that may answer it takes one more. Among those, an agent's own comes first, where its
earlier prompts are cached, then the one with the least to do for its weight. Those who wait go by priority, then in
order.

A server that refuses for its limit of rate (429) takes one request less than it had, at most once in two seconds, and
one more after each three minutes without such a refusal, as kimi-code does; until `Retry-After`, or for 3, 6, 12, ...
seconds, it takes none. One that fails takes none for 1, 2, 4, ... seconds. Both waits are stretched by chance, so that
clients who were refused together do not come back together.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kimi_lite.errors import KimiLiteError

LIMITED_S, FAILED_S, LONGEST_S = 3.0, 1.0, 60.0  # first waits, doubled each time, and the longest
JITTER = 0.5  # waits are up to so much longer
SHRINK_EVERY_S, QUIET_S = 2.0, 180.0
_TICK_S = 1e-6  # clocks round


class Clock(Protocol):
    """Time, for tests to make it pass."""

    def now_s(self) -> float:
        """Seconds since any moment."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""


class LoopClock:
    """The event loop's own."""

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Capacity:
    """How many requests a server takes at once."""

    def __init__(self, most: int | None) -> None:
        self._most = most  # what it never exceeds; None: no limit is known
        self._limit = most
        self._shrunk_s = self._changed_s = -float("inf")

    def limit(self, now_s: float) -> int | None:
        """Requests; None: as many as come. Grows with time."""
        while self._limit is not None and self._limit != self._most and now_s - self._changed_s >= QUIET_S:
            self._limit += 1
            self._changed_s += QUIET_S
        return self._limit

    def shrink(self, num_running: int, now_s: float) -> None:
        """One of `num_running` requests was refused."""
        limit = self.limit(now_s)
        if now_s - self._shrunk_s >= SHRINK_EVERY_S:
            self._limit = max(1, min(num_running, num_running if limit is None else limit) - 1)
            self._shrunk_s = now_s
        self._changed_s = now_s


class Member:
    """One server of a pool."""

    def __init__(self, weight: float, serves_orchestrator: bool, serves_agents: bool, most_at_once: int | None) -> None:
        self._weight, self._serves = weight, {True: serves_orchestrator, False: serves_agents}
        self.capacity = Capacity(most_at_once)
        self.num_running = 0
        self.closed_until_s = -float("inf")  # it takes nothing before
        self.num_failures = 0  # in a row
        self.why_out: KimiLiteError | None = None  # why it is asked no more; None: it is

    def may_serve(self, is_orchestrator: bool) -> bool:
        """Whether a question of the orchestrator, or else of an agent, may ever go to it."""
        return self.why_out is None and self._serves[is_orchestrator]

    def serves(self, is_orchestrator: bool) -> bool:
        """Whether it was meant to answer such questions."""
        return self._serves[is_orchestrator]

    def is_open(self, now_s: float) -> bool:
        """Whether it takes one more now."""
        limit = self.capacity.limit(now_s)
        return now_s >= self.closed_until_s - _TICK_S and (limit is None or self.num_running < limit)

    @property
    def load(self) -> float:
        """With one more."""
        return (self.num_running + 1) / self._weight

    def has_answered(self) -> None:
        """It works."""
        self.num_failures = 0

    def has_failed(self, is_limit: bool, retry_after_s: float | None, now_s: float, chance: random.Random) -> None:
        """It answered with a failure, or not at all; `is_limit`: with 429. Still counted in `num_running`. Questions
        that were asked together fail together: that is one failure."""
        first_s = LIMITED_S if is_limit else FAILED_S
        if retry_after_s is not None or now_s >= self.closed_until_s - _TICK_S:
            asked_s = (
                min(LONGEST_S, first_s * 2 ** min(self.num_failures, 16)) if retry_after_s is None else retry_after_s
            )
            wait_s = asked_s * (1 + JITTER * chance.random())
            self.num_failures += 1
            self.closed_until_s = max(self.closed_until_s, now_s + wait_s)
        if is_limit:
            self.capacity.shrink(self.num_running, now_s)


@dataclass(slots=True)
class _Wish:
    """A question that waits for a server."""

    is_orchestrator: bool
    agent_id: str
    priority: int
    member: asyncio.Future[Member]


M = TypeVar("M", bound=Member)


class Pool(Generic[M]):
    """Used on one event loop."""

    def __init__(self, members: Sequence[M], clock: Clock, seed: int | None = None) -> None:
        """seed: of the stretched waits; None: other ones every time."""
        self.members, self.clock = tuple(members), clock
        self.chance = random.Random(seed)
        self._homes: dict[str, M] = {}  # where an agent's last prompt was read
        self._wishes: list[_Wish] = []
        self._alarm: asyncio.Task[None] | None = None  # looks again when a server opens
        self._alarm_s = float("inf")

    async def take(self, is_orchestrator: bool, agent_id: str, priority: int) -> M:
        """A server for one question; `give_back` it. KimiLiteError where none is left that could answer."""
        wish = _Wish(is_orchestrator, agent_id, priority, asyncio.get_running_loop().create_future())
        self._wishes.append(wish)
        self._wishes.sort(key=lambda wish: -wish.priority)
        self._hand_out()
        try:
            return await wish.member
        except asyncio.CancelledError:
            if wish in self._wishes:
                self._wishes.remove(wish)
            elif wish.member.done() and not wish.member.cancelled() and wish.member.exception() is None:
                self.give_back(wish.member.result())
            raise

    def give_back(self, member: Member) -> None:
        """The question is answered, or will be asked again."""
        member.num_running -= 1
        self._hand_out()

    def failed(self, member: Member, is_limit: bool, retry_after_s: float | None = None) -> None:
        """A question failed there, and is to be asked again."""
        member.has_failed(is_limit, retry_after_s, self.clock.now_s(), self.chance)

    async def close(self) -> None:
        """No more is handed out."""
        if self._alarm is not None:
            self._alarm.cancel()
            await asyncio.gather(self._alarm, return_exceptions=True)

    def _hand_out(self) -> None:
        now_s, still = self.clock.now_s(), []
        for wish in self._wishes:
            if wish.member.done():  # cancelled
                continue
            found = [member for member in self.members if member.may_serve(wish.is_orchestrator)]
            chosen = self._choose(found, wish.agent_id, now_s)
            if chosen is not None:
                chosen.num_running += 1
                self._homes[wish.agent_id] = chosen
                wish.member.set_result(chosen)
            elif not found:
                wish.member.set_exception(self.none_left(wish.is_orchestrator))
            else:
                still.append(wish)
        self._wishes = still
        if still:
            self._set_alarm(now_s)

    def _choose(self, found: Sequence[M], agent_id: str, now_s: float) -> M | None:
        can = [member for member in found if member.is_open(now_s)]
        home = self._homes.get(agent_id)
        return home if home in can else min(can, key=lambda member: member.load, default=None)

    def none_left(self, is_orchestrator: bool) -> KimiLiteError:
        """Why none is left: as the last one said it."""
        reasons = [member.why_out for member in self.members if member.serves(is_orchestrator) and member.why_out]
        assert reasons, "a pool has a member for every role"
        if len(reasons) == 1:
            return reasons[0]
        return KimiLiteError(
            f"None of {len(reasons)} endpoints answers; the last: {reasons[-1].message}", reasons[-1].hint
        )

    def _set_alarm(self, now_s: float) -> None:
        """Look again when the next server opens that is closed for a time."""
        opens = [
            m.closed_until_s
            for m in self.members
            if m.why_out is None and not m.is_open(now_s) and m.closed_until_s > now_s
        ]
        next_s = min(opens, default=float("inf"))
        if next_s < self._alarm_s:
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm_s = next_s
            self._alarm = asyncio.create_task(self._wait(next_s - now_s))

    async def _wait(self, seconds: float) -> None:
        await self.clock.sleep(seconds)
        self._alarm, self._alarm_s = None, float("inf")
        self._hand_out()
