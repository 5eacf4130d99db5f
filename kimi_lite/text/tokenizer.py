"""Text to token ids and back: tiktoken over the vocabulary that the GGUF file itself carries.

tiktoken merges the pair with the lowest rank first, which is what the vocabularies were trained with, so the ids are
exact and no merge list is needed. Encoding never yields a control token: the ids of those come from `special`, where a
template wrote them. Built at start-up by the engine; used by `text.template` and `text.stream`.
"""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import tiktoken

from kimi_lite.errors import KimiLiteError
from kimi_lite.text.pretokenizers import Splitter, chunks, splitter
from kimi_lite.text.vocabulary import Vocabulary


class Tokenizer:
    """Byte-level BPE. `special`: control tokens by text; `eos_ids`: any of them ends a turn."""

    def __init__(self, vocabulary: Vocabulary, splitter: Splitter) -> None:
        self._vocabulary = vocabulary
        self.vocab_size = len(vocabulary.token_bytes)
        self.special: Mapping[str, int] = MappingProxyType(vocabulary.special)
        self.eos_ids, self.bos_id, self.eos_id = vocabulary.eos_ids, vocabulary.bos_id, vocabulary.eos_id
        ranks = dict(vocabulary.ranks)
        # tiktoken panics at a byte without a token; SmolLM2 has 21 of them. They get ids past the vocabulary, left out
        # below.
        self._first_absent = max(self.vocab_size, len(ranks))
        absent = [data for data in (bytes([byte]) for byte in range(256)) if data not in ranks]
        ranks |= {data: self._first_absent + i for i, data in enumerate(absent)}
        self._has_absent = bool(absent)
        self._splitter = splitter
        pattern = splitter.pattern or r"[\s\S]+"  # what the splitter cut already is one piece
        self._encoding = tiktoken.Encoding("gguf", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        words = sorted(vocabulary.words, key=len, reverse=True)  # the longest of those that begin at a place
        self._words = re.compile(f"({'|'.join(map(re.escape, words))})") if words else None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> "Tokenizer":
        """From the `tokenizer.ggml.*` keys of a GGUF file; KimiLiteError where they are missing, malformed or
        unknown."""
        return cls(Vocabulary.from_metadata(metadata), splitter(str(metadata.get("tokenizer.ggml.pre"))))

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as plain text: never a control token, whatever it spells. Added words (GGUF's user-defined
        tokens) are found first, as `tokenizers` and llama.cpp do. A byte that no token stands for is left out."""
        if self._words is None:
            return self._encode_text(text)
        parts = self._words.split(text)  # text, word, text, ...
        ids = self._encode_text(parts[0])
        for word, part in zip(parts[1::2], parts[2::2], strict=True):
            ids += [self._vocabulary.words[word], *self._encode_text(part)]
        return ids

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for chunk in chunks(text):
            for piece in [chunk] if self._splitter.pattern else self._splitter.pieces(chunk):
                ids += self._encoding.encode_ordinary(piece)
        if self._has_absent:
            ids = [i for i in ids if i < self._first_absent]
        id_of_rank = self._vocabulary.id_of_rank
        return ids if id_of_rank is None else [id_of_rank[rank] for rank in ids]

    def decode_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, possibly a part of a character; a control token gives its own text."""
        if not 0 <= token_id < self.vocab_size:
            raise KimiLiteError(
                f"Token id {token_id} does not exist; the vocabulary has the ids 0 to {self.vocab_size - 1}."
            )
        return self._vocabulary.token_bytes[token_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of all `ids` together, control tokens included; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.decode_bytes, ids)).decode("utf-8", "replace")

    def is_control(self, token_id: int) -> bool:
        """Whether the token is for the machine only; its text is never shown."""
        return bool(self._vocabulary.is_control[token_id])
