"""A small valid tokenizer for slices: 256 bytes, a few merges, and Kimi's control tokens at their places from the end.

With K2.5's full vocabulary size the control tokens have K2.5's ids. No chat template: the runtime has Kimi's own. Used
by `tools.make.slice`.
"""

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import Value, array, text, u32
from kimi_lite.quantize.source.vocabulary import CONTROL, NORMAL, UNUSED, bytes_to_text

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_CONTROL = 256
CONTROL_NAMES = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>", 11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>", 14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>", 18: "<|media_begin|>", 19: "<|media_content|>", 20: "<|media_end|>", 21: "<|media_pad|>",
    22: "<think>", 23: "</think>", 254: "[UNK]", 255: "[PAD]",
}  # fmt: skip
MIN_VOCAB_SIZE = 256 + len(_LETTERS) + NUM_CONTROL


def slice_tokenizer(vocab_size: int) -> dict[str, Value]:
    """The `tokenizer.*` keys. Raises KimiLiteError where the vocabulary is smaller than what it must hold."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise KimiLiteError(
            f"--vocab is {vocab_size:,}, and the tokenizer has {MIN_VOCAB_SIZE} tokens.", "Ask for more."
        )
    space = bytes_to_text(b" ")
    tokens = [bytes_to_text(bytes([byte])) for byte in range(256)] + [space + letter for letter in _LETTERS]
    num_normal, first_control = len(tokens), vocab_size - NUM_CONTROL
    tokens += [f"[PAD{i}]" for i in range(num_normal, first_control)]
    tokens += [CONTROL_NAMES.get(i, f"<|reserved_token_{first_control + i}|>") for i in range(NUM_CONTROL)]
    types = [NORMAL] * num_normal + [UNUSED] * (first_control - num_normal) + [CONTROL] * NUM_CONTROL
    return {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text("kimi-k2"),
        "tokenizer.ggml.tokens": array(tokens),
        "tokenizer.ggml.token_type": array(types),
        "tokenizer.ggml.merges": array([f"{space} {letter}" for letter in _LETTERS]),
        "tokenizer.ggml.bos_token_id": u32(first_control),
        "tokenizer.ggml.eos_token_id": u32(first_control + 2),
        "tokenizer.ggml.padding_token_id": u32(vocab_size - 1),
    }
