"""Every name's pieces against its row of splits as the `tokenizers` library and llama.cpp run it."""

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.text.pretokenizers import SPLITS, name_of, splitter

tokenizers = pytest.importorskip("tokenizers", reason="the reference splits come from the tokenizers library")

TEXT = st.text(
    alphabet=st.sampled_from(
        " \t\n\r\u3000\u00a0\u2028'sStTlLvVeEdmr019٣Ⅷ½aZéñßΩжक्षि가一世界〇々㐀𠀀カナー・゠゛\u3099\u3097\u3040ひ!#$%&()[]`{}~.,;:"  # noqa: E501
        "  —“😀\u200d\u0301\x00\x01\u200b\ufeff\ue000\u0378ǅʰªـ\x85\x1c"
    ),
    max_size=20,
)


def pieces_of(pre: str, text: str) -> list[str]:
    """How `text` is split: with tiktoken, in a vocabulary of all its substrings every piece is one token."""
    rule = splitter(pre)
    if not rule.pattern:
        return rule.pieces(text)
    parts = {text[i:j].encode() for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    tokens = sorted(parts | {bytes([byte]) for byte in range(256)})
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("test", pat_str=rule.pattern, mergeable_ranks=ranks, special_tokens={})
    return [tokens[i].decode() for i in encoding.encode_ordinary(text)]


@pytest.mark.parametrize("pre", SPLITS)
@settings(max_examples=120, deadline=None)
@given(text=TEXT)
def test_pieces_equal_the_row_of_splits(pre: str, text: str) -> None:
    splits = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in SPLITS[pre]]
    expected = tokenizers.pre_tokenizers.Sequence(splits).pre_tokenize_str(text)
    assert pieces_of(pre, text) == [text[start:end] for _, (start, end) in expected]


@pytest.mark.parametrize("pre", SPLITS)
@settings(max_examples=60, deadline=None)
@given(text=TEXT | st.text(st.characters(exclude_categories=("Cs",)), max_size=20))
def test_nothing_is_dropped(pre: str, text: str) -> None:
    assert "".join(pieces_of(pre, text)) == text


def test_names() -> None:
    assert all(name_of(row) == name for name, row in SPLITS.items())
    assert name_of([r"\s+"]) is None
    assert splitter("joyai-llm").pattern == splitter("deepseek-v3").pattern
    assert splitter("glm4").pattern == splitter("llama-bpe").pattern != splitter("qwen2").pattern
