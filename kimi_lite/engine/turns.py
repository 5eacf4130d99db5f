"""What was said, as records: a `Turn` is one message with, for an answer, the ids that were sampled and how it went.

Turns are the truth of a conversation. `engine.conversation` keeps them, `to_message` makes what a chat template or an
OpenAI endpoint reads, `to_json` what a session file holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from kimi_lite.engine.types import FinishReason, Stats, Token
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.placeholders import is_shown
from kimi_lite.text.tool_calls import ToolCall

Role = Literal["user", "assistant", "tool"]
Content = str | list[dict[str, Any]]  # text, or OpenAI content parts


def now() -> str:
    """This moment as sessions write it: ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. What only answers or only tool results have is empty for the others."""

    role: Role
    content: Content = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()  # complete ones, in order
    call_id: str = ""  # of a tool result: the call it answers
    name: str = ""  # of a tool result: the tool
    is_thinking: bool = False  # of an answer: its mode
    ids: tuple[int, ...] = ()  # sampled
    lead_ids: tuple[int, ...] = ()  # the last ids of the prompt that was answered
    finish_reason: FinishReason | None = None
    stats: Stats | None = None
    created: str = field(default_factory=now)

    @property
    def text(self) -> str:
        """The content without its images."""
        return text_of(self.content)

    @property
    def says_something(self) -> bool:
        """Whether the next prompt has a place for it: reasoning alone, stopped before the answer, has none."""
        return self.role != "assistant" or bool(self.content or self.calls)

    def to_message(self) -> dict[str, Any]:
        """The turn as the OpenAI API writes it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.role == "assistant":
            message["reasoning_content"] = self.reasoning
        if self.calls:
            function = [{"name": call.name, "arguments": call.arguments} for call in self.calls]
            pairs = zip(self.calls, function, strict=True)
            message["tool_calls"] = [{"id": call.id, "type": "function", "function": f} for call, f in pairs]
        if self.role == "tool":
            message |= {"tool_call_id": self.call_id, "name": self.name}
        return message

    def without_ids(self) -> "Turn":
        """For another vocabulary."""
        return replace(self, ids=(), lead_ids=())

    def to_json(self) -> dict[str, Any]:
        """Everything but what is empty anyway."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value not in ("", (), None, False) or name == "content"
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Turn":
        """The turn that `to_json` wrote; ValueError, TypeError or KeyError for anything else."""
        if value["role"] not in get_args(Role) or not isinstance(value["content"], (str, list)):
            raise ValueError(f"a turn of role {value['role']!r} with content of type {type(value['content']).__name__}")
        ids = {name: tuple(map(int, value.get(name, ()))) for name in ("ids", "lead_ids")}
        calls = tuple(ToolCall(**call) for call in value.get("calls", ()))
        stats = Stats(**value["stats"]) if value.get("stats") else None
        return cls(**{**value, **ids, "calls": calls, "stats": stats})


@dataclass(slots=True)
class AnswerRecord:
    """Collects an answer's tokens into its turn."""

    texts: dict[str, str] = field(default_factory=lambda: {"reasoning": "", "content": "", "tool_call": ""})
    ids: list[int] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    last: Token | None = None

    def add(self, token: Token) -> None:
        self.last = token
        if token.unsaid:
            other = "content" if token.kind == "reasoning" else "reasoning"
            self.texts[other] = self.texts[other].removeprefix(token.unsaid)
        self.texts[token.kind] += token.text
        if token.id is not None:
            self.ids.append(token.id)
        if token.call_index is None:
            return
        if token.call and token.call_index == len(self.calls):
            self.calls.append(token.call)
        elif token.call:  # as it is after all
            self.calls[token.call_index] = token.call
        else:
            call = self.calls[token.call_index]
            self.calls[token.call_index] = replace(call, arguments=call.arguments + token.text)

    def to_turn(self, is_thinking: bool, lead_ids: Sequence[int]) -> Turn | None:
        """The record; None where the model said nothing at all. Calls that were cut off are not kept."""
        if not self.ids and not any(self.texts.values()) and not self.calls:
            return None
        assert self.last is not None
        is_whole = self.last.finish_reason == "tool_calls"
        return Turn(
            "assistant",
            self.texts["content"],
            self.texts["reasoning"],
            calls=tuple(self.calls) if is_whole else (),
            is_thinking=is_thinking,
            ids=tuple(self.ids),
            lead_ids=tuple(lead_ids),
            finish_reason=self.last.finish_reason or "cancelled",  # the reader of the tokens went away
            stats=self.last.stats,
        )


def text_of(content: Content) -> str:
    """The text of a message without its images."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content if part.get("type") == "text")


def num_images(content: Content) -> int:
    """Images and videos."""
    return 0 if isinstance(content, str) else sum(map(is_shown, content))


def require_utf8(text: str, what: str = "The message") -> None:
    """Refuse text with bytes that were not UTF-8 when it was read (Python keeps them as lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise KimiLiteError(
            f"{what} is not UTF-8 text: byte 0x{byte:02X} after {error.start:,} characters.",
            "Try iconv -f LATIN1 -t UTF-8.",
        ) from error
