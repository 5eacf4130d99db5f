"""A `tokenizer.json` with byte-level BPE (DeepSeek's and most others') as a GGUF vocabulary.

GGUF does not store the pre-tokenizer but a name for it, which the runtime must know; here it is recognised by its
patterns.
"""

import json
from pathlib import Path

from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.source.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, Vocabulary

_PRE_BY_PATTERN = {  # a piece that only this pre-tokenizer's pattern has -> llama.cpp's name
    r"[\p{Han}]+": "kimi-k2",
    "[一-龥\u3040-ゟ゠-ヿ]+": "deepseek-v3",
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ": "deepseek-llm",
}


def read_hf_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """From tokenizer.json. Raises KimiLiteError where it is not byte-level BPE with a known pre-tokenizer."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise KimiLiteError(f"{file} is {model.get('type')}, and only byte-level BPE is converted.")
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    entries = [(i, token, NORMAL) for token, i in model["vocab"].items()]
    entries += [
        (a["id"], a["content"], CONTROL if a["special"] else USER_DEFINED) for a in content.get("added_tokens", [])
    ]
    for i, token, kind in entries:
        if i >= vocab_size:
            raise KimiLiteError(f"{file} has token {i:,} {token!r}, config.json a vocabulary of {vocab_size:,}.")
        tokens[i], types[i] = token, kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(_recognise(content, file), tokens, types, merges)


def _recognise(content: dict, file: Path) -> str:
    pre = content.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers") or [pre]
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    for known, name in _PRE_BY_PATTERN.items():
        if any(known in pattern for pattern in patterns):
            return name
    kinds = [step.get("type") for step in steps]
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    known_names = ", ".join([*_PRE_BY_PATTERN.values(), "smollm", "gpt-2"])
    raise KimiLiteError(
        f"{file} cuts text by {patterns or kinds}, a pre-tokenizer not known here.", f"Known are {known_names}."
    )
