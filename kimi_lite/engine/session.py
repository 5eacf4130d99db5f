"""A conversation with a loaded model: its prompts, and the token ids that the cache already knows.

The ids of the last prompt and its answer are kept, and those sampled for every answer. The next prompt takes from them
as much as reads the same, so that only what is new is prefilled; see `engine.splice`.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

import numpy as np

from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.conversation import Conversation, Look, OnPrefill
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.splice import splice, with_sampled_ids
from kimi_lite.engine.turns import Content
from kimi_lite.engine.types import Request, Token
from kimi_lite.engine.vision import NO_TOWER_HINT, MarkedPrompt, encode_prompt, placed, without_marks
from kimi_lite.errors import KimiLiteError
from kimi_lite.plan.types import Plan
from kimi_lite.text.stream import END_THINK

NUM_LEAD_IDS = 4  # `<|im_assistant|> assistant <|im_middle|> <think>`


class Session(Conversation):
    """One user's conversation with an engine."""

    def __init__(self, engine: Engine, system: str = "", settings: AnswerSettings | None = None) -> None:
        self.engine, self.info, self.context_length = engine, engine.info, engine.context_length
        self.max_context_length = engine.max_context_length
        self._lead_ids: tuple[int, ...] = ()
        self._request_id = ""
        self._is_cancelled = False
        super().__init__(system, settings)

    def cancel(self) -> None:
        self._is_cancelled = True
        self.engine.cancel(self._request_id)

    @property
    def can_see(self) -> bool:
        return self.engine.vision is not None

    @property
    def can_think(self) -> bool:
        return self.engine.template.facts.can_think

    @property
    def can_call(self) -> bool:
        return self.engine.template.facts.can_call

    @property
    def can_preserve(self) -> bool:
        return self.engine.template.facts.can_preserve

    def require_budget(self) -> None:
        super().require_budget()
        if END_THINK not in self.engine.tokenizer.special:
            raise KimiLiteError(f"{self.info.name} ends its thinking with no token of its own.", "Limit answers by -n.")

    def count_tokens(self, content: Content | None = None, num_dropped: int | None = None) -> int:
        turns = self.turns[self.num_dropped if num_dropped is None else num_dropped :]
        messages = [*self._system_messages(), *(turn.to_message() for turn in turns if turn.says_something)]
        if content is not None:
            messages.append({"role": "user", "content": content})
        return len(self._encode(messages, self.settings, is_asking=content is not None).ids) if messages else 0

    def look_at(self, part: Mapping[str, Any]) -> Look | None:
        vision = self.engine.vision
        if vision is None:
            raise KimiLiteError(f"{self.info.name} has no vision tower here.", NO_TOWER_HINT)
        medium = vision.read(part, self.on_media)
        num_tokens = sum(item.num_tokens for item in vision.shown(medium))
        return Look(num_tokens, medium.remark, medium.items[0].patches)

    def count_messages(self, messages: list[dict[str, Any]]) -> int:
        return len(self._encode(messages, self.settings.with_thinking(False)).ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.engine.tokenizer.decode([i]) for i in ids]

    def counters(self) -> Mapping[str, float]:
        return self.engine.counters()

    def heat(self) -> np.ndarray | None:
        return self.engine.model.heat()

    @property
    def plan(self) -> Plan | None:
        return self.engine.plan

    def lead_ids(self) -> Sequence[int]:
        return self._lead_ids

    def model_key(self) -> str:
        return f"{self.info.name}/{self.engine.tokenizer.vocab_size}"

    def close(self) -> None:
        self.engine.close()

    def _stream(
        self, messages: list[dict[str, Any]], settings: AnswerSettings, on_prefill: OnPrefill | None, is_turn: bool
    ) -> Generator[Token, None, None]:
        self._request_id, self._is_cancelled = uuid4().hex, False
        prompt = self._encode(messages, settings)
        ids = with_sampled_ids(prompt.ids, self.turns[self.num_dropped :], self.engine.tokenizer)
        ids = splice(self.known_ids, ids, self.engine.tokenizer)
        budget = settings.thinking_budget if settings.is_thinking else None
        request = Request(
            self._request_id,
            without_marks(ids, self.engine.template.pad_id),
            settings.params,
            prompt.starts_in_reasoning,
            self.tools,
            num_calls=sum(len(turn.calls) for turn in self.turns),
            max_reasoning_tokens=budget,
        )
        self.engine.require_room(request)
        request = self._with_images(request, ids, prompt)
        if self._is_cancelled:  # while the prompt was encoded
            self.engine.cancel(request.id)
        if is_turn:
            self.known_ids, self._lead_ids = ids, tuple(ids[-NUM_LEAD_IDS:])
        tokens = self.engine.generate([request], on_prefill)
        try:
            for token in tokens:
                if token.id is not None and is_turn:
                    self.known_ids.append(token.id)
                yield token
        finally:
            tokens.close()

    def _with_images(self, request: Request, ids: Sequence[int], prompt: MarkedPrompt) -> Request:
        """The request with what its images are to the model; without, where it was cancelled meanwhile."""
        if not prompt.items:
            return request
        features = self.engine.vision.see(prompt.items, self.on_media, lambda: self._is_cancelled)
        return request if features is None else replace(request, images=placed(ids, prompt.items, features))

    def _encode(
        self, messages: Sequence[dict[str, Any]], settings: AnswerSettings, is_asking: bool = True
    ) -> MarkedPrompt:
        return encode_prompt(
            self.engine.template,
            self.engine.vision,
            messages,
            self.on_media,
            tools=self.tools,
            thinking=settings.is_thinking,
            add_generation_prompt=is_asking,
            preserve_thinking=settings.preserve_thinking,
        )
