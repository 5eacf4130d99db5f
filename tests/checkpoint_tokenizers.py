"""Tokenizer files for `tests.checkpoints`: Kimi's `tiktoken.model`, and the `tokenizer.json` of DeepSeek V2 and V3.

All are byte-level BPE of 480 pieces learnt from a few sentences, with control tokens at Kimi's distances after them.
"""

import base64
import json
from pathlib import Path

from kimi_lite.text.pretokenizers import SPLITS

NUM_PIECES = 480
_KIMI_SPECIALS = {
    0: ("[BOS]", True), 1: ("[EOS]", True), 2: ("<|im_end|>", True), 3: ("<|im_user|>", True), 4: ("<|im_assistant|>",
    True),
    9: ("[EOT]", True), 10: ("<|im_system|>", True), 11: ("<|tool_calls_section_begin|>", False),
    12: ("<|tool_calls_section_end|>", False), 13: ("<|tool_call_begin|>", False),
    14: ("<|tool_call_argument_begin|>", False), 15: ("<|tool_call_end|>", False), 17: ("<|im_middle|>", True),
    22: ("<think>", False), 23: ("</think>", False), 30: ("[UNK]", True), 31: ("[PAD]", True),
}  # fmt: skip
_KIMI_TEMPLATE = (
    "{%- for message in messages -%}<|im_{{ message['role'] }}|>{{ message['role'] }}<|im_middle|>"
    "{{ message['content'] }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)
_DEEPSEEK_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
_SENTENCES = (
    "The weights of a model are numbers, and numbers are only as good as the arithmetic that reads them again.",
    "A tokenizer cuts text into pieces: common words become one piece, rare words several, and any byte can be "
    "written.",
    "Quantization keeps four bits of sixteen and asks which four; the answer depends on the scale of every "
    "small block.",
    "Experts are chosen for each token by a router, whose scores say how much of every chosen expert's answer "
    "is taken.",
    "When memory is slow, the fastest path is the shortest one, so the bytes that are not read are the ones that help.",
    "Grüße, naïve cafés, 世界 and 混合 text with 1234567890 digits; don't, you'll, WE'RE.",
)
_CLASS = r"[\p{L}\p{M}]"
_DEEPSEEK_V3_PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    rf"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{{|}}~][A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?{_CLASS}+| ?[\p{{P}}\p{{S}}]+[\r\n]*"""  # noqa: E501
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_LLM_PATTERNS = SPLITS["deepseek-llm"][:-1]  # the last step is Digits there


def write_kimi_tokenizer(path: Path, vocab_size: int) -> None:
    """tiktoken.model (base64 piece and rank on a line), tokenizer_config.json and chat_template.jinja, as K2.5 ships
    them."""
    byte_of = {char: byte for byte, char in _byte_to_char().items()}
    pieces = [bytes(byte_of[char] for char in token) for token in _train()]
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces)]
    (path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    added = {
        str(NUM_PIECES + offset): {"content": text, "special": special}
        for offset, (text, special) in _KIMI_SPECIALS.items()
    }
    config = {
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
    }
    (path / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "TikTokenTokenizer", "model_max_length": 2048})
    )
    (path / "chat_template.jinja").write_text(_KIMI_TEMPLATE)
    assert len(pieces) == NUM_PIECES <= vocab_size, (len(pieces), vocab_size)


def write_tokenizer_json(path: Path, pre: str, vocab_size: int) -> None:
    """tokenizer.json with the pre-tokenizer of `pre` ("deepseek-v3" or "deepseek-llm"), and tokenizer_config.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers

    trained = json.loads(_trained().to_str())
    specials = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
    old = trained["model"]["vocab"]
    trained["model"]["vocab"] = {text: i for i, text in enumerate(specials)} | {
        token: i + len(specials) for token, i in old.items()
    }
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    patterns = _DEEPSEEK_LLM_PATTERNS if pre == "deepseek-llm" else _DEEPSEEK_V3_PATTERNS
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    if pre == "deepseek-llm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    tokenizer.add_tokens([AddedToken("<｜User｜>", normalized=False, special=False)])
    tokenizer.save(str(path / "tokenizer.json"))
    added = {
        "bos_token": specials[0],
        "eos_token": {"content": specials[1]},
        "pad_token": specials[2],
        "add_bos_token": True,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(added | {"chat_template": _DEEPSEEK_TEMPLATE}))
    assert tokenizer.get_vocab_size() <= vocab_size, (tokenizer.get_vocab_size(), vocab_size)


def _train() -> list[str]:
    """Tokens in rank order: the 256 single bytes, then one for each merge."""
    vocab = _trained().get_vocab()
    return sorted(vocab, key=vocab.get)


def _trained():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_PIECES, initial_alphabet=sorted(alphabet), show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer


def _byte_to_char() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes, from their definition: printable Latin-1 stays, the other 68 follow
    U+0100."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
