"""What happens in a run of a swarm: one frozen dataclass for each kind of event, to and from a line of JSON.

The run emits events; the journal, the live view and the report know a run by its events alone. `t_s` is seconds since
the run began; a resumed run goes on from the last event's. Messages are those of OpenAI's chat API (`role`, `content`,
`reasoning_content`, `tool_calls`, ...). Texts are as models and servers gave them: what shows them makes them
harmless (`kimi_lite.terminal`).
"""

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from kimi_lite.errors import KimiLiteError

ORCHESTRATOR = "orchestrator"  # the agent id of the orchestrator, in events that agents have

State = Literal["queued", "reading", "generating", "tool", "done"]
Outcome = Literal["completed", "failed", "step_limit", "token_limit", "time_limit", "looping", "cancelled"]
ToolOutcome = Literal["completed", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one or more answers."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompts, found in a cache
    generated_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.generated_tokens + other.generated_tokens,
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """Of a whole run."""

    agents: int = 0  # that were started
    steps: int = 0  # of the orchestrator and of all agents
    critical_steps: int = (
        0  # the sum over stages of the orchestrator's steps and the most of any agent's (K2.5's report)
    )
    usage: Usage = Usage()  # of the orchestrator and of all agents
    seconds: float = 0.0
    sequential_s: float = 0.0  # what the same work takes one after the other: the sum of the agents' own busy times

    @property
    def speed_up(self) -> float | None:
        """Over one agent after the other; None where nothing took time."""
        return self.sequential_s / self.seconds if self.seconds > 0 and self.sequential_s > 0 else None


@dataclass(frozen=True, slots=True)
class Event:
    """`is_durable`: resuming a run depends on it, so that it must be on the disk before the run goes on."""

    is_durable: ClassVar[bool] = False

    t_s: float


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    is_durable: ClassVar[bool] = True

    run_id: str
    task: str
    settings: Mapping[str, Any]  # all that a resumed run must know, as JSON
    version: str  # of kimi-lite
    started: str = ""  # date and time, ISO 8601 with the offset


@dataclass(frozen=True, slots=True)
class RunResumed(Event):
    """After a kill; what the events before say is done is not done again."""

    is_durable: ClassVar[bool] = True

    version: str
    started: str = ""


@dataclass(frozen=True, slots=True)
class StageStarted(Event):
    """The calls of one turn of the orchestrator; their agents run at the same time. `index` counts from 0."""

    index: int
    agents: tuple[str, ...]  # agent ids


@dataclass(frozen=True, slots=True)
class StageEnded(Event):
    index: int
    agents: tuple[str, ...]
    critical_steps: int  # of the run, up to here
    slowest: str = ""  # the agent with the most steps: those that count into the critical steps


@dataclass(frozen=True, slots=True)
class AgentCreated(Event):
    """A named configuration, from which any number of agents are started."""

    is_durable: ClassVar[bool] = True

    name: str
    system_prompt: str


@dataclass(frozen=True, slots=True)
class AgentStarted(Event):
    is_durable: ClassVar[bool] = True

    agent_id: str
    name: str  # of its configuration
    prompt: str
    stage: int
    call_id: str  # of the call that started it
    parent: str  # the id of the agent that made the call
    prompt_key: str  # digest of all that determines its work


@dataclass(frozen=True, slots=True)
class AgentProgress(Event):
    """Of the answer that an agent (or the orchestrator) is at. The journal keeps some of them only."""

    agent_id: str
    state: State
    prompt_tokens_done: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    decode_tok_s: float | None = None
    priority: int = 0  # tokens of work that it is expected to have before it: the most goes first


@dataclass(frozen=True, slots=True)
class AgentStep(Event):
    """An answer of an agent is complete. `step` counts from 0."""

    is_durable: ClassVar[bool] = True

    agent_id: str
    step: int
    message: Mapping[str, Any]
    usage: Usage
    finish_reason: str = "stop"
    error: str = ""  # what is wrong with a tool call that could not be read
    seconds: float = 0.0  # that it took, without waiting for its turn


@dataclass(frozen=True, slots=True)
class ToolStarted(Event):
    agent_id: str
    call_id: str
    tool: str
    arguments: str  # shortened


@dataclass(frozen=True, slots=True)
class ToolEnded(Event):
    is_durable: ClassVar[bool] = True

    agent_id: str
    call_id: str
    tool: str
    outcome: ToolOutcome
    result: str  # as the model got it: a resumed run does not call again
    seconds: float


@dataclass(frozen=True, slots=True)
class FileConflict(Event):
    """A write was refused: the file is not what the agent last saw."""

    path: str
    agents: tuple[str, ...]  # ids: the one that was refused, then the one that wrote before; that alone may be unknown


@dataclass(frozen=True, slots=True)
class AgentEnded(Event):
    is_durable: ClassVar[bool] = True

    agent_id: str
    outcome: Outcome
    reason: str  # for people and for the orchestrator; "" where it completed
    result: str  # whole
    usage: Usage  # of all its steps
    steps: int
    critical_steps: int = 0  # more than its steps where it started agents itself


@dataclass(frozen=True, slots=True)
class OrchestratorStep(Event):
    """An answer of the orchestrator is complete. `step` counts from 0."""

    is_durable: ClassVar[bool] = True

    step: int
    message: Mapping[str, Any]
    usage: Usage
    finish_reason: str = "stop"  # "plan": not asked for, a plan fixes it
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Warned(Event):
    text: str


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    is_durable: ClassVar[bool] = True

    outcome: Outcome
    answer: str
    totals: Totals
    reason: str = ""  # where it did not complete


Listener = Callable[[Event], None]

KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        RunStarted,
        RunResumed,
        StageStarted,
        StageEnded,
        AgentCreated,
        AgentStarted,
        AgentProgress,
        AgentStep,
        ToolStarted,
        ToolEnded,
        FileConflict,
        AgentEnded,
        OrchestratorStep,
        Warned,
        RunEnded,
    )
}


class Emitter:
    """Gives events to listeners: in one order for all, whatever thread they come from, with times that never fall.

    emitter = Emitter([journal, view])
    emitter.emit(lambda t_s: Warned(t_s, "one endpoint is slow"))
    """

    def __init__(
        self, listeners: Sequence[Listener], start_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`start_s` is the time of the last event of a run that is resumed."""
        self._listeners, self._clock = list(listeners), clock
        self._zero_s = clock() - start_s
        self._lock = threading.RLock()

    def begin(self, start_s: float) -> None:
        """The run begins now, or goes on: what was before, loading a model, is no part of its time."""
        self._zero_s = self._clock() - start_s

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._zero_s

    def emit(self, make: Callable[[float], Event]) -> Event:
        """`make` gets the event's time. A listener that cannot go on (a full disk) is heard of by the others, once, and
        the run goes on without it."""
        with self._lock:
            event = make(round(self.now_s, 4))
            for listener in tuple(self._listeners):
                try:
                    listener(event)
                except KimiLiteError as error:
                    self._listeners.remove(listener)
                    text = f"{error.message} The run goes on; what is not written is done again if it is resumed."
                    self.emit(lambda t_s, text=text: Warned(t_s, text))
        return event


def to_line(event: Event) -> str:
    """One line of JSON in ASCII, without its end: what is no character, or ends a line, is escaped; a number that JSON
    does not have is null."""
    content = {"event": type(event).__name__, **asdict(event)}
    try:
        return json.dumps(content, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), separators=(",", ":"), allow_nan=False)


def from_line(line: str | bytes) -> Event | None:
    """The event; None for one of a kind that only newer versions know. ValueError for what is no event.

    Unknown fields are left out, missing ones get their defaults where they have one.
    """
    try:
        content = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict) or not isinstance(content.get("event"), str):
        raise ValueError("not an event")
    kind = KINDS.get(content["event"])
    return None if kind is None else _read(kind, content)


def _read(kind: type, content: object) -> Any:
    """A dataclass of what JSON holds of it; ValueError where a value has another type."""
    if not isinstance(content, dict):
        raise ValueError(f"{kind.__name__} is {content!r:.80}")
    hints = get_type_hints(kind)
    given = {}
    for field in fields(kind):
        if field.name in content:
            given[field.name] = _value(hints[field.name], content[field.name], f"{kind.__name__}.{field.name}")
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _value(wanted: Any, value: Any, name: str) -> Any:
    origin = get_origin(wanted)
    if isinstance(wanted, UnionType):
        if value is None and NoneType in get_args(wanted):
            return None
        (wanted,) = (one for one in get_args(wanted) if one is not NoneType)
    elif origin is Literal:  # newer versions may know more words
        wanted = str
    elif origin is tuple:
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return tuple(value)
        raise ValueError(f"{name} is {value!r:.80}")
    elif origin is not None:
        wanted = dict
    elif isinstance(wanted, type) and hasattr(wanted, "__dataclass_fields__"):
        return _read(wanted, value)
    allowed = (int, float) if wanted is float else wanted
    if not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{name} is {value!r:.80}")
    return float(value) if wanted is float else value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
