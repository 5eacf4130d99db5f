"""A `tokenizer.json` with byte-level BPE (DeepSeek's and most others') as a GGUF vocabulary.

GGUF does not store the pre-tokenizer but a name for it: `kimi_lite.text.pretokenizers` has the one table of names and
expressions, so what is written here can be read there. What a GGUF file cannot say (a normalizer, a prefix space) is
refused.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from kimi_lite.arch.checkpoint import inner_object, read_json_object
from kimi_lite.arch.reader import shown
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.source.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, SourceVocabulary
from kimi_lite.text.pretokenizers import SPLITS, name_of

_DOWNLOAD_HINT = "Download the file again."
_BYTE_LEVEL_SPLIT = SPLITS["gpt-2"][0]  # what tokenizers' ByteLevel cuts by


def read_hf_vocabulary(folder: Path, vocab_size: int) -> SourceVocabulary:
    """From tokenizer.json. Raises KimiLiteError where it is not byte-level BPE with a known pre-tokenizer."""
    file = folder / "tokenizer.json"
    content = read_json_object(file)
    model = inner_object(content, "model", str(file))
    _check_model(file, content, model)
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for i, token, kind in _entries(file, content, model):
        if i >= vocab_size:
            raise KimiLiteError(
                f"{file} has token {i:,} {shown(token)}, config.json a vocabulary of {vocab_size:,}.", _DOWNLOAD_HINT
            )
        tokens[i], types[i] = token, kind
    return SourceVocabulary(_recognise(content, file), tokens, types, list(_merges(file, model)))


def _check_model(file: Path, content: Mapping, model: Mapping) -> None:
    """Raises KimiLiteError for what changes ids and has no place in a GGUF file."""
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise KimiLiteError(f"{file} is {shown(model.get('type'))}, and only byte-level BPE is converted.")
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "dropout"):
        if model.get(field):
            problem = f"{file} has {field} = {shown(model[field])}"
            raise KimiLiteError(f"{problem}, which a GGUF file cannot say.", "Only plain byte-level BPE is converted.")
    normalizer = inner_object(content, "normalizer", str(file))
    steps = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
    if normalizer and steps:
        raise KimiLiteError(
            f"{file} changes text before it is cut ({shown(normalizer)}), which a GGUF file cannot say.",
            "Only tokenizers without a normalizer are converted.",
        )


def _entries(file: Path, content: Mapping, model: Mapping) -> Iterator[tuple[int, str, int]]:
    """(id, text, type) of every token; added ones come last, and count."""
    for token, i in inner_object(model, "vocab", str(file)).items():
        yield _checked_id(file, i, token), token, NORMAL
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise KimiLiteError(f"{file}: added_tokens is {shown(added)}, and must be a list.", _DOWNLOAD_HINT)
    for entry in added:
        token = entry if isinstance(entry, dict) else {}
        if not isinstance(token.get("content"), str):
            raise KimiLiteError(f"{file}: an added token is {shown(entry)}, without a content.", _DOWNLOAD_HINT)
        kind = CONTROL if token.get("special") else USER_DEFINED
        yield _checked_id(file, token.get("id"), token["content"]), token["content"], kind


def _checked_id(file: Path, i: object, token: str) -> int:
    if type(i) is not int or i < 0:
        raise KimiLiteError(f"{file}: token {shown(token)} has id {shown(i)}.", _DOWNLOAD_HINT)
    return i


def _merges(file: Path, model: Mapping) -> Iterator[str]:
    """ "left right" each; newer files have pairs, in which a piece may hold a space."""
    merges = model.get("merges") or []
    for merge in merges if isinstance(merges, list) else [merges]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(piece, str) and piece for piece in pair):
            raise KimiLiteError(f"{file}: the merge {shown(merge)} is not two pieces.", _DOWNLOAD_HINT)
        yield " ".join(pair)


def _recognise(content: Mapping, file: Path) -> str:
    """The pre-tokenizer's name. Raises KimiLiteError."""
    pre = inner_object(content, "pre_tokenizer", str(file))
    steps = pre.get("pretokenizers") if pre.get("type") == "Sequence" else [pre]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise KimiLiteError(f"{file}: its pre_tokenizer is {shown(pre)}.", _DOWNLOAD_HINT)
    expressions = [expression for step in steps for expression in _expressions(step, file)]
    name = name_of(expressions)
    if name is None:
        shown_row = shown(expressions) if expressions else "no known rule"
        problem = f"{file} cuts text by {shown_row}, a pre-tokenizer not known here"
        raise KimiLiteError(f"{problem}.", f"Known are {', '.join(SPLITS)}.")
    return name


def _expressions(step: Mapping, file: Path) -> Iterator[str]:
    """What a step cuts by. Raises KimiLiteError for a kind of step that is not known."""
    kind, pattern = step.get("type"), step.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    is_isolated = step.get("behavior", "Isolated") == "Isolated" and not step.get("invert")
    if kind == "Split" and isinstance(expression, str) and is_isolated:
        yield expression
    elif kind == "Digits":
        yield r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    elif kind == "ByteLevel" and not step.get("add_prefix_space"):
        if step.get("use_regex", True):
            yield _BYTE_LEVEL_SPLIT
    else:
        raise KimiLiteError(
            f"{file} cuts text by a step that is not known here: {shown(step)}.", f"Known are {', '.join(SPLITS)}."
        )
