"""Time that passes when it is waited for."""

import asyncio


class FakeClock:
    """For `apps.swarm.pool`: who sleeps wakes up at once, and it is so much later."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    def pass_s(self, seconds: float) -> None:
        self._now_s += max(0.0, seconds)

    async def sleep(self, seconds: float) -> None:
        self.pass_s(seconds)
        await asyncio.sleep(0)
