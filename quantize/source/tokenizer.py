"""The `tokenizer.*` keys of a GGUF file, from a checkpoint folder's tokenizer files.

Two kinds of folder: Moonshot's, with `tiktoken.model`, and those with a fast byte-level `tokenizer.json`.
"""

from collections.abc import Mapping
from pathlib import Path

from kimi_lite.arch.checkpoint import read_json_object
from kimi_lite.arch.reader import shown
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import Value, array, boolean, text, u32
from kimi_lite.quantize.source.hf_tokenizer import read_hf_vocabulary
from kimi_lite.quantize.source.kimi_tokenizer import read_kimi_vocabulary
from kimi_lite.quantize.source.vocabulary import SourceVocabulary

TOKENIZER_FILES = (
    "tiktoken.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip

_KIMI_END_OF_TURN = "<|im_end|>"
_KEY_BY_ROLE = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


def tokenizer_metadata(folder: Path, config: Mapping) -> dict[str, Value]:
    """Tokens, merges, control ids and the chat template; `config` are config.json's checked fields. Raises
    KimiLiteError where there is no tokenizer to convert."""
    if (folder / "tiktoken.model").is_file():
        vocabulary = read_kimi_vocabulary(folder, config["vocab_size"])
    elif (folder / "tokenizer.json").is_file():
        vocabulary = read_hf_vocabulary(folder, config["vocab_size"])
    else:
        raise KimiLiteError(
            f"{folder} has neither tiktoken.model nor tokenizer.json.", "Download the tokenizer's files too."
        )
    settings = _read_json(folder / "tokenizer_config.json")
    keys = {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(vocabulary.pre),
        "tokenizer.ggml.tokens": array(vocabulary.tokens),
        "tokenizer.ggml.token_type": array(vocabulary.types),
    }
    if vocabulary.merges:  # a GGUF array cannot be empty
        keys["tokenizer.ggml.merges"] = array(vocabulary.merges)
    keys |= {f"tokenizer.ggml.{key}": u32(i) for key, i in _find_ids(folder, config, settings, vocabulary).items()}
    for flag in ("add_bos_token", "add_eos_token"):
        if isinstance(settings.get(flag), bool):
            keys[f"tokenizer.ggml.{flag}"] = boolean(settings[flag])
    template = _read_chat_template(folder, settings)
    if template:
        keys["tokenizer.chat_template"] = text(template)
    return keys


def _find_ids(folder: Path, config: Mapping, settings: Mapping, vocabulary: SourceVocabulary) -> dict[str, int]:
    """Control ids by key. The end of a turn is generation_config.json's (K2.5's config.json names another), and Kimi's
    own where that file is missing; else tokenizer_config.json names them, else config.json."""
    ids = {}
    for role, key in _KEY_BY_ROLE.items():
        named = settings.get(f"{role}_token")
        named = named.get("content") if isinstance(named, Mapping) else named
        found = vocabulary.find(named) if isinstance(named, str) else None
        ids[key] = config.get(f"{role}_token_id") if found is None else found
    generation = _read_json(folder / "generation_config.json")
    own = vocabulary.find(_KIMI_END_OF_TURN)
    stated = generation.get("eos_token_id")
    if stated is not None or own is not None:
        ids["eos_token_id"] = own if stated is None else stated
    firsts = {key: i[0] if isinstance(i, list) and i else i for key, i in ids.items()}
    for key, i in firsts.items():
        if i is not None and (type(i) is not int or not 0 <= i < len(vocabulary.tokens)):
            raise KimiLiteError(
                f"{folder}: {key} is {shown(i)}, and must be a token's id, 0 to {len(vocabulary.tokens) - 1:,}.",
                "Download generation_config.json and config.json again.",
            )
    return {key: i for key, i in firsts.items() if i is not None}


def _read_chat_template(folder: Path, settings: Mapping) -> str:
    """Newer folders keep it in a file of its own, older ones in tokenizer_config.json, sometimes as a list of named
    ones."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise KimiLiteError(f"{file} cannot be read as UTF-8: {error}.", "Download it again.") from error
    template = settings.get("chat_template") or ""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default") or ""
    if not isinstance(template, str):
        problem = f"{folder / 'tokenizer_config.json'}: chat_template is {shown(template)}, and must be a text"
        raise KimiLiteError(f"{problem}.", "Download it again.")
    return template


def _read_json(file: Path) -> dict:
    return read_json_object(file) if file.is_file() else {}
