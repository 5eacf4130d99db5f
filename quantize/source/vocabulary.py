"""A tokenizer on its way into GGUF: tokens in id order, their types, the merges, and the byte alphabet they are written
in."""

from dataclasses import dataclass
from functools import cache

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types


@dataclass(frozen=True, slots=True)
class SourceVocabulary:
    """`tokens[i]`, of type `types[i]`, has id i; `merges` are "left right" in order; `pre` is llama.cpp's pre-tokenizer
    name."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]

    def find(self, text: str) -> int | None:
        """The id of a control or added token; these come late, and no ordinary token has their text."""
        for i in range(len(self.tokens) - 1, -1, -1):
            if self.tokens[i] == text and self.types[i] in (CONTROL, USER_DEFINED):
                return i
        return None


def bytes_to_text(piece: bytes) -> str:
    """GPT-2's printable writing of bytes, which GGUF's byte-level tokens are stored in."""
    alphabet = _byte_alphabet()
    return "".join([alphabet[byte] for byte in piece])


@cache
def _byte_alphabet() -> tuple[str, ...]:
    """Printable Latin-1 stands for itself; the other 68 bytes follow in order from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))
