"""An engine in a thread of its own, for callers on an asyncio event loop: the server, the swarm.

    service = EngineService(lambda: load("model.gguf", options))
    service.start()                       # loads in the thread
    async for events in service.submit(request): ...

Requests join and leave between two steps. Everything that is for one step's listeners crosses over to the event loop in
one call, so that Python's part of a token stays small. An answer that is closed or dropped is cancelled.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kimi_lite.engine.engine import Engine
from kimi_lite.engine.types import Request, Token
from kimi_lite.errors import KimiLiteError

State = Literal["loading", "ready", "closing", "failed", "closed"]
_RATE_WINDOW_S = 10.0
_SNAPSHOT_S = 1.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a prompt has been read."""

    request_id: str
    done_tokens: int
    total_tokens: int


Event = Token | Progress


class QueueFull(KimiLiteError):
    """Too many requests wait already."""

    def __init__(self, num_waiting: int, retry_after_s: int) -> None:
        super().__init__(
            f"{num_waiting} requests are waiting, which is as many as may.", f"Try again in {retry_after_s} s."
        )
        self.retry_after_s = retry_after_s


class Unavailable(KimiLiteError):
    """The engine is still loading, is closing, or has failed: `state` says which."""

    def __init__(self, state: State, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.state = state


@dataclass(frozen=True, slots=True)
class Load:
    """What goes on now. Rates are of the last ten seconds."""

    num_running: int
    num_waiting: int
    prompt_tok_s: float
    generation_tok_s: float


@dataclass(frozen=True, slots=True)
class Loading:
    """How far the model is loaded."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the engine counted, as of the last second: looked at by its own thread, between two steps."""

    counters: Mapping[str, float] = field(default_factory=dict)
    heat: np.ndarray | None = None  # float32 (layers, experts)


class _Feed:
    """Where the service puts the events of one request: lists of them, then None, or why there are no more."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.started_s = time.monotonic()
        self.queue: asyncio.Queue[list[Event] | BaseException | None] = asyncio.Queue()


class Answer:
    """The events of one request, in groups as they come; the last token has a finish reason. Iterate it once.

    Closing it, or dropping it, before the end cancels the request within a layer's time.
    """

    def __init__(self, feed: _Feed, engine: Engine) -> None:
        self._feed, self._engine, self._is_ended = feed, engine, False

    @property
    def request(self) -> Request:
        return self._feed.request

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> list[Event]:
        if self._is_ended:
            raise StopAsyncIteration
        events = await self._feed.queue.get()
        if isinstance(events, list):
            return events
        self._is_ended = True
        raise StopAsyncIteration if events is None else events

    def close(self) -> None:
        """No more of it is wanted."""
        if not self._is_ended:
            self._is_ended = True
            self._engine.cancel(self.request.id)

    async def aclose(self) -> None:
        """As an asynchronous generator has it."""
        self.close()

    def __del__(self) -> None:
        self.close()


class EngineService:
    """Owns the engine; others use its `tokenizer` and `template` only."""

    def __init__(
        self, open_engine: Callable[[], Engine], max_waiting: int = 64, clock_s=time.monotonic, is_owner: bool = True
    ) -> None:
        """`open_engine` runs in the service's thread; what it does may be told to `on_progress`. max_waiting: requests
        in the queue; more are refused. is_owner: the engine is closed with the service."""
        self._open_engine, self._max_waiting, self._clock_s = open_engine, max_waiting, clock_s
        self._is_owner = is_owner
        self.state: State = "loading"
        self.loading: Loading | None = None
        self.failure: BaseException | None = None
        self.on_failure: Callable[[BaseException], None] = lambda error: (
            None
        )  # once, after loading; by the engine's thread
        self.snapshot = Snapshot()
        self.engine: Engine | None = None  # once loaded
        self.is_ready = threading.Event()  # loaded, or failed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = threading.Condition()
        self._inbox: deque[_Feed] = deque()
        self._listeners: dict[str, _Feed] = {}  # of requests that the engine has; the engine's thread only
        self._num_open = 0  # requests that were taken and have not ended
        self._durations_s: deque[float] = deque(maxlen=32)
        self._totals: dict[str, int] = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0, "requests": 0}
        self._recent: deque[tuple[float, int, int]] = deque()  # (time, prompt tokens, generated tokens)
        self._snapshot_s = -float("inf")
        self._thread = threading.Thread(target=self._run, name="kimi-lite-engine", daemon=True)

    def start(self) -> None:
        """Begin to load; from the event loop that will listen."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """For `open_engine` to say how far it is."""
        self.loading = Loading(stage, done, total)

    def submit(self, request: Request) -> Answer:
        """Put a request into the queue.

        Raises Unavailable, QueueFull, or KimiLiteError where it can never fit. What is found wrong with it later is
        raised by the iteration.
        """
        engine = self.require_ready()
        engine.require_room(request)
        feed = _Feed(request)
        with self._changed:
            num_waiting = self._num_open - (engine.scheduler.max_running or len(engine.scheduler.running))
            if num_waiting >= self._max_waiting:
                raise QueueFull(num_waiting, self._seconds_for(num_waiting))
            self._num_open += 1
            self._totals["requests"] += 1
            self._inbox.append(feed)
            self._changed.notify_all()
        return Answer(feed, engine)

    def require_ready(self) -> Engine:
        """The engine, or Unavailable with the reason."""
        if self.state == "ready":
            return self.engine
        if self.state == "loading":
            raise Unavailable("loading", "The model is still loading.", "Ask /health and try again.")
        if self.state == "failed":
            raise Unavailable(
                "failed", f"The engine has stopped: {_first_line(self.failure)}", "Start the server again."
            )
        raise Unavailable(self.state, "The server is shutting down.")

    def load(self) -> Load:
        """How busy the engine is."""
        engine = self.engine
        num_running = 0 if engine is None else len(engine.scheduler.running)
        with self._changed:
            num_waiting = max(0, self._num_open - num_running)
            now = self._clock_s()
            while self._recent and self._recent[0][0] < now - _RATE_WINDOW_S:
                self._recent.popleft()
            prompt, generated = (sum(entry[i] for entry in self._recent) / _RATE_WINDOW_S for i in (1, 2))
        return Load(num_running, num_waiting, prompt, generated)

    def totals(self) -> Mapping[str, int]:
        """Tokens and requests since the start."""
        with self._changed:
            return dict(self._totals)

    async def close(self, deadline_s: float) -> None:
        """Take no more requests, let those that run end within the deadline, cancel the rest, close the engine. A call
        with a shorter deadline hastens one that waits. A model that is still loading is not waited for."""
        with self._changed:
            if self.state in ("loading", "ready"):
                self.state = "closing"
            self._changed.notify_all()
        until = self._clock_s() + deadline_s
        while self._num_open and self.state == "closing" and self._clock_s() < until:
            await asyncio.sleep(0.02)
        with self._changed:
            self.state = self.state if self.state == "failed" else "closed"
            self._changed.notify_all()
        if self.is_ready.is_set():
            await asyncio.to_thread(self._thread.join)

    def _seconds_for(self, num_waiting: int) -> int:
        """About how long it takes until one of those that wait gets its turn."""
        average_s = sum(self._durations_s) / len(self._durations_s) if self._durations_s else 10.0
        num_parallel = self.engine.scheduler.max_running or max(1, len(self.engine.scheduler.running))
        return max(1, min(600, round(average_s * num_waiting / num_parallel / 2)))

    # The engine's thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.engine = self._open_engine()
            with self._changed:
                self.state = "ready" if self.state == "loading" else self.state
            self.loading = None
            self._look()
        except BaseException as error:
            self._fail(error)
            return
        finally:
            self.is_ready.set()
        try:
            while self._take_inbox():
                self._step()
        except BaseException as error:
            self.on_failure(error)
            self._fail(error)
        finally:
            if self._is_owner:
                self.engine.close()

    def _take_inbox(self) -> bool:
        """Wait for work; hand what came to the engine. False when the service is closed."""
        if self.engine.is_idle or self._clock_s() - self._snapshot_s >= _SNAPSHOT_S:
            self._look()
        with self._changed:
            while self.state != "closed" and not self._inbox and self.engine.is_idle:
                self._changed.wait()
            arrived = [self._inbox.popleft() for _ in range(len(self._inbox))]
            is_closed = self.state == "closed"
        for listener in arrived:
            try:
                self.engine.add(listener.request)
            except Exception as error:  # its sampler, parser or grammar cannot be made
                self._end(listener, error)
            else:
                self._listeners[listener.request.id] = listener
        if is_closed:
            for name in self._listeners:
                self.engine.cancel(name)
            while not self.engine.is_idle:
                self._step()
        return not is_closed

    def _look(self) -> None:
        """The counters belong to the engine's thread; others read the snapshot."""
        self._snapshot_s = self._clock_s()
        self.snapshot = Snapshot(self.engine.counters(), self.engine.model.heat())

    def _step(self) -> None:
        events: dict[str, list[Event]] = {}

        def on_prefill(name: str, done: int, total: int) -> None:
            if name in self._listeners:
                self._deliver([(self._listeners[name], [Progress(name, done, total)])])

        tokens = self.engine.step(on_prefill)
        for token in tokens:
            events.setdefault(token.request_id, []).append(token)
        self._count(tokens)
        self._deliver([(self._listeners[name], group) for name, group in events.items()])
        for name, group in events.items():
            if group[-1].finish_reason is not None:
                self._end(self._listeners.pop(name), None)

    def _count(self, tokens: list[Token]) -> None:
        generated = sum(token.id is not None for token in tokens)
        ended = [token.stats for token in tokens if token.stats.generated_tokens == 1 and token.id is not None]
        prompt = sum(stats.prompt_tokens - stats.cached_tokens for stats in ended)
        with self._changed:
            self._totals["generated_tokens"] += generated
            self._totals["prompt_tokens"] += sum(stats.prompt_tokens for stats in ended)
            self._totals["cached_tokens"] += sum(stats.cached_tokens for stats in ended)
            self._recent.append((self._clock_s(), prompt, generated))

    def _end(self, listener: _Feed, error: BaseException | None) -> None:
        with self._changed:
            self._num_open -= 1
            self._durations_s.append(self._clock_s() - listener.started_s)
        self._deliver([(listener, error)])

    def _deliver(self, items: list[tuple[_Feed, list[Event] | BaseException | None]]) -> None:
        """To the event loop, all at once; a loop that is gone listens no more."""
        if not items:
            return
        try:
            self._loop.call_soon_threadsafe(_put_all, items)
        except RuntimeError:
            return

    def _fail(self, error: BaseException) -> None:
        """The engine is broken: everything that waits for it hears so."""
        with self._changed:
            self.failure, self.state = error, "failed"
            listeners = [*self._listeners.values(), *self._inbox]
            self._listeners.clear()
            self._inbox.clear()
        for listener in listeners:
            self._end(listener, _stopped(error))


def _put_all(items: list[tuple[_Feed, list[Event] | BaseException | None]]) -> None:
    for feed, events in items:
        feed.queue.put_nowait(events)


def _stopped(failure: BaseException | None) -> Unavailable:
    return Unavailable("failed", f"The engine has stopped: {_first_line(failure)}", "Start the server again.")


def _first_line(error: BaseException | None) -> str:
    text = error.message if isinstance(error, KimiLiteError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0]
