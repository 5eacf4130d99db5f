"""The vocabulary a GGUF file declares, checked before anything trusts it: token bytes, merge ranks, control tokens,
added words, stop ids.

Tokens of the normal kind are written in GPT-2's byte-to-unicode alphabet; control tokens are written as they read. A
file may come from anywhere, so each fault is a sentence, not a wrong id. Keys: the GGUF specification,
`tokenizer.ggml.*`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kimi_lite.errors import KimiLiteError

KIMI_PRE = "kimi-k2"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type; 2 is unknown, 6 a byte of other models
KINDS = range(1, 7)
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_STOP_TEXTS = ("<|im_end|>", "[EOT]", "[EOS]", "<|endoftext|>", "<｜end▁of▁sentence｜>")
_KIMI_STOP_IDS = (163585, 163586, 163593)  # [EOS], <|im_end|>, [EOT]: whatever the eos key says
_CONTROL_LIKE = re.compile(
    r"<.*>|\[.*\]|\{.*\}|.*[|｜]>|<[|｜].*", re.DOTALL
)  # a user-defined token that reads like one
_REMEDY = "The file is damaged or was converted by a faulty tool: fetch it again, or convert it again."


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """V tokens. `ranks` maps the bytes of every mergeable token to its rank; `id_of_rank` is None where rank and id are
    one."""

    token_bytes: list[bytes]  # (V,) what each id stands for
    is_control: np.ndarray  # (V,) bool; control or unused: never shown
    special: dict[
        str, int
    ]  # control tokens by text, and user-defined ones that look like them: only templates write them
    words: dict[str, int]  # other user-defined tokens by text: found in plain text before it is cut
    ranks: dict[bytes, int]
    id_of_rank: list[int] | None
    eos_ids: frozenset[int]
    bos_id: int | None
    eos_id: int | None  # what the key says; a template may write it

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> "Vocabulary":
        model = metadata.get("tokenizer.ggml.model")
        if model != "gpt2":
            raise KimiLiteError(f"The tokenizer model is {model!r}; only byte-level BPE ('gpt2') can be read.", _REMEDY)
        tokens, kinds = _tokens(metadata), _kinds(metadata)
        if len(tokens) != len(kinds):
            raise KimiLiteError(f"The vocabulary has {len(tokens)} tokens but {len(kinds)} token types.", _REMEDY)
        token_bytes, ranks = _byte_tokens(tokens, kinds)
        added = _added(tokens, kinds)
        words = {text: i for text, i in added.items() if kinds[i] != CONTROL and not _CONTROL_LIKE.fullmatch(text)}
        special = {text: i for text, i in added.items() if text not in words}
        if words:  # one that reads as a normal token is written is that token, as `tokenizers` has it
            words |= {tokens[i]: i for i in np.flatnonzero(kinds == NORMAL).tolist() if tokens[i] in words}
        id_of_rank = None
        merges = metadata.get("tokenizer.ggml.merges")
        # Kimi's ids are its ranks; a merge list in its files was only derived from them.
        if merges is not None and metadata.get("tokenizer.ggml.pre") != KIMI_PRE:
            ranks, id_of_rank = _ranks_of_merges(merges, tokens, ranks, token_bytes)
        bos_id, eos_id = (_id(metadata, key, len(tokens)) for key in ("bos_token_id", "eos_token_id"))
        eos_ids = _stop_ids(metadata, kinds, special)
        is_control = np.isin(kinds, (CONTROL, UNUSED))
        return cls(token_bytes, is_control, special, words, ranks, id_of_rank, eos_ids, bos_id, eos_id)


def _tokens(metadata: Mapping[str, object]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(type(token) is str for token in tokens):
        raise KimiLiteError("The file has no list of token texts (tokenizer.ggml.tokens).", _REMEDY)
    return tokens


def _kinds(metadata: Mapping[str, object]) -> np.ndarray:
    """Without the token types nothing tells a control token from text, so they are required."""
    kinds = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, np.ndarray) or kinds.ndim != 1 or kinds.dtype.kind not in "iu":
        raise KimiLiteError("The file has no list of token types (tokenizer.ggml.token_type).", _REMEDY)
    wrong = np.flatnonzero((kinds < KINDS.start) | (kinds >= KINDS.stop))
    if wrong.size:
        raise KimiLiteError(
            f"Token {wrong[0]} has type {kinds[wrong[0]]}; types are {KINDS.start} to {KINDS.stop - 1}.", _REMEDY
        )
    return kinds


def byte_alphabet() -> np.ndarray:
    """GPT-2's alphabet as a table: character code -> byte, -1 where the character stands for none. (324,) int16."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)).difference(shown))
    table = np.full(256 + len(hidden), -1, np.int16)
    table[shown] = shown
    table[256:] = hidden
    return table


def _byte_tokens(tokens: list[str], kinds: np.ndarray) -> tuple[list[bytes], dict[bytes, int]]:
    """All tokens as bytes, and the normal ones with their ids. One table look-up for the whole vocabulary: start-up
    time."""
    ids = np.flatnonzero(kinds == NORMAL)
    texts = [tokens[i] for i in ids]
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)  # (characters,)
    table = byte_alphabet()
    values = table[np.minimum(codes, len(table) - 1)]
    values[codes >= len(table)] = -1
    ends = np.cumsum([len(text) for text in texts])
    bad = np.flatnonzero(values < 0)
    if bad.size:
        i = int(np.searchsorted(ends, bad[0], side="right"))
        raise KimiLiteError(f"Token {ids[i]} {texts[i][:40]!r} has characters outside the byte alphabet.", _REMEDY)
    blob, bounds = values.astype(np.uint8).tobytes(), [0, *ends.tolist()]
    normal = [blob[start:end] for start, end in pairwise(bounds)]
    ranks = dict(zip(normal, ids.tolist(), strict=True))
    _check_distinct(normal, ids, ranks)
    try:
        token_bytes = [
            b"" if kind == NORMAL else token.encode() for token, kind in zip(tokens, kinds.tolist(), strict=True)
        ]
    except UnicodeEncodeError as error:
        raise KimiLiteError(f"A control token's text is not Unicode: {error.object[:40]!r}.", _REMEDY) from None
    for data, i in ranks.items():
        token_bytes[i] = data
    return token_bytes, ranks


def _check_distinct(normal: list[bytes], ids: np.ndarray, ranks: dict[bytes, int]) -> None:
    if b"" in ranks:
        raise KimiLiteError(f"Token {ranks[b'']} is empty.", _REMEDY)
    if len(ranks) != len(normal):
        i = next(i for i, data in enumerate(normal) if ranks[data] != ids[i])
        raise KimiLiteError(f"Tokens {ids[i]} and {ranks[normal[i]]} are the same bytes {normal[i][:40]!r}.", _REMEDY)


def _added(tokens: list[str], kinds: np.ndarray) -> dict[str, int]:
    """Control and user-defined tokens by text."""
    added: dict[str, int] = {}
    for i in np.flatnonzero((kinds == CONTROL) | (kinds == USER_DEFINED)).tolist():
        if not tokens[i] or tokens[i] in added:
            raise KimiLiteError(f"Control token {i} {tokens[i][:40]!r} is empty or occurs twice.", _REMEDY)
        added[tokens[i]] = i
    return added


def _ranks_of_merges(
    merges: object, tokens: list[str], ids: dict[bytes, int], token_bytes: list[bytes]
) -> tuple[dict[bytes, int], list[int] | None]:
    """Ranks in the order of the merge list. Merging makes only single bytes and merge results, so only they get one."""
    if not isinstance(merges, list) or not all(type(merge) is str for merge in merges):
        raise KimiLiteError("The merge list (tokenizer.ggml.merges) is not a list of texts.", _REMEDY)
    id_of_text = {tokens[i]: i for i in ids.values()}
    singles = [i for data, i in ids.items() if len(data) == 1]
    reachable, made, last = set(singles), [], -1  # made: ids in merge order
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        result = id_of_text.get(left + right, -1)
        if result < 0 or id_of_text.get(left) not in reachable or id_of_text.get(right) not in reachable:
            raise KimiLiteError(
                f"Merge {number} {merge[:80]!r} uses or makes a token that is not there (yet).", _REMEDY
            )
        if result == last:
            continue  # the same token from another pair: converters list every pair, one after another
        if result in reachable:
            raise KimiLiteError(f"Merge {number} {merge[:80]!r} makes a token that an earlier merge made.", _REMEDY)
        reachable.add(result)
        made.append(result)
        last = result
    order = singles + made
    if made == sorted(made):
        return {token_bytes[i]: i for i in order}, None
    return {token_bytes[i]: rank for rank, i in enumerate(order)}, order


def _id(metadata: Mapping[str, object], name: str, vocab_size: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < vocab_size:
        raise KimiLiteError(
            f"tokenizer.ggml.{name} is {value!r}; the vocabulary has the ids 0 to {vocab_size - 1}.", _REMEDY
        )
    return value


def _stop_ids(metadata: Mapping[str, object], kinds: np.ndarray, special: Mapping[str, int]) -> frozenset[int]:
    """Where generation ends: what the keys say, the well-known end-of-turn tokens, and for Kimi its three whatever they
    say."""
    named: Sequence[int | None] = [_id(metadata, key, len(kinds)) for key in _STOP_KEYS]
    known = [special[text] for text in _STOP_TEXTS if text in special]
    if metadata.get("tokenizer.ggml.pre") == KIMI_PRE:
        known += [i for i in _KIMI_STOP_IDS if i < len(kinds)]
    return frozenset(i for i in named if i is not None) | {i for i in known if kinds[i] == CONTROL}
