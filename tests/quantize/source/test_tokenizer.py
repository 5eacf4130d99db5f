"""Tokenizer files become GGUF keys that say the same: tokens, merges, control ids, template."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer

from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.convert import convert
from kimi_lite.quantize.source.kimi_tokenizer import make_merges, read_kimi_vocabulary, read_ranks
from kimi_lite.quantize.source.tokenizer import tokenizer_metadata
from kimi_lite.quantize.source.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, bytes_to_text
from kimi_lite.text import tokenizer as text_tokenizer
from kimi_lite.text.pretokenizers import SPLITS
from tests.checkpoint_tokenizers import NUM_PIECES, write_kimi_tokenizer, write_tokenizer_json
from tests.checkpoints import make_checkpoint

KIMI = Path(__file__).parents[3] / "../shared/data/kimi-tokenizer"
CONFIG = {"vocab_size": 512, "bos_token_id": 480, "eos_token_id": 481}


def values(keys: dict) -> dict:
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in keys.items()}


def test_kimi_folder(tmp_path):
    write_kimi_tokenizer(tmp_path, 512)
    keys = values(tokenizer_metadata(tmp_path, CONFIG))
    assert (keys["model"], keys["pre"]) == ("gpt2", "kimi-k2")
    assert len(keys["tokens"]) == len(keys["token_type"]) == 512
    assert keys["token_type"] == [NORMAL] * NUM_PIECES + [CONTROL] * 32
    assert keys["tokens"][482] == "<|im_end|>"
    assert keys["tokens"][485] == "<|reserved_token_485|>"
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["unknown_token_id"], keys["padding_token_id"]) == (
        480,
        482,
        510,
        511,
    )
    assert keys["tokenizer.chat_template"] == (tmp_path / "chat_template.jinja").read_text()
    assert "add_bos_token" not in keys


def test_the_learnt_merges_come_back(tmp_path):
    """The tiny ranks were learnt by `tokenizers`, which keeps its merges: rebuilding them must give the same, in
    order."""
    write_kimi_tokenizer(tmp_path, 512)
    write_tokenizer_json(tmp_path, "deepseek-v3", 512)
    learnt = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    merges = read_kimi_vocabulary(tmp_path, 512).merges
    assert merges == [merge if isinstance(merge, str) else " ".join(merge) for merge in learnt]
    assert len(merges) == NUM_PIECES - 256


def test_a_piece_that_merging_cannot_reach_has_no_merge():
    pieces = [b"a", b"b", b"c", b"abc", b"ab"]
    assert list(make_merges(pieces)) == [(b"a", b"b")]


@pytest.mark.skipif(not KIMI.is_dir(), reason="needs ../shared/data/kimi-tokenizer")
def test_the_real_kimi_ranks():
    config = json.loads((KIMI / "config.json").read_text())
    keys = values(tokenizer_metadata(KIMI, config | config["text_config"]))
    assert len(keys["tokens"]) == 163_840
    assert len(keys["merges"]) == 163_328
    assert keys["tokens"][19180] == "Hello"
    assert keys["tokens"][163_586] == "<|im_end|>"
    assert keys["tokens"][163_589] == "<|reserved_token_163589|>"
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["padding_token_id"]) == (163_584, 163_586, 163_839)
    ranks = {bytes_to_text(piece): rank for rank, piece in enumerate(read_ranks(KIMI / "tiktoken.model"))}
    assert all(keys["tokens"][rank] == piece for piece, rank in ranks.items())
    merged = [ranks[merge.replace(" ", "")] for merge in keys["merges"]]
    assert merged == sorted(merged)  # a merge stands where its piece stands


@pytest.mark.parametrize("pre", ["deepseek-v3", "deepseek-llm"])
def test_tokenizer_json_folder(tmp_path, pre):
    write_tokenizer_json(tmp_path, pre, 512)
    keys = values(tokenizer_metadata(tmp_path, {"vocab_size": 512, "eos_token_id": [7, 8]}))
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert keys["pre"] == pre
    assert all(keys["tokens"][i] == token for token, i in fast.get_vocab().items())
    assert [keys["token_type"][i] for i in (0, 3, NUM_PIECES + 3, 511)] == [CONTROL, NORMAL, USER_DEFINED, UNUSED]
    assert keys["tokens"][511] == "[PAD511]"
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["padding_token_id"]) == (0, 1, 2)
    assert keys["add_bos_token"] is True
    assert keys["tokenizer.chat_template"].startswith("{% for message in messages %}")


def test_the_end_of_a_turn_is_generation_configs(tmp_path):
    write_tokenizer_json(tmp_path, "deepseek-v3", 512)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert values(tokenizer_metadata(tmp_path, {"vocab_size": 512}))["eos_token_id"] == 5


def test_round_trip_through_the_file(tmp_path):
    make_checkpoint(tmp_path, "kimi", n_routed_experts=4)
    convert(tmp_path, tmp_path / "out.gguf", "q8_0")
    fields = GGUFReader(tmp_path / "out.gguf").fields
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in tokenizer_metadata(tmp_path, config).items():
        assert fields[key].contents() == value.value, key
        assert fields[key].types == [
            value.value_type,
            *([value.element_type] if value.element_type is not None else []),
        ], key


def test_llama_cpp_cuts_text_as_tokenizers_does(tmp_path):
    """Another program reads the tokens and merges: ordinary text must come out the same."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the ggml extra")
    make_checkpoint(tmp_path, "deepseek_v3", n_routed_experts=8, n_group=1, topk_group=1)
    convert(tmp_path, tmp_path / "out.gguf", "q8_0")
    llama = llama_cpp.Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False)
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("The weights of a model", "don't count 1234567 numbers!", "naïve 世界 cafés\n\n  end"):
        assert llama.tokenize(text.encode(), add_bos=False) == fast.encode(text).ids, text


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("tiktoken.model", "YQ== 0\nYg== 2\n", "line 2: need rank 1, have 2"),
        ("tiktoken.model", "YQ== 0\n!!! 1\n", "line 2"),
        ("tiktoken.model", "YQ==\n", "line 1"),
        ("tiktoken.model", "".join(f"YQ== {i}\n" for i in range(600)), "600 ranks, config.json a vocabulary of 512"),
        ("tokenizer.json", '{"model": {"type": "Unigram"}}', "is 'Unigram'"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 512}, "merges": []}}', "token 512 'a'"),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Metaspace"}}',
            "not known here",
        ),
        ("vocab.txt", "", "neither tiktoken.model nor tokenizer.json"),
    ],
)
def test_damaged_or_unknown_tokenizers_are_refused(tmp_path, name, content, word):
    (tmp_path / name).write_text(content)
    with pytest.raises(KimiLiteError, match=word):
        tokenizer_metadata(tmp_path, CONFIG)


@pytest.mark.parametrize("pre", SPLITS)
def test_every_pre_tokenizer_that_can_be_read_can_be_written(tmp_path, pre):
    """One table for both halves: the row of each name, as a tokenizer.json has it, gets that name, and the file that
    is written cuts and encodes as the `tokenizers` library does."""
    if pre == "kimi-k2":
        pytest.skip("Kimi's folders have tiktoken.model")
    write_tokenizer_json(tmp_path, "deepseek-v3", 512)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    steps = [{**split, "pattern": {"Regex": expression}} for expression in SPLITS[pre]]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, last]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    keys = tokenizer_metadata(tmp_path, {"vocab_size": 512})
    assert keys["tokenizer.ggml.pre"].value == pre
    read = {key: np.array(v.value, np.int32) if key.endswith("token_type") else v.value for key, v in keys.items()}
    ours, theirs = text_tokenizer.Tokenizer.from_metadata(read), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("Hello world, it's 2026: 12345!", "  two  spaces\n\n\ttab", "日本語と中文 naïve ÄÖ", "x=1;y+=22"):
        assert list(ours.encode(text)) == theirs.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"normalizer": {"type": "NFC"}}, "changes text before it is cut"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "a step that is not known"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed"}}, "not known here"),
    ],
)
def test_what_a_file_cannot_say_is_refused_at_conversion(tmp_path, change, word):
    write_tokenizer_json(tmp_path, "deepseek-v3", 512)
    content = json.loads((tmp_path / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(KimiLiteError, match=word):
        tokenizer_metadata(tmp_path, {"vocab_size": 512})


@pytest.mark.parametrize("change", [lambda b: b + b"\n\n", lambda b: b.replace(b"\n", b"\r\n"),
                                    lambda b: b"\xef\xbb\xbf" + b, lambda b: b.rstrip(b"\n")])  # fmt: skip
def test_line_ends_and_marks_of_editors_are_no_damage(tmp_path, change):
    write_kimi_tokenizer(tmp_path, 600)
    file = tmp_path / "tiktoken.model"
    wanted = read_ranks(file)
    file.write_bytes(change(file.read_bytes()))
    assert read_ranks(file) == wanted
