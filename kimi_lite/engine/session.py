"""A conversation: messages, system prompt, thinking mode, and the token ids that the cache already knows.

The text of a past answer may be tokenized otherwise than it was sampled, and then nothing after it would be found in the cache.
So the ids of the last prompt and its answer are kept, and the next prompt takes from them as much as reads the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from uuid import uuid4

import numpy as np

from kimi_lite.engine.engine import Engine, OnPrefill
from kimi_lite.engine.types import INSTANT_TEMPERATURE, THINKING_TEMPERATURE, Request, SamplingParams, Token
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.template import EncodedPrompt
from kimi_lite.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Session:
    """One user's conversation with an engine. `temperature` None is the vendor's choice for the mode."""

    engine: Engine
    system: str = ""
    is_thinking: bool = True
    temperature: float | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)  # but for the temperature
    messages: list[dict[str, str]] = field(default_factory=list)  # without the system prompt
    known_ids: list[int] = field(default_factory=list)  # of the last prompt and its answer
    _request_id: str = ""
    _is_cancelled: bool = False

    def ask(self, text: str, on_prefill: OnPrefill | None = None) -> Iterator[Token]:
        """Send a message and stream the answer. However it ends, what was said stays in the conversation."""
        require_utf8(text)
        self._request_id, self._is_cancelled = uuid4().hex, False
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._encode()
            request = Request(self._request_id, tuple(prompt.ids), self._sampling(), prompt.starts_in_reasoning)
            self.engine.require_room(request)
        except BaseException:
            self.messages.pop()
            raise
        if self._is_cancelled:  # while the prompt was encoded
            self.engine.cancel(request.id)
        self.known_ids = list(prompt.ids)
        yield from self._collect(self.engine.generate([request], on_prefill))

    def cancel(self) -> None:
        """Stop the answer; from a signal handler or another thread. What it said so far is kept."""
        self._is_cancelled = True
        self.engine.cancel(self._request_id)

    def clear(self) -> None:
        """Forget the conversation; the system prompt and the settings stay."""
        self.messages.clear()
        self.known_ids.clear()

    @property
    def can_think(self) -> bool:
        """Whether the model's template has a thinking mode."""
        question = [{"role": "user", "content": "?"}]
        return self.engine.template.encode(question, thinking=True).starts_in_reasoning

    def set_thinking(self, is_thinking: bool) -> None:
        """Let the model reason before it answers, or not; refused where it cannot."""
        if is_thinking and not self.can_think:
            raise KimiLiteError(f"{self.engine.info.name} has no thinking mode.", "Leave --think or /think out.")
        self.is_thinking = is_thinking

    @property
    def mode(self) -> str:
        """The mode and its sampling, for people."""
        sampling = self._sampling()
        return f"thinking {'on' if self.is_thinking else 'off'} (temp {sampling.temperature:g}, top-p {sampling.top_p:g})"

    def _collect(self, tokens: Iterator[Token]) -> Iterator[Token]:
        """Pass the tokens on; at the end write the answer into the conversation."""
        texts = {"reasoning": "", "content": "", "tool_call": ""}
        try:
            for token in tokens:
                texts[token.kind] += token.text
                if token.id is not None:
                    self.known_ids.append(token.id)
                yield token
        finally:
            tokens.close()
            if texts["content"]:  # reasoning without an answer says nothing to the next turn
                self.messages.append({"role": "assistant", "content": texts["content"], "reasoning_content": texts["reasoning"]})

    def _encode(self) -> EncodedPrompt:
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = self.engine.template.encode(system + self.messages, thinking=self.is_thinking)
        return replace(prompt, ids=splice(self.known_ids, prompt.ids, self.engine.tokenizer))

    def _sampling(self) -> SamplingParams:
        default = THINKING_TEMPERATURE if self.is_thinking else INSTANT_TEMPERATURE
        return replace(self.sampling, temperature=default if self.temperature is None else self.temperature)


def require_utf8(text: str) -> None:
    """Refuse text with bytes that were no UTF-8 when it was read (Python keeps them as lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise KimiLiteError(
            f"The message is not UTF-8 text: byte 0x{byte:02X} after {error.start:,} characters.", "Try iconv -f LATIN1 -t UTF-8."
        ) from error


def splice(known_ids: Sequence[int], rendered_ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """`rendered_ids` with its beginning replaced by the longest beginning of `known_ids` that reads the same."""
    special = frozenset(tokenizer.special.values())
    known, rendered = [[_spelling(i, tokenizer, special) for i in ids] for ids in (known_ids, rendered_ids)]
    num_same_bytes = _num_common(b"".join(known), b"".join(rendered))
    known_ends, rendered_ends = [[0, *accumulate(map(len, spellings))] for spellings in (known, rendered)]
    common_end = max(end for end in set(known_ends) & set(rendered_ends) if end <= num_same_bytes)
    return [*known_ids[: known_ends.index(common_end)], *rendered_ids[rendered_ends.index(common_end) :]]


def _spelling(token_id: int, tokenizer: Tokenizer, special: frozenset[int]) -> bytes:
    """The token's bytes; control tokens get ones that no text has, so that text which spells them is not taken for them."""
    return b"\xff\xfe%d\xff" % token_id if token_id in special else tokenizer.decode_bytes(token_id)


def _num_common(a: bytes, b: bytes) -> int:
    """Length of the common beginning."""
    length = min(len(a), len(b))
    differing = np.flatnonzero(np.frombuffer(a, np.uint8, length) != np.frombuffer(b, np.uint8, length))
    return int(differing[0]) if len(differing) else length
