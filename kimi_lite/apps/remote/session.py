"""A conversation with a model behind an OpenAI-compatible endpoint: vLLM, SGLang, llama-server, kimi-lite serve, the
vendor.

`kimi-lite chat --endpoint URL` is the same program as without; only this class differs from `engine.session.Session`.
The server has template, tokenizer and cache, so token ids, their number before the answer, and a budget for thinking
are not ours.
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any
from uuid import uuid4

from kimi_lite.apps.remote.answer import AnswerReader
from kimi_lite.apps.remote.deltas import DeltaReader
from kimi_lite.apps.remote.dialect import COMPLETIONS, Dialect
from kimi_lite.apps.remote.endpoint import Refused, key_of
from kimi_lite.apps.remote.http import Server
from kimi_lite.apps.remote.models import MODELS, Models, context_length_of, models_of, no_models, only_model
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.conversation import Conversation, OnPrefill
from kimi_lite.engine.types import ModelInfo, Token
from kimi_lite.errors import KimiLiteError


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
        self.dialect = Dialect(server.url, model)
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
        server = Server(endpoint, key_of(endpoint, api_key))
        try:
            models = _models(server, is_needed=model is None)
            name = model or only_model(server.url, models)
        except BaseException:
            server.close()
            raise
        return cls(server, name, context_length_of(models.get(name, {})), system, settings)

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
            body = self.dialect.body(messages, settings, self.tools)
            try:
                yield from self._answer_once(reader, body)
                self._opens_thinking = reader.opens_thinking
                return
            except Refused as error:
                self.dialect.do_without(error, settings, body)
            except KimiLiteError:
                yield from reader.rest()
                raise

    def _answer_once(self, deltas: DeltaReader, body: dict[str, Any]) -> Generator[Token, None, None]:
        reader = AnswerReader(self.server, deltas)
        pieces = self.server.post(COMPLETIONS, body, lambda: self._is_cancelled)
        try:
            for content_type, data in pieces:
                yield from reader.feed(content_type, data)
                if reader.is_done:
                    break
        finally:
            pieces.close()
        yield from deltas.finish("cancelled") if self._is_cancelled else reader.finish()


def _models(server: Server, is_needed: bool) -> Models:
    """Not every server has the list, and not every one is asked for it."""
    try:
        return models_of(server.get(MODELS))
    except Refused as error:
        return no_models(error, is_needed)
