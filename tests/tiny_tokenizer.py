"""A byte-level tokenizer of 300 tokens with Kimi's control tokens, as GGUF metadata: 256 bytes, 18 merges, 26 control
tokens.

The control tokens keep the distances of the real vocabulary ([BOS] + 2 = <|im_end|>, + 22 = <think>), so the same code
finds them. Used by `tests.tiny`.
"""

_MERGES = (
    "h e", "Ġ t", "Ġ a", "i n", "o n", "e r", "l l", "r e", "Ġt he", "Ġ s", "he ll", "hell o", "Ġ w", "o r", "Ġw or",
    "l d", "Ġwor ld", "in g",
)  # fmt: skip
_SPECIALS = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>", 11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>", 14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>", 18: "<|media_begin|>", 19: "<|media_content|>", 20: "<|media_end|>", 21: "<|media_pad|>",
    22: "<think>", 23: "</think>", 24: "[UNK]", 25: "[PAD]",
}  # fmt: skip
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5
NUM_SPECIALS = 26
FIRST_SPECIAL_ID = 256 + len(_MERGES)  # [BOS]

_CHAT_TEMPLATE = """\
{%- macro body(content) -%}
{%- if content is string -%}{{ content }}{%- elif content -%}{%- for part in content -%}{{ part["text"] }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_answer=-1) -%}
{%- for message in messages -%}
{%- if message["role"] == "assistant" and not message.get("tool_calls") -%}{%- set ns.last_answer = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}
<|im_system|>tool_declare<|im_middle|>{{ tools_ts_str | default(tools | tojson) }}<|im_end|>
{%- endif -%}
{%- for message in messages -%}
{%- set name = message.get("name") or message["role"] -%}
{%- if message["role"] == "user" -%}<|im_user|>{{ name }}<|im_middle|>{{ body(message["content"]) }}
{%- elif message["role"] == "assistant" -%}
{%- set is_kept = preserve_thinking | default(false) or (loop.index0 > ns.last_answer and thinking | default(true)) -%}
<|im_assistant|>{{ name }}<|im_middle|><think>{{ message.get("reasoning_content") or "" if is_kept }}</think>{{ body(message["content"]) }}
{%- if message.get("tool_calls") -%}
<|tool_calls_section_begin|>
{%- for call in message["tool_calls"] -%}
{%- set arguments = call["function"]["arguments"] -%}
<|tool_call_begin|>{{ call["id"] }}<|tool_call_argument_begin|>
{%- if arguments is string -%}{{ arguments }}{%- else -%}{{ arguments | tojson }}{%- endif -%}
<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>
{%- endif -%}
{%- else -%}<|im_system|>{{ name }}<|im_middle|>
{%- if message["role"] == "tool" -%}{{ "## Return of " + message["tool_call_id"] + "\\n" }}{%- endif -%}
{{ body(message["content"]) }}
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_assistant|>assistant<|im_middle|><think>{%- if not (thinking | default(true)) -%}</think>{%- endif -%}
{%- endif -%}
"""  # noqa: E501


def byte_tokens() -> list[str]:
    """The 256 single-byte tokens in GPT-2's unicode form: printable bytes stand for themselves and come first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def tokenizer_metadata(vocab_size: int) -> dict[str, object]:
    """The `tokenizer.*` keys; ids past the control tokens are unused `[PAD...]` entries, as llama.cpp's converter
    writes them."""
    first = FIRST_SPECIAL_ID
    assert vocab_size >= first + NUM_SPECIALS, (vocab_size, first + NUM_SPECIALS)
    tokens = byte_tokens() + [merge.replace(" ", "") for merge in _MERGES]
    tokens += [_SPECIALS.get(i, f"<|reserved_token_{first + i}|>") for i in range(NUM_SPECIALS)]
    types = [_NORMAL] * first + [_CONTROL] * NUM_SPECIALS + [_UNUSED] * (vocab_size - len(tokens))
    tokens += [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "kimi-k2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(_MERGES),
        "tokenizer.ggml.bos_token_id": first,
        "tokenizer.ggml.eos_token_id": first + 2,
        "tokenizer.ggml.padding_token_id": first + 25,
        "tokenizer.chat_template": _CHAT_TEMPLATE,
    }
