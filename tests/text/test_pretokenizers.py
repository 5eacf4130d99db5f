"""The single expressions against the row of splits they stand for, as the `tokenizers` library runs it."""

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.text.pretokenizers import pattern_of

tokenizers = pytest.importorskip("tokenizers", reason="the reference splits come from the tokenizers library")

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
SPLITS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "deepseek-v3": [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_WORDS],
}
TEXT = st.text(
    alphabet=st.sampled_from(
        " \t\n\r\u3000\u00a0\u2028'sStTlLvVeEdmr019٣Ⅷ½aZéñßΩжक्षि가一世界〇々㐀𠀀カナー・゠゛\u3099\u3097\u3040ひ!#$%&()[]`{}~.,;:"  # noqa: E501
        "  —“😀\u200d\u0301\x00\x01\u200b\ufeff\ue000\u0378ǅʰªـ\x85\x1c"
    ),
    max_size=20,
)


def pieces_of(pattern: str, text: str) -> list[str]:
    """How tiktoken splits `text`: in a vocabulary of all its substrings every piece is one token."""
    parts = {text[i:j].encode() for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    tokens = sorted(parts | {bytes([byte]) for byte in range(256)})
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [tokens[i].decode() for i in encoding.encode_ordinary(text)]


@pytest.mark.parametrize("pre", SPLITS)
@settings(max_examples=120, deadline=None)
@given(text=TEXT)
def test_pieces_equal_the_row_of_splits(pre: str, text: str) -> None:
    splits = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in SPLITS[pre]]
    expected = tokenizers.pre_tokenizers.Sequence(splits).pre_tokenize_str(text)
    assert pieces_of(pattern_of(pre), text) == [text[start:end] for _, (start, end) in expected]


@pytest.mark.parametrize("pre", ["kimi-k2", *SPLITS])
@settings(max_examples=60, deadline=None)
@given(text=TEXT | st.text(st.characters(exclude_categories=("Cs",)), max_size=20))
def test_nothing_is_dropped(pre: str, text: str) -> None:
    assert "".join(pieces_of(pattern_of(pre), text)) == text
