"""Fixtures of the text tests: GGUF metadata made from the vendor's real tokenizer files, and a vocabulary of bytes
only."""

import base64
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.text.template import ChatTemplate
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.text.vocabulary import CONTROL, NORMAL, byte_alphabet

KIMI_FILES = Path(__file__).parents[2] / "../shared/data/kimi-tokenizer"


def to_alphabet(data: bytes) -> str:
    """Bytes in GPT-2's alphabet, as a GGUF file writes its normal tokens."""
    return "".join(map(_character_of_byte().__getitem__, data))


@cache
def _character_of_byte() -> dict[int, str]:
    return {byte: chr(code) for code, byte in enumerate(byte_alphabet().tolist()) if byte >= 0}


def encode_markers(tokenizer: Tokenizer, text: str, markers: list[str]) -> list[int]:
    """Ids of `text` with the control tokens `markers` where it spells them."""
    parts = re.split(f"({'|'.join(map(re.escape, sorted(markers, key=len, reverse=True)))})", text)
    return [i for part in parts for i in ([tokenizer.special[part]] if part in markers else tokenizer.encode(part))]


def rendered(
    template: ChatTemplate, messages: list[dict], tools: list[dict] | None = None, thinking: bool = True
) -> str:
    """The prompt as the template writes it, before it becomes ids."""
    return "".join(segment.text for segment in template._segments(messages, tools, thinking, True, False))


def make_metadata(tokens: list[bytes], special: list[str], pre: str, **more: object) -> dict[str, object]:
    """Tokenizer metadata as a GGUF reader gives it: `tokens` first, then the control tokens."""
    chars = {bytes([byte]): to_alphabet(bytes([byte])) for byte in range(256)}
    texts = ["".join(chars[token[i : i + 1]] for i in range(len(token))) for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts + special,
        "tokenizer.ggml.token_type": np.array([NORMAL] * len(tokens) + [CONTROL] * len(special), np.int32),
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


@pytest.fixture(scope="session")
def kimi_metadata() -> dict[str, object]:
    """The whole Kimi vocabulary, 163,840 tokens, in the form a converted GGUF file carries."""
    if not KIMI_FILES.is_dir():
        pytest.skip(f"the vendor's tokenizer files are not at {KIMI_FILES.name}")
    lines = (KIMI_FILES / "tiktoken.model").read_bytes().splitlines()
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    added = json.loads((KIMI_FILES / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    special = [
        added[str(i)]["content"] if str(i) in added else f"<|reserved_token_{i}|>" for i in range(len(tokens), 163840)
    ]
    return make_metadata(tokens, special, "kimi-k2", bos_token_id=163584, eos_token_id=163585, padding_token_id=163839)


@pytest.fixture(scope="session")
def kimi(kimi_metadata: dict[str, object]) -> Tokenizer:
    return Tokenizer.from_metadata(kimi_metadata)
