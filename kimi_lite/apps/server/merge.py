"""Several choices as one stream of events, each event with the number of its choice."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from kimi_lite.apps.server.chat import Choice
from kimi_lite.engine.service import Event


async def merged(choices: Sequence[Choice]) -> AsyncGenerator[tuple[int, Event], None]:
    """Events in the order in which they come. The first choice that fails ends all; leaving closes all."""
    pending = {asyncio.ensure_future(anext(choice)): i for i, choice in enumerate(choices)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=pending.__getitem__):
                i = pending.pop(task)
                try:
                    events = task.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(choices[i]))] = i
                for event in events:
                    yield i, event
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for choice in choices:
            choice.close()
