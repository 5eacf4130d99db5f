"""Ids by every pre-tokenizer name against llama.cpp's own, on a vocabulary whose merges show where text is cut."""

import random
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.gguf.store import GGUFStore
from kimi_lite.text.pretokenizers import SPLITS
from kimi_lite.text.tokenizer import Tokenizer
from tests.llama import open_llama
from tests.tiny import write_tiny_gguf
from tests.tiny_tokenizer import tokenizer_metadata

pytest.importorskip("llama_cpp", reason="pip install 'kimi-lite[ggml]' brings llama.cpp", exc_type=ImportError)

MERGES = (  # "Ġ" is a space and "Ċ" a line feed
    "1 1", "11 1", "1 !", "Ġ Ġ", "ĠĠ Ġ", "Ġ a", "a a", "A a", "a A", "' s", "! !", "Ċ Ċ", "Ġ !", "! Ċ", "Ġ 1", "a 1",
    "1 a", "Ġa a",
)  # fmt: skip

LEFT_OUT = {  # where llama.cpp cuts otherwise than the model's tokenizer.json, which we follow
    "kimi-k2": "A",  # it does not cut where lower case turns to upper
    "youtu": "A",
    "deepseek-llm": "1",  # it does not cut between digits
}


@pytest.mark.parametrize("pre", SPLITS)
def test_ids_are_llama_cpps(pre: str, tmp_path: Path) -> None:
    tokens = list(tokenizer_metadata(300)["tokenizer.ggml.tokens"])
    tokens[256 : 256 + len(MERGES)] = [merge.replace(" ", "") for merge in MERGES]
    changes = {"tokens": tokens, "merges": list(MERGES), "pre": pre}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    path = write_tiny_gguf(tmp_path / "m.gguf", np.random.default_rng(0), metadata=metadata)
    tokenizer = Tokenizer.from_metadata(GGUFStore.open(path).metadata)
    reference = open_llama(path, vocab_only=True)
    rng, alphabet = random.Random(pre), "   aaA111's!!\n".replace(LEFT_OUT.get(pre, "-"), "")
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 16)))
        expected = reference.tokenize(text.encode(), add_bos=False, special=False)
        assert tokenizer.encode(text) == expected, text
