"""A conversation with a model, here or behind an endpoint: its turns; asking, undoing, asking again, answering tool
calls, dropping old turns.

`engine.session.Session` answers with a loaded model, `apps.remote.session.RemoteSession` with an OpenAI-compatible
endpoint; both say only how a prompt becomes tokens. `chat` and `run` see nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.turns import AnswerRecord, Content, Turn, now, num_images, require_utf8, text_of
from kimi_lite.engine.types import ModelInfo, Token
from kimi_lite.engine.vision import NO_TOWER_HINT, OnMedia
from kimi_lite.errors import KimiLiteError
from kimi_lite.model.vision.patches import Patches
from kimi_lite.plan.types import Plan
from kimi_lite.text.tool_calls import ToolCall
from kimi_lite.units import counted

OnPrefill = Callable[[str, int, int], None]  # request id, prompt tokens done, prompt tokens in all
SUMMARY_TOKENS = 400  # longest summary
_SUMMARY_REQUEST = (
    "Summarise our conversation so far in at most 200 words, for yourself: what I asked for, what was found or "
    "decided, names, "
    "numbers and open questions. Write the summary only."
)
_SUMMARY_HEADING = "Summary of the earlier conversation:\n"
_NOT_RUN = "Not run: the user went on without it."


@dataclass(frozen=True, slots=True)
class Look:
    """What a person may know of an image or video before it is sent."""

    num_tokens: int
    remark: str  # "the first frame of an animation"; "": nothing
    thumbnail: Patches  # of its first frames


class Conversation(ABC):
    """One user's conversation with one model."""

    info: ModelInfo
    context_length: int | None  # tokens; None: only the other side knows
    max_context_length: int | None = None  # tokens that the model is made for; None: not known, or not ours to choose
    can_think: bool  # whether there is a thinking mode
    can_see: bool  # whether messages may have images
    can_call: bool  # whether it can be told of tools
    can_preserve: bool  # whether past reasoning can stay in the prompt
    on_media: OnMedia | None = None  # told while images and videos are read and looked at
    is_watched: bool = True  # answers are seen as they come; else nothing comes before it is known to be content

    def __init__(self, system: str = "", settings: AnswerSettings | None = None) -> None:
        self.system, self.settings = system, settings or AnswerSettings()
        self.tools: tuple[Mapping[str, Any], ...] = ()  # as declared with the last message
        self.clear()

    @abstractmethod
    def _stream(
        self, messages: list[dict[str, Any]], settings: AnswerSettings, on_prefill: OnPrefill | None, is_turn: bool
    ) -> Generator[Token, None, None]:
        """Answer these messages (system prompt included) with `self.tools`; the last token has a finish reason.

        Raises KimiLiteError before the first token where they cannot be answered. `is_turn`: the answer becomes one.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Stop the answer; from a signal handler or another thread. What it said so far is kept."""

    def count_tokens(self, content: Content | None = None, num_dropped: int | None = None) -> int | None:
        """Tokens of the next prompt, with a message `content` and without the first turns; None where they are
        not known."""
        return None

    def look_at(self, part: Mapping[str, Any]) -> Look | None:
        """An image or a video that is to go with a message; None where only the other side reads it. KimiLiteError
        where it cannot be read."""
        return None

    def count_messages(self, messages: list[dict[str, Any]]) -> int | None:
        """Tokens of a prompt that is not the next one; None where that is not known here."""
        return None

    def pieces(self, ids: Sequence[int]) -> list[str] | None:
        """The text of each token, for people; None where the vocabulary is not here."""
        return None

    def counters(self) -> Mapping[str, float]:
        """What the engine counted since the model was loaded."""
        return {}

    def heat(self) -> np.ndarray | None:
        """(layers, experts): how much each routed expert was used lately; None where that is not counted."""
        return None

    @property
    def plan(self) -> Plan | None:
        """What lies where and how fast it can be; None where the model runs elsewhere."""
        return None

    def lead_ids(self) -> Sequence[int]:
        """The last ids of the prompt that was just answered."""
        return ()

    def model_key(self) -> str:
        """Says whose token ids the turns hold."""
        return self.info.name

    @abstractmethod
    def close(self) -> None:
        """Close the model."""

    def ask(
        self,
        content: Content,
        on_prefill: OnPrefill | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        settings: AnswerSettings | None = None,
    ) -> Generator[Token, None, None]:
        """Send a message, which is a turn at once, and stream the answer. However it ends, what was said stays in the
        conversation.

        `content` is text or OpenAI content parts; `tools` are OpenAI declarations, None: as before; `settings` are for
        this answer only. After finish reason "tool_calls" `pending_calls` wait for `answer_calls`.
        """
        require_utf8(text_of(content))
        require_utf8(self.system, "The system prompt")
        if tools:
            self.require_calls()
        before = list(self.turns)
        self.turns += [Turn("tool", _NOT_RUN, call_id=call.id, name=call.name) for call in self.pending_calls]
        self.turns.append(Turn("user", content if num_images(content) else text_of(content)))
        if tools is not None:
            self.tools = tuple(tools)
        return self._answer(before, settings, on_prefill)

    def answer_calls(
        self,
        results: Sequence[tuple[str, str]],
        on_prefill: OnPrefill | None = None,
        settings: AnswerSettings | None = None,
    ) -> Generator[Token, None, None]:
        """Give the results of pending calls, (call id, text) each, and stream how the model goes on."""
        names = {call.id: call.name for call in self.pending_calls}
        assert results and all(call_id in names for call_id, _ in results), (results, names)
        before = list(self.turns)
        self.turns += [Turn("tool", text, call_id=call_id, name=names[call_id]) for call_id, text in results]
        return self._answer(before, settings, on_prefill)

    def regenerate(
        self, on_prefill: OnPrefill | None = None, settings: AnswerSettings | None = None
    ) -> Generator[Token, None, None]:
        """Answer the last message again; the old answer goes when the new one begins."""
        start = self._last_exchange()
        before = list(self.turns)
        del self.turns[start + 1 :]
        return self._answer(before, settings, on_prefill)

    def add_exchange(self, question: str, answer: str) -> None:
        """What was asked and answered elsewhere, as if it had been here."""
        self.turns += [Turn("user", question), Turn("assistant", answer, finish_reason="stop")]

    def undo(self) -> Content:
        """Take the last message and all that followed back; what the message was."""
        start = self._last_exchange()
        content = self.turns[start].content
        del self.turns[start:]
        return content

    def clear(self) -> None:
        """Begin another conversation; the system prompt and the settings stay."""
        self.created = now()
        self.turns: list[Turn] = []
        self.known_ids: list[int] = []  # of the last prompt and its answer
        self.num_dropped = 0  # of the first turns, which are kept but no longer sent
        self.summary = ""  # of those

    @property
    def pending_calls(self) -> tuple[ToolCall, ...]:
        """Tool calls of the last answer that have no result yet."""
        answered = set()
        for turn in reversed(self.turns):
            if turn.role != "tool":
                return tuple(call for call in turn.calls if call.id not in answered)
            answered.add(turn.call_id)
        return ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What is sent, without the system prompt."""
        return [turn.to_message() for turn in self.turns[self.num_dropped :] if turn.says_something]

    @property
    def exchanges(self) -> list[int]:
        """Where the messages of the user that are still sent stand in `turns`."""
        return [i for i in range(self.num_dropped, len(self.turns)) if self.turns[i].role == "user"]

    def start_after(self, num_exchanges: int) -> int:
        """Where in `turns` what follows the oldest exchanges begins."""
        starts = [*self.exchanges, len(self.turns)]
        assert 0 < num_exchanges < len(starts), (num_exchanges, len(starts))
        return starts[num_exchanges]

    @property
    def mode(self) -> str:
        """The mode and its sampling, for people."""
        return self.settings.describe()

    def set_thinking(self, is_thinking: bool) -> None:
        """Let the model reason before it answers, or not; refused where it cannot."""
        if is_thinking and not self.can_think:
            raise KimiLiteError(f"{self.info.name} has no thinking mode.", "Remove --think, or say /think off.")
        self.settings = self.settings.with_thinking(is_thinking)

    def require_calls(self) -> None:
        """Refuse tools where the model cannot be told of them, or its calls cannot be read."""
        if not self.can_call:
            raise KimiLiteError(
                f"{self.info.name} takes no tools: its chat template declares none, or has calls in markers that are "
                f"not read here.",
                "Remove --tools and --mcp-config.",
            )

    def require_budget(self) -> None:
        """Refuse a thinking budget where thinking cannot be ended from here."""
        if not self.can_think:
            raise KimiLiteError(f"{self.info.name} has no thinking mode.", "Remove the budget.")

    def drop_oldest(self, num_exchanges: int, summary: str = "") -> None:
        """No longer send the oldest exchanges; they stay in the record. `summary` goes to the model in their place."""
        self.num_dropped = self.start_after(num_exchanges)
        self.summary = summary or self.summary

    @property
    def summary_tokens(self) -> int:
        """The longest summary: a quarter of a small context."""
        return SUMMARY_TOKENS if self.context_length is None else min(SUMMARY_TOKENS, max(self.context_length // 4, 1))

    def num_summarisable(self, num_exchanges: int) -> int:
        """How many of the oldest exchanges, at most so many, fit into the context with the request for their
        summary."""
        if self.context_length is None:
            return num_exchanges
        for number in range(num_exchanges, 0, -1):
            turns = self.turns[self.num_dropped : self.start_after(number)]
            need = self.count_messages(self._summary_messages(turns))
            if need is None or need + self.summary_tokens <= self.context_length:
                return number
        return 0

    def can_summarise(self, num_exchanges: int) -> bool:
        """Whether so many of the oldest exchanges can be summarised, if need be one after the other."""
        if num_exchanges == 0 or self.context_length is None:
            return num_exchanges > 0
        starts = [*self.exchanges, len(self.turns)][: num_exchanges + 1]
        for start, end in pairwise(starts):
            need = self.count_messages(self._summary_messages(self.turns[start:end]))
            if need is not None and need + 2 * self.summary_tokens > self.context_length:  # the last and the next one
                return False
        return True

    def summarise_oldest(self, num_exchanges: int, on_prefill: OnPrefill | None = None) -> Generator[Token, None, None]:
        """Have the model sum the oldest exchanges up (the tokens are the summary), then send the summary in their
        place."""
        turns = self.turns[self.num_dropped : self.start_after(num_exchanges)]
        sampling = replace(self.settings.sampling, max_tokens=self.summary_tokens)
        record = AnswerRecord()
        settings = replace(self.settings, is_thinking=False, sampling=sampling)
        for token in self._stream(self._summary_messages(turns), settings, on_prefill, is_turn=False):
            record.add(token)
            yield token
        assert record.last is not None
        if record.last.finish_reason == "cancelled":
            return
        if not record.texts["content"].strip():
            raise KimiLiteError("The model gave an empty summary; nothing was dropped.", "Try /ctx drop.")
        self.drop_oldest(num_exchanges, record.texts["content"].strip())

    def _summary_messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """The request for a summary of these turns and of the summary that stands for those before them."""
        messages = [turn.to_message() for turn in turns if turn.says_something]
        return [*self._system_messages(), *messages, {"role": "user", "content": _SUMMARY_REQUEST}]

    def _answer(
        self, before: list[Turn], settings: AnswerSettings | None, on_prefill: OnPrefill | None
    ) -> Generator[Token, None, None]:
        """Stream the answer to `turns` and write it down. A refusal before its first token leaves the turns as they
        were."""
        settings, record = settings or self.settings, AnswerRecord()
        tokens = self._stream([*self._system_messages(), *self.messages], settings, on_prefill, is_turn=True)
        try:
            self._require_sight()
            for token in tokens:
                record.add(token)
                yield token
        except BaseException:
            if record.last is None:
                self.turns = before
            raise
        finally:
            tokens.close()
            turn = record.to_turn(settings.is_thinking, self.lead_ids())
            if turn is not None:
                self.turns.append(turn)

    def _system_messages(self) -> list[dict[str, Any]]:
        parts = [self.system] if self.system else []
        parts += [_SUMMARY_HEADING + self.summary] if self.summary else []
        return [{"role": "system", "content": "\n\n".join(parts)}] if parts else []

    def _last_exchange(self) -> int:
        exchanges = self.exchanges
        if not exchanges:
            raise KimiLiteError("There is no message yet to take back or to answer again.", "Type one.")
        return exchanges[-1]

    def _require_sight(self) -> None:
        num_seen = sum(num_images(turn.content) for turn in self.turns[self.num_dropped :])
        if num_seen and not self.can_see:
            raise KimiLiteError(
                f"The conversation has {counted(num_seen, 'image')}, and {self.info.name} has no vision tower here.",
                f"{NO_TOWER_HINT} /undo takes the last message back.",
            )
