"""All agents as sequences of one engine in this process: one batch, one cache, their common beginnings read once.

The engine runs in a thread of its own (`engine.service`), prompts are made as the server makes them
(`apps.server.chat`): what was sampled for an agent is found in the cache when it goes on.
"""

import asyncio
from collections.abc import Callable, Sequence

from kimi_lite.apps.server.chat import ChatRequest, Chats
from kimi_lite.apps.swarm.backend import (
    ChatProgress,
    ChatSettings,
    Message,
    OnProgress,
    Reply,
    progress_of,
    reply_of,
)
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.engine import OnProgress as OnLoading
from kimi_lite.engine.loop_guard import LoopLimits
from kimi_lite.engine.service import EngineService, Progress
from kimi_lite.engine.turns import AnswerRecord
from kimi_lite.errors import KimiLiteError
from kimi_lite.terminal import report_crash

_MOST_WAITING = 100_000  # requests; how many agents there may be, the run's limits say
_NUM_CONVERSATIONS = 512  # whose sampled ids are remembered
_LOADING_POLL_S = 0.02


class LocalBackend:
    """`open_engine` runs in the engine's thread; it may tell how far it is. An engine that is not ours to close
    (`is_owner`) is ours alone between `open` and `close`."""

    def __init__(self, open_engine: Callable[[OnLoading], Engine], is_owner: bool = True) -> None:
        self._service = EngineService(
            lambda: open_engine(self._service.on_progress), max_waiting=_MOST_WAITING, is_owner=is_owner
        )
        self._service.on_failure = _report
        self._chats = Chats(self._service, LoopLimits(), _NUM_CONVERSATIONS)

    @property
    def name(self) -> str:
        return self._service.require_ready().info.name

    @property
    def can_call(self) -> bool:
        return self._service.require_ready().template.facts.can_call

    @property
    def identity(self) -> str:
        info = self._service.require_ready().info
        return f"{info.name}/{info.total_bytes}"

    async def open(self) -> None:
        self._service.start()
        while not self._service.is_ready.is_set():
            await asyncio.sleep(_LOADING_POLL_S)
        if self._service.failure is not None:
            raise self._service.failure

    async def chat(
        self, messages: Sequence[Message], tools: Sequence[Message], settings: ChatSettings, on_progress: OnProgress
    ) -> Reply:
        on_progress(ChatProgress("queued"))
        prepared = await self._chats.prepare(_request(messages, tools, settings))
        (choice,) = self._chats.open(prepared.requests)
        record, error = AnswerRecord(), ""
        try:
            async for events in choice:
                for event in events:
                    if isinstance(event, Progress):
                        on_progress(ChatProgress("reading", event.done_tokens, event.total_tokens))
                        continue
                    if event.failure is not None:
                        raise event.failure
                    record.add(event)
                    error = event.error or error
                on_progress(progress_of(record)) if record.last is not None else None
        finally:
            choice.close()
        return reply_of(record, error)

    async def close(self) -> None:
        await self._service.close(0.0)


def _report(failure: BaseException) -> None:
    """The engine stopped. Agents are told so in a sentence; where it is a bug of ours, it has a traceback."""
    if not isinstance(failure, KimiLiteError):
        report_crash(type(failure), failure, failure.__traceback__)


def _request(messages: Sequence[Message], tools: Sequence[Message], settings: ChatSettings) -> ChatRequest:
    answer = settings.answer
    return ChatRequest(
        tuple(messages),
        tuple(tools),
        tool_choice="auto" if settings.may_call else "none",
        is_thinking=answer.is_thinking,
        keeps_reasoning=answer.preserve_thinking,
        max_reasoning_tokens=answer.thinking_budget,
        sampling=answer.sampling,
        temperature=answer.temperature,
        priority=settings.priority,
    )
