"""Agents on OpenAI-compatible servers: kimi-lite serve, vLLM, SGLang, llama-server, the vendor; one or several.

`pool` chooses the server and the moment, `endpoints` reads what `--endpoint` says of each. A question that got no whole
answer is asked again, elsewhere if there is another server: nothing of an answer is used before all of it is there.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Literal
from uuid import uuid4

from kimi_lite.apps.remote.answer import AnswerReader
from kimi_lite.apps.remote.deltas import DeltaReader
from kimi_lite.apps.remote.dialect import COMPLETIONS, Dialect
from kimi_lite.apps.remote.endpoint import READ_S, Refused
from kimi_lite.apps.remote.http_async import AsyncServer
from kimi_lite.apps.remote.models import MODELS, Models, models_of, no_models, only_model
from kimi_lite.apps.swarm.backend import (
    ChatProgress,
    ChatSettings,
    Message,
    OnProgress,
    Reply,
    progress_of,
    reply_of,
)
from kimi_lite.apps.swarm.endpoints import EndpointChoice
from kimi_lite.apps.swarm.pool import Clock, LoopClock, Member, Pool
from kimi_lite.engine.turns import AnswerRecord
from kimi_lite.errors import KimiLiteError

MAX_FAILURES = 8  # of one question, refusals for the limit of rate not counted
PATIENCE_S = 900.0  # how long one question is refused for the limit of rate
STALL_S = 180.0  # silence in the middle of an answer
WARN_EVERY_S = 60.0  # of one server
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)
_OUT = (301, 302, 303, 307, 308, 401, 402, 403, 404, 405)  # the server, its key or its model is not what was meant

Verdict = Literal["limited", "again", "out", "final"]


class RemoteBackend:
    """The servers of a swarm; see `apps.swarm.backend.Backend`."""

    def __init__(
        self,
        choices: Sequence[EndpointChoice],
        api_key: str | None = None,
        on_warning: Callable[[str], None] = lambda text: None,
        clock: Clock | None = None,
        seed: int | None = None,
        read_s: float = READ_S,
        stall_s: float = STALL_S,
    ) -> None:
        """api_key: for servers that name no variable for theirs. on_warning: told of each server that is asked no more,
        and now and then of one that fails. seed: of the waits that chance stretches. read_s: how long a server may be
        silent before an answer begins, stall_s: in the middle of one."""
        self._on_warning, self._stall_s = on_warning, stall_s
        members = [_Remote(choice, choice.key(api_key), read_s) for choice in choices]
        self._pool: Pool[_Remote] = Pool(members, clock or LoopClock(), seed)
        self._is_closed = False

    @property
    def name(self) -> str:
        return ", ".join(f"{member.model or '?'} at {member.server.url}" for member in self._pool.members)

    @property
    def can_call(self) -> bool:
        return True

    @property
    def identity(self) -> str:
        """The models and what they do; the same model may run elsewhere."""
        names = {
            role: sorted({m.model or "" for m in self._pool.members if m.serves(role == "orchestrator")})
            for role in ("orchestrator", "agents")
        }
        return "; ".join(f"{role}: {', '.join(found)}" for role, found in names.items())

    async def open(self) -> None:
        """Reach the servers and choose their models. A server that does not answer is left out with a warning, as long
        as another one does its work."""
        await asyncio.gather(*map(self._open, self._pool.members))
        for is_orchestrator in (True, False):
            if not any(member.may_serve(is_orchestrator) for member in self._pool.members):
                raise self._pool.none_left(is_orchestrator)

    async def chat(
        self, messages: Sequence[Message], tools: Sequence[Message], settings: ChatSettings, on_progress: OnProgress
    ) -> Reply:
        if settings.answer.thinking_budget is not None:
            raise KimiLiteError(
                "A budget for thinking cannot be kept from here: the endpoint decides.",
                "Leave it out; -n limits an answer.",
            )
        clock = self._pool.clock
        num_failures, num_asked, began_s = 0, 0, clock.now_s()
        while True:
            on_progress(ChatProgress("queued"))
            member = await self._pool.take(settings.is_orchestrator, settings.agent_id, settings.priority)
            try:
                num_asked += 1
                reply = await member.ask(messages, tools, settings, on_progress, self._stall_s)
                member.has_answered()
                return reply
            except KimiLiteError as error:
                verdict, passed_s = _verdict(error), clock.now_s() - began_s
                if verdict == "final":
                    raise
                num_failures += verdict == "again"
                self._blame(member, error, verdict)
                if num_failures >= MAX_FAILURES or (verdict == "limited" and passed_s > PATIENCE_S):
                    raise _given_up(error, num_asked, passed_s) from error
            finally:
                self._pool.give_back(member)

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        await self._pool.close()
        await asyncio.gather(*(member.server.close() for member in self._pool.members))

    async def _open(self, member: "_Remote") -> None:
        clock = self._pool.clock
        for num_tried in range(1, MAX_FAILURES + 1):
            try:
                await member.choose_model()
                return
            except Refused as error:
                if _verdict(error) not in ("again", "limited") or num_tried == MAX_FAILURES:
                    self._leave_out(member, error)
                    return
                self._blame(member, error, _verdict(error))
            except KimiLiteError as error:
                self._leave_out(member, error)
                return
            await clock.sleep(member.closed_until_s - clock.now_s())

    def _blame(self, member: "_Remote", error: KimiLiteError, verdict: Verdict) -> None:
        """The server is not asked for a while, or no more."""
        if verdict == "out":
            self._leave_out(member, error)
            return
        now_s = self._pool.clock.now_s()
        self._pool.failed(member, verdict == "limited", error.retry_after_s if isinstance(error, Refused) else None)
        if now_s - member.warned_s >= WARN_EVERY_S:
            member.warned_s = now_s
            self._on_warning(f"{error.message} It is asked again in {max(0.0, member.closed_until_s - now_s):.0f} s.")

    def _leave_out(self, member: "_Remote", error: KimiLiteError) -> None:
        if member.why_out is None:
            member.why_out = error
            self._on_warning(f"{error.message} It is asked no more. {error.hint}".rstrip())


class _Remote(Member):
    """A server with its model."""

    def __init__(self, choice: EndpointChoice, key: str | None, read_s: float) -> None:
        super().__init__(choice.weight, choice.serves(True), choice.serves(False), choice.most_at_once)
        self.server = AsyncServer(choice.url, key, read_s)
        self.model = choice.model
        self.warned_s = -float("inf")  # when it was last told that a question failed
        self._dialect: Dialect | None = None  # once the model is chosen
        self._opens_thinking: bool | None = None  # whether its answers begin inside <think>; None: not known yet

    async def choose_model(self) -> None:
        """The one named, or the only one there is."""
        models = await self._models()
        self.model = self.model or only_model(self.server.url, models)
        self._dialect = Dialect(self.server.url, self.model)

    async def _models(self) -> Models:
        try:
            return models_of(await self.server.get(MODELS))
        except Refused as error:
            return no_models(error, is_needed=self.model is None)

    async def ask(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message],
        settings: ChatSettings,
        on_progress: OnProgress,
        stall_s: float,
    ) -> Reply:
        """One question, asked once; or again where the server knows a field of it not."""
        assert self._dialect is not None, "the backend is open"
        num_calls = sum(len(message.get("tool_calls") or ()) for message in messages)
        while True:
            deltas = DeltaReader(
                uuid4().hex,
                num_calls,
                tools=tools,
                is_thinking=settings.answer.is_thinking,
                opens_thinking=self._opens_thinking,
                is_held=True,
            )
            body = self._dialect.body(messages, settings.answer, tools, settings.may_call)
            on_progress(ChatProgress("reading"))
            try:
                reply = await self._answer(AnswerReader(self.server, deltas), body, on_progress, stall_s)
            except Refused as error:
                self._dialect.do_without(error, settings.answer, body)
                continue
            self._opens_thinking = deltas.opens_thinking
            return reply

    async def _answer(self, reader: AnswerReader, body: Message, on_progress: OnProgress, stall_s: float) -> Reply:
        record, error = AnswerRecord(), ""
        async with aclosing(self.server.post(COMPLETIONS, body)) as pieces:
            while True:
                try:
                    async with asyncio.timeout(stall_s if record.last else None):
                        content_type, data = await anext(pieces)
                except StopAsyncIteration:
                    break
                except TimeoutError as silence:
                    raise self.server.silent() from silence
                for token in reader.feed(content_type, data):
                    record.add(token)
                    error = token.error or error
                if record.last is not None:
                    on_progress(progress_of(record))
                if reader.is_done:
                    break
        for token in reader.finish():
            record.add(token)
            error = token.error or error
        return reply_of(record, error)


def _verdict(error: KimiLiteError) -> Verdict:
    """What to do about it. Whatever is no refusal (a lost connection, an answer that broke off, or none) may pass."""
    if not isinstance(error, Refused):
        return "again"
    if (error.retry_after_s or 0.0) > PATIENCE_S:
        return "out"
    if error.status == 429:
        return "out" if "billing" in error.said.lower() else "limited"  # a quota that is used up does not fill again
    if error.status in _OUT:
        return "out"
    return "again" if error.status in _AGAIN else "final"


def _given_up(error: KimiLiteError, num_asked: int, passed_s: float) -> KimiLiteError:
    times = "once" if num_asked == 1 else f"{num_asked} times in {passed_s:.0f} s"
    return KimiLiteError(f"{error.message} It was asked {times}.", "Look at the server, or give another --endpoint.")
