"""Who answers in a swarm: one question in (messages, tools), one whole reply out, however many are asked at once.

`local.LocalBackend` asks an engine in this process, where all agents are sequences of one batch; `remote` asks
OpenAI-compatible servers. The loops of agents (`agent`) see this protocol only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from kimi_lite.apps.swarm.events import ORCHESTRATOR, Usage
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.turns import AnswerRecord
from kimi_lite.engine.types import FinishReason

Message = Mapping[str, Any]  # of OpenAI's chat API


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How one question is to be answered, and whose it is."""

    answer: AnswerSettings = field(default_factory=AnswerSettings)
    agent_id: str = ORCHESTRATOR  # a backend may keep an agent where its earlier prompts are cached
    priority: int = 0  # the tokens of work that its agent is expected to have before it: the most goes first
    may_call: bool = True  # False: the tools stay declared, so that the prompt stays cached, but none may be called

    @property
    def is_orchestrator(self) -> bool:
        """Whether it is the orchestrator that asks, and not one of its agents."""
        return self.agent_id == ORCHESTRATOR


@dataclass(frozen=True, slots=True)
class ChatProgress:
    """How far an answer is. `text`: its content so far, which is kept where the answer is cut off."""

    state: Literal["queued", "reading", "generating"]
    prompt_tokens_done: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    decode_tok_s: float | None = None
    text: str = ""


OnProgress = Callable[[ChatProgress], None]


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer. `message` is an assistant's: `content` (a text), `reasoning_content`, `tool_calls`."""

    message: Message
    finish_reason: FinishReason
    usage: Usage
    error: str = ""  # what is wrong with a tool call that could not be read


class Backend(Protocol):
    """Answers many questions at the same time; used on one event loop, between `open` and `close`."""

    @property
    def name(self) -> str:
        """For people: the model, and where it is."""

    @property
    def identity(self) -> str:
        """What of it determines answers: a run that is resumed does not take the words of another model for its
        own."""

    @property
    def can_call(self) -> bool:
        """Whether the model can be told of tools; known once it is open. If not, it is asked with none."""

    async def open(self) -> None:
        """Load the model, or reach the servers. KimiLiteError where that fails."""

    async def chat(
        self, messages: Sequence[Message], tools: Sequence[Message], settings: ChatSettings, on_progress: OnProgress
    ) -> Reply:
        """Answer. Cancelled (`asyncio.CancelledError`), it stops within a moment, and so does its work.

        KimiLiteError where there is no answer to be had: the prompt is too long, the engine has stopped, a server
        refuses after all retries. `on_progress` is called on the event loop.
        """

    async def close(self) -> None:
        """Stop what still runs and let go of everything; also after an `open` that failed. A second call does
        nothing."""


def progress_of(record: AnswerRecord) -> ChatProgress:
    """How far an answer is whose first token has come."""
    stats = record.last.stats
    return ChatProgress(
        "generating",
        stats.prompt_tokens,
        stats.prompt_tokens,
        stats.cached_tokens,
        stats.generated_tokens,
        stats.generation_tok_s,
        record.texts["content"],
    )


def reply_of(record: AnswerRecord, error: str) -> Reply:
    """Of an answer whose last token has come. `error`: what is wrong with a call of it."""
    last = record.last
    turn = record.to_turn(is_thinking=bool(record.texts["reasoning"]), lead_ids=())
    message = {"role": "assistant", "content": ""} if turn is None else turn.to_message()
    usage = Usage(last.stats.prompt_tokens, last.stats.cached_tokens, last.stats.generated_tokens)
    return Reply(message, last.finish_reason, usage, error)
