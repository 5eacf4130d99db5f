"""What an OpenAI-compatible server streams, as our own tokens: reasoning, content, tool calls, usage.

Servers differ: reasoning comes as `reasoning_content` (vLLM, SGLang, llama-server, Kimi), as `reasoning` (vLLM,
OpenRouter) or inside the content, between think tags or up to a `</think>` whose beginning the server's template wrote;
calls come as deltas (`text.call_deltas`) or inside the text in Kimi's markers, which a server without a parser passes
on; usage next to the choices or in the last one.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kimi_lite.engine.types import FinishReason, Stats, Token
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.call_deltas import CallDeltas
from kimi_lite.text.stream import KIMI, Piece, TextParser
from kimi_lite.units import one_line

_REASONS: dict[str, FinishReason] = {
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "tool_call": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
}  # every other is "stop"
_FAILURES = {  # reasons that are no end of an answer
    "error": "it gave an error as the reason",
    "abort": "it gave up the answer",
    "content_filter": "its content filter ended the answer",
    "insufficient_system_resource": "it was overloaded",
}
AGAIN = "Ask again (in a chat: /regen)."
MAX_SAID = 300  # characters of a server's error that are shown


class DeltaReader:
    """One answer.

    `num_calls` is how many calls the conversation had before, `tools` what was declared. With `is_thinking` content up
    to a bare `</think>` is reasoning. `opens_thinking` says whether the server's answers begin so, None: not known yet;
    the attribute says at the end what was learned. Unless it is known, content may have to be taken back
    (`Token.unsaid`), or, with `is_held`, is not given out before that is decided.
    """

    def __init__(
        self,
        request_id: str,
        num_calls: int = 0,
        clock_s: Callable[[], float] = time.perf_counter,
        tools: Sequence[Mapping] = (),
        is_thinking: bool = True,
        opens_thinking: bool | None = None,
        is_held: bool = False,
    ) -> None:
        self._request_id, self._clock_s = request_id, clock_s
        self._began_s = clock_s()
        self._first_s = self._last_s = None
        self.num_deltas = 0  # pieces that said something
        self._usage: Mapping[str, Any] = {}
        self.opens_thinking = opens_thinking
        self._is_assumed = is_thinking and bool(opens_thinking)
        self._parser = TextParser(
            KIMI if tools else None,
            has_think=True,
            starts_in_reasoning=self._is_assumed,
            tools=tools,
            num_calls=num_calls,
            knows_bare_end=is_thinking,
        )
        self._is_in_field = False  # the last text came in a field for reasoning
        self._assumed: list[str] = []  # reasoning that only the assumption says is such
        self._held: list[Piece] | None = [] if is_held and is_thinking and opens_thinking is None else None
        self._spelled: list[Piece] = []  # calls written in markers: shown at the end, where they are no others' echo
        self._calls, self._has_calls = CallDeltas(tools, num_calls), False
        self.reason: str | None = None  # why the server says it ended
        self.is_done = False  # [DONE] came; what follows is not read
        self.has_choices = False  # something came in the form of the API

    def feed(self, event: Mapping[str, Any]) -> list[Token]:
        """The tokens of one event; KimiLiteError where the event is an error, or nothing that the API has."""
        self._require_no_error(event)
        self._count(event.get("usage"))
        tokens: list[Token] = []
        for choice in _list(event, "choices"):
            if not isinstance(choice, Mapping):
                raise _malformed("a choice", choice)
            self.has_choices = True
            if choice.get("index") not in (None, 0, "0"):
                continue  # one answer was asked for
            self._count(choice.get("usage"))
            delta = choice.get("delta")
            if not delta and not self.num_deltas:  # a server that does not stream, or repeats the answer at its end
                delta = choice.get("message")
            if delta and not isinstance(delta, Mapping):
                raise _malformed("a delta", delta)
            tokens += self._delta(delta or {})
            reason = choice.get("finish_reason")
            self.reason = reason if isinstance(reason, str) and reason else self.reason
        return tokens

    @property
    def is_counted(self) -> bool:
        """Whether the server said how many tokens there are."""
        return bool(_number(self._usage.get("completion_tokens")))

    @property
    def hint(self) -> str:
        """What to do when an answer breaks off."""
        return f"What came is kept. {AGAIN}" if self.num_deltas else AGAIN

    def failure(self) -> KimiLiteError | None:
        """For an answer whose end the server calls a failure."""
        said = _FAILURES.get((self.reason or "").lower())
        return KimiLiteError(f"The server broke off: {said}.", self.hint) if said else None

    def rest(self) -> list[Token]:
        """What was held back of an answer that broke off."""
        return [self._token(piece) for piece in self._released(self._texts(self._parser.finish()), is_last=True)]

    def finish(self, reason: FinishReason | None = None) -> list[Token]:
        """What was held back, and the last token. `reason` None: as the server said."""
        own = _REASONS.get(self.reason or "", "stop")
        pieces = self._parser.finish()
        texts = self._texts(pieces)
        if self._assumed and own != "length" and reason is None:  # the assumption was wrong: no thinking ended
            said = "".join(self._assumed)
            texts.append(Piece("content", said, unsaid=said))
            self.opens_thinking = False
        elif self._parser.may_be_reasoning and own != "length" and reason is None:
            self.opens_thinking = False
        calls = self._calls.finish()
        spelled = _renumbered(self._spelled, self._parser.tool_calls, self._calls.tool_calls)
        tokens = [self._token(piece) for piece in [*self._released(texts, is_last=True), *calls, *spelled]]
        has_calls = bool(self._calls.tool_calls or any(piece.call for piece in spelled))
        if own != "length":
            own = "tool_calls" if has_calls else "stop"
        return [*tokens, self._token(Piece("content"), finish_reason=reason or own)]

    def _require_no_error(self, event: Mapping[str, Any]) -> None:
        is_said = bool(event.get("detail") or event.get("error_msg")) or isinstance(event.get("message"), str)
        is_other = not event.get("choices") and not event.get("usage") and is_said
        if event.get("error") or is_other:
            raise KimiLiteError(f"The server broke off: {message_of(event)}", self.hint)

    def _count(self, usage: object) -> None:
        self._usage = usage if isinstance(usage, Mapping) and usage else self._usage

    def _delta(self, delta: Mapping[str, Any]) -> list[Token]:
        reasoning = next((text for key in ("reasoning_content", "reasoning") if (text := _text(delta.get(key)))), "")
        content = _text(delta.get("content")) or _text(delta.get("refusal"))
        calls = delta.get("tool_calls") or (delta.get("function_call") if not self._has_calls else None)
        self._has_calls = self._has_calls or bool(delta.get("tool_calls"))
        if not (reasoning or content or calls):
            return []
        self.num_deltas += 1
        self._last_s = self._clock_s()
        self._first_s = self._first_s or self._last_s
        pieces: list[Piece] = []
        if reasoning:
            pieces += self._parser.enter("reasoning") + self._parser.feed_text(reasoning)
            self._is_in_field, self._is_assumed, self._assumed = True, False, []
        if content:
            if self._is_in_field:
                pieces += self._parser.enter("content")
                self._is_in_field = False
            pieces += self._parser.feed_text(content)
        texts = self._texts(pieces)
        shown = self._calls.feed(calls) if calls else []
        return [self._token(piece) for piece in [*self._released(texts), *shown]]

    def _texts(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces that are no calls; what they teach about the server."""
        self._spelled += [piece for piece in pieces if piece.kind == "tool_call"]
        texts = [piece for piece in pieces if piece.kind != "tool_call"]
        for piece in texts:
            if piece.unsaid:
                self.opens_thinking = True
            elif self._is_assumed and piece.kind == "reasoning":
                self._assumed.append(piece.text)
            elif self._is_assumed:
                self._is_assumed, self._assumed = False, []
        return texts

    def _released(self, texts: list[Piece], is_last: bool = False) -> list[Piece]:
        """What may be given out; content that may be reasoning after all is held, if it is to be."""
        if self._held is None:
            return texts
        self._held += texts
        if self._parser.may_be_reasoning and not is_last:
            return []
        held, self._held = self._held, None
        unsaid = next((piece.unsaid for piece in held if piece.unsaid), "")
        released = []
        for piece in held:
            if piece.unsaid:
                released.append(Piece("reasoning", piece.text))
            elif piece.kind == "content" and unsaid:
                unsaid = unsaid.removeprefix(piece.text)
            else:
                released.append(piece)
        return released

    def _token(self, piece: Piece, finish_reason: FinishReason | None = None) -> Token:
        index, error = (None if piece.call_index < 0 else piece.call_index), piece.error or None
        return Token(
            self._request_id,
            None,
            piece.text,
            piece.kind,
            finish_reason,
            self._stats(),
            call=piece.call,
            call_index=index,
            error=error,
            unsaid=piece.unsaid,
        )

    def _stats(self) -> Stats:
        """From the server's usage; without it an answer has as many tokens as there were pieces, nearly always
        right."""
        usage, details = self._usage, self._usage.get("prompt_tokens_details")
        cached = _number(details.get("cached_tokens")) if isinstance(details, Mapping) else 0
        until_first_s = (self._first_s or self._clock_s()) - self._began_s
        return Stats(
            prompt_tokens=_number(usage.get("prompt_tokens")),
            cached_tokens=cached or _number(usage.get("cached_tokens")),
            prompt_s=until_first_s if _number(usage.get("prompt_tokens")) else 0.0,
            generated_tokens=_number(usage.get("completion_tokens")) or self.num_deltas,
            generation_s=(self._last_s - self._first_s)
            if self._first_s is not None and self._last_s is not None
            else 0.0,
            time_to_first_token_s=until_first_s,
        )


def _renumbered(spelled: Sequence[Piece], calls: Sequence[Any], others: Sequence[Any]) -> list[Piece]:
    """The pieces of calls written in markers, numbered after the `others`; none where these are the same calls."""
    known = {(call.name, call.arguments) for call in others}
    if known and all((call.name, call.arguments) in known for call in calls):
        return []
    first = len(others)
    return [
        Piece("tool_call", p.text, p.call, p.call_index + first if p.call_index >= 0 else -1, p.error) for p in spelled
    ]


def _list(event: Mapping[str, Any], key: str) -> Sequence:
    value = event.get(key) or ()
    if not isinstance(value, (list, tuple)):
        raise _malformed(key, value)
    return value


def _malformed(what: str, value: object) -> KimiLiteError:
    said = one_line(str(value), 80)
    return KimiLiteError(f"The server sent {what} that is a {type(value).__name__}: {said}.", "Is it OpenAI's API?")


def _number(value: object) -> int:
    """A count; 0 for anything else."""
    is_count = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1 << 53
    return int(value) if is_count else 0


def _text(value: object) -> str:
    """A string that can be encoded; servers may send halves of surrogate pairs, null, or parts."""
    if isinstance(value, (list, tuple)):
        texts = [part.get("text") for part in value if isinstance(part, Mapping)]
        value = "".join(text for text in texts if isinstance(text, str))
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def message_of(body: object) -> str:
    """What a server says about an error, in any of the forms that servers use."""
    while isinstance(body, Mapping):
        said = next((body[key] for key in ("error", "message", "detail", "error_msg") if body.get(key)), None)
        if said is None:
            break
        body = said
    if isinstance(body, (list, tuple)) and body and all(isinstance(fault, Mapping) for fault in body):
        body = "; ".join(map(_fault, body))  # as FastAPI lists what is wrong with a request
    return one_line(body if isinstance(body, str) else str(body), MAX_SAID)


def _fault(fault: Mapping[str, Any]) -> str:
    place = fault.get("loc")
    where = ".".join(str(part) for part in place if part != "body") if isinstance(place, (list, tuple)) else ""
    said = fault.get("msg") or fault.get("message") or dict(fault)
    return f"{where}: {said}" if where else str(said)
