"""One agent's work: ask the model, run the calls it makes, give the results back, until there is an answer or a limit.

    ending = await Agent(work, id, messages, tools, limits).run()

The orchestrator is an agent too, whose tools start others (`orchestrator`). What the journal of a resumed run knows is
not asked again (`replay`).
"""

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

from kimi_lite.apps.swarm.backend import Backend, ChatProgress, ChatSettings, Message, Reply
from kimi_lite.apps.swarm.events import (
    ORCHESTRATOR,
    AgentProgress,
    AgentStep,
    Emitter,
    OrchestratorStep,
    Outcome,
    State,
    Usage,
    Warned,
)
from kimi_lite.apps.swarm.replay import Replay
from kimi_lite.apps.swarm.settings import Limits, SwarmSettings
from kimi_lite.apps.swarm.turnstile import Turnstile
from kimi_lite.apps.tools.tool import UNUSABLE_CALL
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.loop_guard import LoopGuard, LoopLimits
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.tool_calls import ToolCall

MOST_UNUSABLE = 3  # calls in a row that cannot be read
PROGRESS_S = 0.1  # between two events of an agent whose state stays the same
_ORCHESTRATOR_PRIORITY = 1 << 40  # every agent of its next stage waits for it
_CHARS_PER_TOKEN = 4  # of a prompt that was not counted yet
_FULLER = (
    "[Your last message is all that the agent who gave you this task gets to see, and it is very short. Write a "
    "fuller summary of what you did, what you found and where it is; if there is nothing to add, repeat it.]"
)
_SILENT = "[You said nothing. Answer the task now; your last message is your result.]"
_STOPPED = "the run was stopped"
_OUT_OF_BUDGET = "the whole run may generate no more than {tokens:,} tokens"


class Results(NamedTuple):
    """What came of an answer's calls."""

    texts: Sequence[str]  # one for each call, in their order
    seconds: float = 0.0  # that the agent itself worked at them: other agents' work is their own
    critical_steps: int = 0  # of the agents that were started: the most of any


class Tools(Protocol):
    """What an agent can call."""

    @property
    def declarations(self) -> Sequence[Message]:
        """As the OpenAI API declares them; the same ones in the same order each time."""

    def starts_agents(self, calls: Sequence[ToolCall]) -> bool:
        """Whether to run these calls means to wait for other agents."""

    async def run(self, calls: Sequence[ToolCall]) -> Results:
        """Run the calls of one answer. What goes wrong is a text for the model. Cancelled, it leaves nothing
        running."""


@dataclass(slots=True)
class Work:
    """What all agents of a run share."""

    backend: Backend
    settings: SwarmSettings
    answer: AnswerSettings
    emitter: Emitter
    replay: Replay
    turnstile: Turnstile  # for agents; the orchestrator works while none of its agents does
    is_stopping: bool = False  # the run ends early: agents that are cancelled say what they have
    usage: Usage = field(default_factory=Usage)  # of all agents so far, the orchestrator included
    steps: int = 0
    busy_s: float = 0.0  # of all agents, each one's own
    tasks: set[asyncio.Task] = field(default_factory=set)  # agents, and calls of tools that the orchestrator made

    @property
    def is_over_budget(self) -> bool:
        return self.settings.tokens is not None and self.usage.generated_tokens >= self.settings.tokens

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task:
        """A task that ends when the run is stopped."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task


@dataclass(frozen=True, slots=True)
class Ending:
    """How an agent ended. `text`: its result, or what it said last."""

    outcome: Outcome
    text: str
    reason: str = ""
    usage: Usage = field(default_factory=Usage)
    steps: int = 0
    critical_steps: int = 0


class Agent:
    """One agent, for one task. `script` gives answers that are fixed from outside, by the number of the step; where
    the model may not call (`may_call`), only they do."""

    def __init__(
        self,
        work: Work,
        agent_id: str,
        messages: Sequence[Message],
        tools: Tools,
        limits: Limits,
        fuller_below: int = 0,
        script: Callable[[int], Message | None] = lambda step: None,
        may_call: bool = True,
    ) -> None:
        self.id, self.messages, self._tools, self._limits = agent_id, list(messages), tools, limits
        self._work, self._fuller_below, self._script, self._may_call = work, fuller_below, script, may_call
        self._usage, self._busy_s = Usage(), 0.0
        self._steps = self._num_asked = 0  # answers; those that are not the script's
        self._critical_steps = 0
        self._calls: list[tuple[str, str]] = []  # (name, arguments), for the loop guard
        self._text = ""  # of its last whole answer that says something
        self._context_tokens = sum(len(str(message.get("content"))) for message in messages) // _CHARS_PER_TOKEN
        self._deadline = asyncio.timeout(None)
        self._since_s: float | None = None  # since when it works; None: it waits
        self.draft = ""  # what it has said of an answer that is not complete
        self._progress = AgentProgress(-1.0, agent_id, "queued")
        self.is_waiting_for_calls = False
        self._has_place = False  # at the turnstile

    async def run(self) -> Ending:
        """Work to the end. Cancelled while the run is stopping, it ends with what it has."""
        try:
            async with self._deadline:
                await self._take_place()
                return await self._follow_calls()
        except TimeoutError:
            if not self._deadline.expired():
                raise
            return self._ending("time_limit", f"it worked for {self._limits.seconds:g} s, which is its limit")
        except asyncio.CancelledError:
            if not self._work.is_stopping:
                raise
            return self._ending("cancelled", _STOPPED)
        except KimiLiteError as error:
            return self._ending("failed", str(error))
        finally:
            self._give_place_back()
            self._say("done")

    async def answer_now(self, request: str) -> Reply | None:
        """One more answer, without calls and outside the limits: the last word of a run that ends early. None where
        there is none to be had. The journal does not keep it as a step: a resumed run does not end here."""
        messages = [*self.messages, {"role": "user", "content": request}]
        try:
            reply = await self._work.backend.chat(
                messages, self._declarations, self._settings(may_call=False), self._show
            )
        except KimiLiteError as error:
            text = f"no last answer: {error}"
            self._work.emitter.emit(lambda t_s: Warned(t_s, text))
            return None
        self._work.usage += reply.usage
        return reply

    async def _follow_calls(self) -> Ending:
        num_unusable, was_asked = 0, False
        while (limit := self._limit_reached()) is None:
            reply = await self._next_reply()
            self.messages.append(reply.message)
            calls = calls_of(reply.message)
            text = str(reply.message.get("content") or "").strip()
            self._text = text or self._text
            num_unusable = num_unusable + 1 if reply.error and not calls else 0
            if reply.finish_reason not in ("stop", "tool_calls", "plan"):
                self.draft = text if reply.finish_reason == "length" else ""
                return self._cut_off(reply)
            if reply.finish_reason != "plan" and self._repeats(calls):
                return self._ending("looping", f"it called {calls[-1].name} again and again with the same arguments")
            if num_unusable == MOST_UNUSABLE:
                return self._ending("failed", f"{num_unusable} calls in a row could not be used: {reply.error}")
            if calls:
                await self._answer_calls(calls)
            elif reply.error:
                self._tell(UNUSABLE_CALL.format(error=reply.error))
            elif was_asked or not self._is_too_short(text):
                return self._ending("completed") if text else self._ending("failed", "it said nothing")
            else:
                was_asked = True
                self._tell(_FULLER if text else _SILENT)
        return limit

    def _limit_reached(self) -> Ending | None:
        if self._work.is_stopping:
            return self._ending("cancelled", _STOPPED)
        steps, tokens = self._limits.steps, self._limits.tokens
        if self._num_asked >= steps:
            return self._ending("step_limit", f"it did not come to an end within {steps} steps; split its task")
        if tokens is not None and self._usage.generated_tokens >= tokens:
            return self._ending("token_limit", f"it generated {self._usage.generated_tokens:,} tokens of {tokens:,}")
        if self._work.is_over_budget:
            return self._ending("token_limit", _OUT_OF_BUDGET.format(tokens=self._work.settings.tokens))
        return None

    async def _next_reply(self) -> Reply:
        """From the journal, from the script, or from the model."""
        if known := self._work.replay.step(self.id, self._steps):
            reply = Reply(known.message, known.finish_reason, known.usage, known.error)
            self._busy_s += known.seconds
        elif (said := self._script(self._steps)) is not None:
            reply = Reply(said, "plan", Usage())
            self._keep(reply, 0.0)
        else:
            reply, seconds = await self._ask()
            self._keep(reply, seconds)
        self._usage += reply.usage
        self._work.usage += reply.usage
        self._context_tokens = reply.usage.prompt_tokens + reply.usage.generated_tokens or self._context_tokens
        self._steps += 1
        if reply.finish_reason != "plan":
            self._num_asked += 1
            self._critical_steps += 1
            self._work.steps += 1
        return reply

    async def _ask(self) -> tuple[Reply, float]:
        """The model's answer, and the seconds that it took without those in which it waited for its turn."""
        settings = self._settings(self._may_call)
        before_s = self._busy_s
        try:
            reply = await self._work.backend.chat(self.messages, self._declarations, settings, self._show)
        finally:
            self._stop_clock()
        self.draft = ""
        return replace(reply, message=self._with_own_ids(well_formed(reply.message))), self._busy_s - before_s

    async def _answer_calls(self, calls: Sequence[ToolCall]) -> None:
        self._say("tool")
        before_s, waits = self._busy_s, self._tools.starts_agents(calls)
        if waits:
            self._give_place_back()
        else:
            self._start_clock()
        self.is_waiting_for_calls = True
        try:
            results = await self._tools.run(calls)
        finally:
            self.is_waiting_for_calls = False
            self._stop_clock()
        if waits:
            await self._take_place()
        self._busy_s = before_s + results.seconds
        self._critical_steps += results.critical_steps
        if not self._work.backend.can_call:  # a plan's calls: the model knows of none
            self.messages.pop()
            self._tell("\n\n".join(results.texts))
            return
        for call, text in zip(calls, results.texts, strict=True):
            self.messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text})

    async def _take_place(self) -> None:
        if self.id != ORCHESTRATOR:
            self._say("queued")
            await self._work.turnstile.enter(self._priority)
            self._has_place = True

    def _give_place_back(self) -> None:
        if self._has_place:
            self._has_place = False
            self._work.turnstile.leave()

    @property
    def _declarations(self) -> Sequence[Message]:
        return self._tools.declarations if self._work.backend.can_call else ()

    def _settings(self, may_call: bool) -> ChatSettings:
        return ChatSettings(self._work.answer, self.id, self._priority, may_call)

    @property
    def _priority(self) -> int:
        """What is expected to be before it, in tokens: as much as is behind it. Of two agents the one that has worked
        for longer is the likelier to be its stage's slowest; one that has not begun has its prompt before it."""
        return _ORCHESTRATOR_PRIORITY if self.id == ORCHESTRATOR else self._context_tokens

    def _keep(self, reply: Reply, seconds: float) -> None:
        step = self._steps, reply.message, reply.usage, reply.finish_reason, reply.error, round(seconds, 4)
        if self.id == ORCHESTRATOR:
            self._work.emitter.emit(lambda t_s: OrchestratorStep(t_s, *step))
        else:
            self._work.emitter.emit(lambda t_s: AgentStep(t_s, self.id, *step))

    def _cut_off(self, reply: Reply) -> Ending:
        """An answer that did not end by itself."""
        reasons: Mapping[str, tuple[Outcome, str]] = {
            "repetition": ("looping", "its answer repeats itself"),
            "length": ("token_limit", "its answer was cut off at its limit of tokens, or the context is full"),
        }
        outcome, reason = reasons.get(reply.finish_reason, ("failed", f"its answer ended as {reply.finish_reason!r}"))
        return self._ending(outcome, reason)

    def _repeats(self, calls: Sequence[ToolCall]) -> bool:
        made = [(call.name, call.arguments) for call in calls]
        guard = LoopGuard(LoopLimits(), self._calls)
        self._calls += made
        return guard.repeats_calls(made)

    def _is_too_short(self, text: str) -> bool:
        """Whether more is to be asked for: of nothing, or of a few words on work with tools."""
        return not text or (bool(self._calls) and len(text) < self._fuller_below)

    def _with_own_ids(self, message: Message) -> Message:
        """Calls whose ids are missing or were there before get others: results and the journal know calls by them."""
        seen = {call.id for earlier in self.messages for call in calls_of(earlier)}
        calls = []
        for call in message.get("tool_calls") or ():
            call_id = str(call.get("id") or "")
            if not call_id or call_id in seen:
                call_id = f"functions.{call['function']['name']}:{len(seen)}"
                while call_id in seen:
                    call_id += "_"
            seen.add(call_id)
            calls.append({**call, "id": call_id})
        return {**message, "tool_calls": calls} if calls else message

    def _tell(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def _ending(self, outcome: Outcome, reason: str = "") -> Ending:
        self._stop_clock()
        self._work.busy_s += self._busy_s
        self._busy_s = 0.0
        return Ending(outcome, self.draft.strip() or self._text, reason, self._usage, self._steps, self._critical_steps)

    def _start_clock(self) -> None:
        """From here on it works, and does not wait for its turn."""
        if self._since_s is not None:
            return
        self._since_s = self._work.emitter.now_s
        if self._limits.seconds is not None:
            left_s = max(self._limits.seconds - self._busy_s, 0.0)
            self._deadline.reschedule(asyncio.get_running_loop().time() + left_s)

    def _stop_clock(self) -> None:
        if self._since_s is None:
            return
        self._busy_s += self._work.emitter.now_s - self._since_s
        self._since_s = None
        if self._limits.seconds is not None and not self._deadline.expired():
            self._deadline.reschedule(None)

    def _show(self, progress: ChatProgress) -> None:
        if progress.state == "queued":
            self._stop_clock()
        else:
            self._start_clock()
        self.draft = progress.text
        self._say(
            progress.state,
            prompt_tokens_done=progress.prompt_tokens_done,
            prompt_tokens=progress.prompt_tokens,
            cached_tokens=progress.cached_tokens,
            generated_tokens=progress.generated_tokens,
            decode_tok_s=progress.decode_tok_s,
        )

    def _say(self, state: State, **more: Any) -> None:
        last, now_s = self._progress, self._work.emitter.now_s
        if state == last.state and now_s - last.t_s < PROGRESS_S:
            return
        self._progress = AgentProgress(now_s, self.id, state, priority=self._priority, **more)
        self._work.emitter.emit(lambda t_s: replace(self._progress, t_s=t_s))


def well_formed(value: Any) -> Any:
    """A message, or arguments, without lone surrogates: no tokenizer and no server takes them."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {well_formed(key): well_formed(each) for key, each in value.items()}
    return [well_formed(each) for each in value] if isinstance(value, list | tuple) else value


def calls_of(message: Message) -> list[ToolCall]:
    """The calls of an assistant's message."""
    return [
        ToolCall(str(call.get("id") or ""), str(call["function"]["name"]), str(call["function"].get("arguments") or ""))
        for call in message.get("tool_calls") or ()
    ]


def prompt_key(work: Work, messages: Sequence[Message], tools: Tools) -> str:
    """A digest of all that determines what an agent says: the model, how it answers, messages and tools."""
    determining = [work.backend.identity, work.answer.to_json(), list(messages), list(tools.declarations)]
    return blake2b(json.dumps(determining, sort_keys=True).encode(), digest_size=16).hexdigest()
