"""A conversation with a model behind an OpenAI-compatible endpoint: vLLM, SGLang, llama-server, kimi-lite serve, the
vendor.

`kimi-lite chat --endpoint URL` is the same program as without; only this class differs from `engine.session.Session`.
The server has template, tokenizer and cache, so token ids, their number before the answer, and a budget for thinking
are not ours.
"""

import json
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from kimi_lite.apps.remote.deltas import DeltaReader
from kimi_lite.apps.remote.http import MAX_BODY_BYTES, MAX_STREAM_BYTES, Refused, Server, address_of
from kimi_lite.apps.remote.portable import portable, typed_tools
from kimi_lite.apps.remote.sse import EventReader
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.conversation import Conversation, OnPrefill
from kimi_lite.engine.types import ModelInfo, Token
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.tool_calls import declared_names

KEY_VARIABLES = ("KIMI_LITE_API_KEY", "OPENAI_API_KEY")
VENDOR_HOSTS = ("moonshot.ai", "moonshot.cn", "kimi.com")
CONTEXT_KEYS = ("max_model_len", "context_length", "context_window", "n_ctx")
DONE = "[DONE]"


class RemoteSession(Conversation):
    """One user's conversation with a model elsewhere."""

    can_think = can_see = can_call = can_preserve = (
        True  # as far as can be said from here; the server refuses what it has not
    )

    def __init__(
        self, server: Server, model: str, context_length: int | None, system: str, settings: AnswerSettings | None
    ) -> None:
        self.server, self.context_length = server, context_length
        self.info = ModelInfo(model, Path(server.url), 0, ())
        self._is_cancelled = False
        self._refused: set[str] = set()  # optional fields that the server does not know
        self._opens_thinking: bool | None = None  # whether its answers begin inside <think>; None: not known yet
        super().__init__(system, settings)

    @classmethod
    def open(
        cls,
        endpoint: str,
        api_key: str | None = None,
        model: str | None = None,
        system: str = "",
        settings: AnswerSettings | None = None,
    ) -> "RemoteSession":
        """Reach the server and choose the model: the one named, or the only one there is."""
        is_named = bool(address_of(endpoint).user)  # the address itself says who asks
        names = () if is_named else KEY_VARIABLES
        key = api_key or next((os.environ[name] for name in names if os.environ.get(name)), None)
        server = Server(endpoint, key)
        try:
            models = _models(server, is_needed=model is None)
            name = model or _only_model(server, models)
        except BaseException:
            server.close()
            raise
        return cls(server, name, _context_length(models.get(name, {})), system, settings)

    def cancel(self) -> None:
        self._is_cancelled = True

    def close(self) -> None:
        self.server.close()

    def model_key(self) -> str:
        return f"{self.server.url} {self.info.name}"

    def require_budget(self) -> None:
        raise KimiLiteError(
            "A budget for thinking cannot be kept from here: the endpoint decides.",
            "Leave it out; -n limits an answer.",
        )

    def _stream(
        self, messages: list[dict[str, Any]], settings: AnswerSettings, on_prefill: OnPrefill | None, is_turn: bool
    ) -> Generator[Token, None, None]:
        self._is_cancelled = False
        num_calls = sum(len(turn.calls) for turn in self.turns)
        while True:
            reader = DeltaReader(
                uuid4().hex,
                num_calls,
                tools=self.tools,
                is_thinking=settings.is_thinking,
                opens_thinking=self._opens_thinking,
                is_held=not self.is_watched,
            )
            try:
                yield from self._answer_once(reader, self._body(messages, settings))
                self._opens_thinking = reader.opens_thinking
                return
            except Refused as error:
                self._do_without(error, settings)
            except KimiLiteError:
                yield from reader.rest()
                raise

    def _answer_once(self, reader: DeltaReader, body: dict[str, Any]) -> Generator[Token, None, None]:
        events, content_type, whole, num_bytes = EventReader(), "", bytearray(), 0
        pieces = self.server.post("/chat/completions", body, lambda: self._is_cancelled)
        try:
            for content_type, data in pieces:
                num_bytes += len(data)
                if "json" in content_type:  # a server that does not stream
                    whole += data
                    self.server.require_size(num_bytes, MAX_BODY_BYTES)
                    continue
                self.server.require_size(num_bytes, MAX_STREAM_BYTES)
                for event in events.feed(data):
                    yield from self._read(reader, event)
                if reader.is_done:  # not every server closes the connection then
                    break
        finally:
            pieces.close()
        if self._is_cancelled:
            yield from reader.finish("cancelled")
            return
        for event in [whole.decode("utf-8", "replace")] if whole else events.finish():
            yield from self._read(reader, event)
        if not reader.is_done and reader.reason is None:
            if content_type and "json" not in content_type and "event-stream" not in content_type:
                raise self.server.no_api(content_type)
            if not reader.has_choices:
                raise KimiLiteError(
                    f"{self.server.url} sent nothing that OpenAI's API calls an answer.",
                    "Its address ends in /v1 as a rule; the server's log may say more.",
                )
            message = f"{self.server.url} ended the answer in the middle: no finish reason, no [DONE]."
            raise KimiLiteError(message, reader.hint)
        if failure := reader.failure():
            raise failure
        yield from reader.finish()

    def _read(self, reader: DeltaReader, text: str) -> list[Token]:
        """The tokens of what stood between two empty lines."""
        tokens: list[Token] = []
        for event in _events(text):
            reader.is_done = reader.is_done or event.strip() == DONE
            tokens += [] if reader.is_done else self._read_event(reader, event)
        return tokens

    def _read_event(self, reader: DeltaReader, event: str) -> list[Token]:
        try:
            document = json.loads(event)
        except (ValueError, RecursionError) as error:
            said = self.server.redacted(event)[:80]
            raise KimiLiteError(
                f"{self.server.url} sent an event that is no JSON: {said!r}.", "Is it OpenAI's API?"
            ) from error
        try:
            return reader.feed(document) if isinstance(document, Mapping) else []
        except KimiLiteError as error:
            raise KimiLiteError(self.server.redacted(error.message), error.hint) from error

    def _body(self, messages: Sequence[Mapping[str, Any]], settings: AnswerSettings) -> dict[str, Any]:
        """The request. What is as OpenAI's default is not sent: not every server knows every field."""
        params = settings.params
        body: dict[str, Any] = {
            "model": self.info.name,
            "messages": self._portable(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": params.temperature,
            "top_p": params.top_p,
            **self._thinking(settings),
        }
        optional = {
            "max_tokens": params.max_tokens,
            "seed": params.seed,
            "stop": list(params.stop) or None,
            "top_k": params.top_k or None,
            "min_p": params.min_p or None,
            "repetition_penalty": None if params.repetition_penalty == 1.0 else params.repetition_penalty,
            "tools": (typed_tools(self.tools) if self._is_vendor else list(self.tools)) or None,
        }
        body |= {name: value for name, value in optional.items() if value is not None}
        return {name: value for name, value in body.items() if name not in self._refused}

    def _thinking(self, settings: AnswerSettings) -> dict[str, Any]:
        """The switch: the vendor has a field of its own, servers pass arguments to the template."""
        if self._is_vendor:
            return {"thinking": {"type": "enabled" if settings.is_thinking else "disabled"}}
        kept = {"preserve_thinking": True} if settings.preserve_thinking else {}
        return {"chat_template_kwargs": {"thinking": settings.is_thinking, **kept}}

    @property
    def _is_vendor(self) -> bool:
        host = urlsplit(self.server.url).hostname or ""
        return any(host == vendor or host.endswith("." + vendor) for vendor in VENDOR_HOSTS)

    def _portable(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        sent = portable(messages, declared_names(self.tools))
        if "reasoning_content" not in self._refused:
            return sent
        return [{key: value for key, value in one.items() if key != "reasoning_content"} for one in sent]

    def _do_without(self, error: Refused, settings: AnswerSettings) -> None:
        """Leave a field out that the server refused by name and that changes nothing; else the refusal stands."""
        fields = ["stream_options", "reasoning_content"]
        fields += ["chat_template_kwargs", "thinking"] if settings.is_thinking else []
        named = [name for name in fields if name in error.said and name not in self._refused]
        is_wanted = any(word in error.said.lower() for word in ("missing", "required", "must be"))  # and not refused
        if error.status not in (400, 422) or not named or is_wanted:
            raise error
        self._refused.add(named[0])


def _events(text: str) -> list[str]:
    """One event, of several lines maybe; or one a line, from servers that leave out the empty lines between."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) < 2 or _is_json(text) or not all(line.strip() == DONE or _is_json(line) for line in lines):
        return [text]
    return lines


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _models(server: Server, is_needed: bool) -> dict[str, Mapping[str, Any]]:
    """What the server says about its models, by name. Not every server has the list, and not every one is asked for
    it."""
    try:
        document = server.get("/models")
    except Refused as error:
        if is_needed or error.status != 404:
            raise
        return {}
    entries = document.get("data") if isinstance(document, Mapping) else None
    entries = entries if isinstance(entries, list) else []
    return {str(entry["id"]): entry for entry in entries if isinstance(entry, Mapping) and entry.get("id")}


def _only_model(server: Server, models: Mapping[str, Any]) -> str:
    """The one model, or the one Kimi K2 among several."""
    kimis = [name for name in models if "kimi-k2" in name.lower()]
    if len(models) == 1 or len(kimis) == 1:
        return kimis[0] if len(kimis) == 1 else next(iter(models))
    if not models:
        raise KimiLiteError(f"{server.url} lists no models.", "Name one with -m.")
    names = ", ".join(list(models)[:12]) + (", ..." if len(models) > 12 else "")
    raise KimiLiteError(f"{server.url} has {len(models)} models: {names}.", "Name one with -m.")


def _context_length(entry: Mapping[str, Any]) -> int | None:
    """As vLLM, OpenRouter or llama-server say it."""
    places = (entry, entry.get("meta") if isinstance(entry.get("meta"), Mapping) else {})
    values = [place.get(key) for place in places for key in CONTEXT_KEYS]
    return next((int(value) for value in values if isinstance(value, int) and value > 0), None)
