"""Token ids against the vendor's own (real ranks), a slow obvious BPE, SmolLM2's pieces, and hostile vocabularies."""

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import make_metadata, to_alphabet
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.text.pretokenizers import BLOCK_CHARS, RUN_CHARS, chunks, splitter
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.text.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED

BYTES = [bytes([byte]) for byte in range(256)]
KIMI_VECTORS = [
    ("Hello, world!", [19180, 11, 2695, 0]),
    ("hello world", [22931, 2695]),
    ("你好，世界", [33845, 378, 2243]),
    ("The quick brown fox jumps over the lazy dog.", [1008, 5072, 16331, 69275, 60062, 1312, 276, 29292, 7751, 13]),
    ("1234567890", [6694, 12972, 16242, 15]),
    ("  leading spaces\n\n\ttabs", [220, 8134, 14803, 382, 5604, 5609]),
    ("don't you'll WE'RE", [88709, 13556, 40893, 6, 1046]),
    ("naïve café 😀", [4768, 44187, 367, 70591, 70005, 222]),
    ("def f(x):\n    return x**2\n", [1166, 285, 3940, 2360, 274, 745, 1288, 381, 17, 198]),
    ("混合English和中文123", [13935, 44372, 488, 16717, 6694]),
    ("한국어 テスト", [17079, 54078, 28763, 220, 25875, 33360]),
    ("\u3000\u3000全角", [14224, 14224, 775, 2539]),
    ("user", [2482]),
    ("assistant", [69702]),
    ("system", [14062]),
    ("tool", [20960]),
    ("tool_declare", [20960, 35556, 677]),
    ("functions.get_weather:0", [41937, 1150, 21055, 2800, 25, 15]),
    ("## Return of ", [798, 6014, 318, 220]),
    ("“", [1686]),
    ("Hello", [19180]),
    (",”", [4963]),
    (" ", [220]),
    ("世界", [2243]),
    ("世世", [123421]),
    ("——", [35086]),
    ("I'm", [17172]),
    (" Chat", [29338]),
    ("GPT", [111021]),
    (" CAN", [32330]),
    ("'T", [64833]),
    (" wait", [5161]),
    (" '", [542]),
    ("You are a helpful assistant.", [3900, 554, 261, 13205, 26626, 13]),
]
MIXED = st.text(
    alphabet=st.sampled_from(
        "  \t\n\r\u3000\u00a0'sSdtTlLvemMrR019٣½aZéñßΩжक्षि가一世界〇々㐀カナー・ひ!#%&()[]{}|<>,.;:_—“”😀\u200d\u0301\x00ǅʰ"  # noqa: E501
    )
    | st.characters(exclude_categories=("Cs",)),
    max_size=60,
)


@pytest.mark.parametrize(("text", "ids"), KIMI_VECTORS)
def test_kimi_ids_are_the_vendors(kimi: Tokenizer, text: str, ids: list[int]) -> None:
    assert kimi.encode(text) == ids
    assert kimi.decode(ids) == text


def test_kimi_control_tokens_are_where_the_vendor_has_them(kimi: Tokenizer) -> None:
    expected = {
        "[BOS]": 163584,
        "<|im_end|>": 163586,
        "<|im_middle|>": 163601,
        "<|media_pad|>": 163605,
        "</think>": 163607,
    }
    assert {text: kimi.special[text] for text in expected} == expected
    assert (kimi.vocab_size, len(kimi.special)) == (163840, 256)
    assert kimi.eos_ids == {163585, 163586, 163593}
    assert (kimi.bos_id, kimi.eos_id) == (163584, 163585)
    assert kimi.decode([163586]) == "<|im_end|>"
    assert kimi.decode_bytes(222) == b"\x80"


@pytest.fixture(scope="module")
def kimi_ranks(kimi: Tokenizer) -> dict[bytes, int]:
    return {kimi.decode_bytes(i): i for i in range(163584)}


def naive_bpe(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Merge the adjacent pair of lowest rank, leftmost first, until none is left."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@settings(max_examples=150, deadline=None)
@given(text=MIXED)
def test_kimi_equals_regex_and_naive_bpe(kimi: Tokenizer, kimi_ranks: dict[bytes, int], text: str) -> None:
    regex = pytest.importorskip("regex", reason="the other regex engine that knows class intersections")
    pieces = regex.compile(splitter("kimi-k2").pattern, regex.V1).findall(text)
    assert kimi.encode(text) == [i for piece in pieces for i in naive_bpe(piece.encode(), kimi_ranks)]
    assert kimi.decode(kimi.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(["<|im_end|>", "[EOS]", "</think>", "<|im_", "end|>", "<", "a", " "]) | st.text(max_size=5)
    )
)
def test_plain_text_never_becomes_a_control_token(kimi: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    ids = kimi.encode(text)
    assert all(i < 163584 for i in ids)
    assert kimi.decode(ids) == text


def test_a_lone_surrogate_is_replaced(kimi: Tokenizer) -> None:
    assert kimi.decode(kimi.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("run", [" ", "\n", "a", "世", "é\u0301", "-", "9"])
def test_long_runs_survive(kimi: Tokenizer, run: str) -> None:
    """Uncut, a million blanks overflow the stack of tiktoken's regular expressions."""
    text = "x" + run * (1_100_000 // len(run)) + "y"
    assert kimi.decode(kimi.encode(text)) == text


def test_chunks_cut_where_the_vendor_cuts() -> None:
    text = "a" * RUN_CHARS + "b" * 5 + " " * (2 * RUN_CHARS) + "c" * BLOCK_CHARS
    parts = list(chunks(text))
    assert "".join(parts) == text
    assert parts[0] == "a" * RUN_CHARS
    assert parts[1] == "b" * 5 + " " * RUN_CHARS
    assert max(map(len, parts)) <= 2 * RUN_CHARS
    assert list(chunks("short text")) == ["short text"]
    assert list(chunks("")) == []


GOLDEN = json.loads((Path(__file__).parent / "smollm2_golden.json").read_text())


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_smollm_pieces(is_shuffled: bool) -> None:
    """SmolLM2's pieces from its merge list, also when the ids are not in merge order; bytes it lacks are left out."""
    merges = [merge for row in GOLDEN["merges"] for merge in row.split(" ; ")]
    tokens = [to_alphabet(byte) for byte in BYTES if byte != b"\x04"] + [merge.replace(" ", "") for merge in merges]
    if is_shuffled:
        random.Random(0).shuffle(tokens)
    metadata = make_metadata([], tokens, "smollm", merges=merges)
    metadata["tokenizer.ggml.token_type"] = np.full(len(tokens), NORMAL, np.int32)
    tokenizer = Tokenizer.from_metadata(metadata)
    for text, pieces in GOLDEN["vectors"]:
        assert [tokens[i] for i in tokenizer.encode(text)] == pieces.split(" "), text
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\x04", "")


def test_a_token_no_merge_makes_is_never_made() -> None:
    metadata = make_metadata([*BYTES, b"ab", b"bc"], [], "gpt-2", merges=["a b"])
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("abc bc") == [256, ord("c"), ord(" "), ord("b"), ord("c")]
    assert tokenizer.decode([257]) == "bc"


def test_stop_ids_by_key_and_by_name() -> None:
    metadata = make_metadata(
        BYTES, ["<|endoftext|>", "<|im_end|>", "<other>"], "gpt-2", eos_token_id=65, eot_token_id=66
    )
    assert Tokenizer.from_metadata(metadata).eos_ids == {65, 66, 256, 257}


def test_unused_tokens_are_neither_text_nor_special() -> None:
    metadata = make_metadata([*BYTES], ["<|im_end|>", "[PAD257]"], "gpt-2")
    metadata["tokenizer.ggml.token_type"][257] = UNUSED
    tokenizer = Tokenizer.from_metadata(metadata)
    assert dict(tokenizer.special) == {"<|im_end|>": 256}
    assert [tokenizer.is_control(i) for i in (65, 256, 257)] == [False, True, True]
    assert tokenizer.encode("[PAD257]") == list(b"[PAD257]")


def with_words(words: list[str], special: list[str], pre: str = "gpt-2") -> Tokenizer:
    """Bytes and one merge, then user-defined tokens, then control tokens."""
    tokens, merges = [*BYTES, b"ab"], ["a b"]
    metadata = make_metadata(tokens, words + special, pre, merges=merges)
    metadata["tokenizer.ggml.token_type"][len(tokens) : len(tokens) + len(words)] = USER_DEFINED
    return Tokenizer.from_metadata(metadata)


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(st.text("üöab \n", min_size=1, max_size=4), min_size=1, max_size=6, unique=True),
    text=st.text("üöab \nT.", max_size=30),
)
def test_added_words_are_found_in_text_as_tokenizers_does_it(words: list[str], text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the reference is the tokenizers library")
    vocab = {to_alphabet(token): i for i, token in enumerate([*BYTES, b"ab"])}
    words.sort(key=lambda word: word in vocab)  # those that are there already keep their ids: the others count on
    reference = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b")]))
    reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.add_tokens([tokenizers.AddedToken(word, normalized=False, special=False) for word in words])
    tokenizer = with_words(words, [])
    assert tokenizer.encode(text) == reference.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text or "ü" in words or "ö" in words


def test_added_words_that_look_like_control_tokens_are_out_of_reach_of_text() -> None:
    looks = ["<think>", "[EOT]", "<｜User｜>", "{{x}}", "<|a", "<tool_call>", "a|>"]
    tokenizer = with_words(["üh", *looks], ["<|im_end|>"], "deepseek-llm")
    assert tokenizer.encode("Tühr") == [ord("T"), 257, ord("r")]
    assert all(i < 257 for text in [*looks, "<|im_end|>"] for i in tokenizer.encode(text))
    assert set(tokenizer.special) == {*looks, "<|im_end|>"}
    assert not tokenizer.is_control(257)


HOSTILE = {
    "model": ({"tokenizer.ggml.model": "llama"}, "byte-level BPE"),
    "no model": ({"tokenizer.ggml.model": None}, "byte-level BPE"),
    "pre": ({"tokenizer.ggml.pre": "bloom"}, "known are kimi-k2"),
    "no pre": ({"tokenizer.ggml.pre": None}, "known are kimi-k2"),
    "tokens": ({"tokenizer.ggml.tokens": np.zeros(3)}, "no list of token texts"),
    "no tokens": ({"tokenizer.ggml.tokens": []}, "no list of token texts"),
    "types": ({"tokenizer.ggml.token_type": None}, "no list of token types"),
    "float types": ({"tokenizer.ggml.token_type": np.ones(258)}, "no list of token types"),
    "type count": ({"tokenizer.ggml.token_type": np.ones(3, np.int32)}, "258 tokens but 3 token types"),
    "type value": ({"tokenizer.ggml.token_type": np.full(258, 9, np.int32)}, "has type 9"),
    "all control": (
        {"tokenizer.ggml.tokens": [""] * 258, "tokenizer.ggml.token_type": np.full(258, CONTROL)},
        "is empty",
    ),
    "eos": ({"tokenizer.ggml.eos_token_id": 258}, "the ids 0 to 257"),
    "negative": ({"tokenizer.ggml.bos_token_id": -1}, "the ids 0 to 257"),
    "no id": ({"tokenizer.ggml.eos_token_id": "2"}, "the ids 0 to 257"),
    "merges": ({"tokenizer.ggml.merges": np.zeros(2)}, "not a list"),
    "merge": ({"tokenizer.ggml.merges": ["a q"]}, "not there"),
    "merge alone": ({"tokenizer.ggml.merges": ["ab"]}, "not there"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_vocabularies_are_refused_in_a_sentence(case: str) -> None:
    change, message = HOSTILE[case]
    with pytest.raises(KimiLiteError, match=message):
        Tokenizer.from_metadata(make_metadata([*BYTES, b"ab"], ["<eos>"], "gpt-2") | change)


@pytest.mark.parametrize(
    ("token", "message"),
    [("ab", "same bytes"), ("", "is empty"), ("a b", "byte alphabet"), ("世", "byte alphabet"), ("\ud800", "byte")],
)
def test_malformed_tokens_are_named(token: str, message: str) -> None:
    metadata = make_metadata([*BYTES, b"ab", b"cd"], [], "gpt-2")
    metadata["tokenizer.ggml.tokens"][257] = token
    with pytest.raises(KimiLiteError, match=f"25[67].*{message}|Token.* 25[67].*{message}"):
        Tokenizer.from_metadata(metadata)


def test_contradicting_merges_are_refused() -> None:
    tokens = [*BYTES, b"ab", b"bc", b"abc"]
    with pytest.raises(KimiLiteError, match="an earlier merge made"):
        Tokenizer.from_metadata(make_metadata(tokens, [], "gpt-2", merges=["a b", "ab c", "b c", "a bc"]))
    neighbours = make_metadata(tokens, [], "gpt-2", merges=["a b", "b c", "ab c", "a bc"])
    assert Tokenizer.from_metadata(neighbours).encode("abcbc") == [258, 257]


def test_control_tokens_twice_or_not_unicode() -> None:
    with pytest.raises(KimiLiteError, match="257 '<eos>' is empty or occurs twice"):
        Tokenizer.from_metadata(make_metadata(BYTES, ["<eos>", "<eos>"], "gpt-2"))
    with pytest.raises(KimiLiteError, match="not Unicode"):
        Tokenizer.from_metadata(make_metadata(BYTES, ["<\udcff>"], "gpt-2"))


@pytest.mark.parametrize("token_id", [-1, 163840])
def test_unknown_ids_are_refused(kimi: Tokenizer, token_id: int) -> None:
    with pytest.raises(KimiLiteError, match="0 to 163839"):
        kimi.decode([token_id])
