"""What an OpenAI-compatible server streams, as our own tokens: reasoning, content, tool calls by their index, usage.

Servers differ: reasoning comes as `reasoning_content` (vLLM, SGLang, llama-server, Kimi), as `reasoning` (vLLM,
OpenRouter) or inside the content between think tags; usage beside the choices or in the last one; call ids may miss.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_lite.engine.types import FinishReason, Stats, Token
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.stream import END_THINK, THINK, Kind
from kimi_lite.text.tool_calls import ToolCall, is_json_object

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


@dataclass(slots=True)
class _Call:
    """A call as far as it has come."""

    id: str = ""
    name: str = ""
    arguments: str = ""
    num_shown: int = 0  # characters of the arguments
    is_announced: bool = False


class DeltaReader:
    """One answer. `num_calls` is how many calls the conversation had before, for those that come without an id."""

    def __init__(self, request_id: str, num_calls: int = 0, clock_s: Callable[[], float] = time.perf_counter) -> None:
        self._request_id, self._num_calls, self._clock_s = request_id, num_calls, clock_s
        self._began_s = clock_s()
        self._first_s = self._last_s = None
        self._num_deltas = 0
        self._usage: Mapping[str, Any] = {}
        self._think = _ThinkTags()
        self._calls: dict[int, _Call] = {}
        self.reason: str | None = None  # why the server says it ended

    def feed(self, event: Mapping[str, Any]) -> list[Token]:
        """The tokens of one event; KimiLiteError where the event is an error."""
        if event.get("error"):
            raise KimiLiteError(
                f"The server broke off: {message_of(event)}", "What came is kept. Ask again (in a chat: /regen)."
            )
        self._usage = event.get("usage") or self._usage
        tokens: list[Token] = []
        for choice in event.get("choices") or []:
            self._usage = choice.get("usage") or self._usage
            delta = choice.get("delta") or choice.get("message") or {}
            tokens += self._delta(delta)
            self.reason = choice.get("finish_reason") or self.reason
        return tokens

    def finish(self, reason: FinishReason | None = None) -> list[Token]:
        """What was held back, and the last token. `reason` None: as the server said."""
        tokens = [self._token(kind, text) for kind, text in self._think.finish()]
        for index in sorted(self._calls):
            tokens += self._show_call(index) + self._check_call(index)
        own = _REASONS.get(self.reason or "", "stop")
        if own == "stop" and self._calls:
            own = "tool_calls"
        return [*tokens, self._token("content", "", finish_reason=reason or own)]

    def _delta(self, delta: Mapping[str, Any]) -> list[Token]:
        reasoning = _text(delta.get("reasoning_content")) or _text(delta.get("reasoning"))
        content, calls = _text(delta.get("content")), delta.get("tool_calls") or []
        if not (reasoning or content or calls):
            return []
        self._num_deltas += 1
        self._last_s = self._clock_s()
        self._first_s = self._first_s or self._last_s
        tokens = [self._token("reasoning", reasoning)] if reasoning else []
        tokens += [self._token(kind, text) for kind, text in self._think.feed(content)]
        for call in calls:
            self._add_call(call)
        if self._calls:
            tokens += self._show_call(min(self._calls))  # the others when it is complete: at the end
        return tokens

    def _add_call(self, delta: Mapping[str, Any]) -> None:
        index = delta.get("index")
        if not isinstance(index, int):
            is_new = bool(delta.get("id")) and delta["id"] not in [call.id for call in self._calls.values()]
            index = len(self._calls) if is_new or not self._calls else max(self._calls)
        call, function = self._calls.setdefault(index, _Call()), delta.get("function") or {}
        call.id, call.name = call.id or _text(delta.get("id")), call.name or _text(function.get("name"))
        arguments = function.get("arguments")
        call.arguments += arguments if isinstance(arguments, str) else ""

    def _show_call(self, index: int) -> list[Token]:
        """What is new of a call."""
        call = self._calls[index]
        if not call.name:
            return []
        place = sorted(self._calls).index(index)
        tokens = []
        if not call.is_announced:
            call.id = call.id or f"functions.{call.name}:{self._num_calls + place}"
            tokens.append(self._token("tool_call", "", call=ToolCall(call.id, call.name), call_index=place))
            call.is_announced = True
        text = call.arguments[call.num_shown :]
        call.num_shown = len(call.arguments)
        return [*tokens, self._token("tool_call", text, call_index=place)] if text else tokens

    def _check_call(self, index: int) -> list[Token]:
        """The end of a call: empty arguments are an empty object, what is no object is said to be none."""
        call, place = self._calls[index], sorted(self._calls).index(index)
        if not call.name:
            return [self._token("tool_call", "", error=f"Tool call {call.id!r} cannot be used: it names no tool.")]
        if not call.arguments.strip():
            return [self._token("tool_call", "{}", call_index=place)]
        if is_json_object(call.arguments):
            return []
        error = f"Tool call {call.id} has arguments that are not a JSON object (malformed, or cut off)."
        return [self._token("tool_call", "", call_index=place, error=error)]

    def _token(self, kind: Kind, text: str, finish_reason: FinishReason | None = None, **more: Any) -> Token:
        return Token(self._request_id, None, text, kind, finish_reason, self._stats(), **more)

    def _stats(self) -> Stats:
        """From the server's usage; without it an answer has as many tokens as there were pieces, nearly always
        right."""
        usage, details = self._usage, self._usage.get("prompt_tokens_details") or {}
        until_first_s = (self._first_s or self._clock_s()) - self._began_s
        return Stats(
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            cached_tokens=int(details.get("cached_tokens") or usage.get("cached_tokens") or 0),
            prompt_s=until_first_s if usage.get("prompt_tokens") else 0.0,
            generated_tokens=int(usage.get("completion_tokens") or self._num_deltas),
            generation_s=(self._last_s - self._first_s)
            if self._first_s is not None and self._last_s is not None
            else 0.0,
            time_to_first_token_s=until_first_s,
        )


class _ThinkTags:
    """Content that begins with `<think>` is reasoning up to `</think>`: servers without a reasoning parser send it
    so."""

    def __init__(self) -> None:
        self._held = ""
        self._state: str = "start"  # then "reasoning" or "content"

    def feed(self, text: str) -> list[tuple[Kind, str]]:
        self._held += text
        if self._state == "start":
            if THINK.startswith(self._held.lstrip()) and len(self._held.lstrip()) < len(THINK):
                return []
            is_thinking = self._held.lstrip().startswith(THINK)
            self._state = "reasoning" if is_thinking else "content"
            self._held = self._held.lstrip().removeprefix(THINK) if is_thinking else self._held
        if self._state == "reasoning":
            reasoning, end, rest = self._held.partition(END_THINK)
            if end:
                self._state, self._held = "content", rest
                return [*_piece("reasoning", reasoning), *self.feed("")]
            size = next((n for n in range(len(END_THINK) - 1, 0, -1) if self._held.endswith(END_THINK[:n])), 0)
            shown, self._held = self._held[: len(self._held) - size], self._held[len(self._held) - size :]
            return _piece("reasoning", shown)
        shown, self._held = self._held, ""
        return _piece("content", shown)

    def finish(self) -> list[tuple[Kind, str]]:
        held, self._held = self._held, ""
        return _piece("reasoning" if self._state == "reasoning" else "content", held)


def _piece(kind: Kind, text: str) -> list[tuple[Kind, str]]:
    return [(kind, text)] if text else []


def _text(value: object) -> str:
    """A string that can be encoded; servers may send halves of surrogate pairs, null, or parts."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = "".join(part.get("text", "") for part in value if isinstance(part, Mapping))
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def message_of(body: object) -> str:
    """What a server says about an error, whichever way it says it."""
    if isinstance(body, Mapping):
        for key in ("error", "message", "detail", "error_msg"):
            if body.get(key):
                return message_of(body[key])
    text = " ".join((body if isinstance(body, str) else str(body)).split())
    return text if len(text) <= 300 else text[:299] + "…"
