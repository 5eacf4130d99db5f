"""Kimi's tokenizer files as a GGUF vocabulary: `tiktoken.model` ranks become tokens and merges.

tiktoken merges the pair of lowest rank first and stores no merges; GGUF's byte-level BPE wants them. The merge that
makes a token is what the algorithm itself leaves when it may use only the tokens before it.
"""

import base64
import binascii
import codecs
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from kimi_lite.arch.checkpoint import inner_object, read_json_object
from kimi_lite.arch.reader import shown
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import require_no_pointer
from kimi_lite.quantize.source.vocabulary import CONTROL, NORMAL, UNUSED, SourceVocabulary, bytes_to_text

_PRE = "kimi-k2"  # llama.cpp's name of the pre-tokenizer
_NUM_RESERVED = 256  # control ids after the ranks; those without a name are called as Moonshot's tokenizer calls them


def read_kimi_vocabulary(folder: Path, vocab_size: int) -> SourceVocabulary:
    """From tiktoken.model and tokenizer_config.json. Raises KimiLiteError where they are damaged or too large."""
    file = folder / "tiktoken.model"
    pieces = read_ranks(file)
    if len(pieces) > vocab_size:
        raise KimiLiteError(f"tiktoken.model has {len(pieces):,} ranks, config.json a vocabulary of {vocab_size:,}.")
    if len({*pieces}) != len(pieces) or b"" in pieces:
        raise KimiLiteError(f"{file} has an empty piece, or one piece twice.", "Download the file again.")
    named = _read_added_tokens(folder / "tokenizer_config.json")
    tokens = [bytes_to_text(piece) for piece in pieces]
    types = [NORMAL] * len(pieces)
    for i in range(len(pieces), vocab_size):
        is_control = i < len(pieces) + _NUM_RESERVED
        tokens.append(named.get(i, f"<|reserved_token_{i}|>") if is_control else f"[PAD{i}]")
        types.append(CONTROL if is_control else UNUSED)
    merges = [f"{bytes_to_text(left)} {bytes_to_text(right)}" for left, right in make_merges(pieces)]
    return SourceVocabulary(_PRE, tokens, types, merges)


def read_ranks(file: Path) -> list[bytes]:
    """The pieces of a tiktoken.model in rank order: on each line a piece in base64 and its rank. Empty lines, CRLF and
    a byte order mark are no damage; tiktoken's own loader skips them too."""
    pieces: list[bytes] = []
    data = file.read_bytes()
    require_no_pointer(file, data)
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            pieces.append(base64.b64decode(piece, validate=True))
            is_in_order = int(rank) == len(pieces) - 1
        except (ValueError, binascii.Error) as error:
            shown_error = "".join(filter(str.isprintable, str(error)))[:200]
            raise KimiLiteError(f"{file}, line {number}: {shown_error}.", "Download the file again.") from error
        if not is_in_order:
            raise KimiLiteError(
                f"{file}, line {number}: need rank {len(pieces) - 1}, have {int(rank)}.", "Download the file again."
            )
    return pieces


def make_merges(pieces: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The merges in order, one for each piece that merging can reach at all: 163,328 for Kimi's 163,584 pieces."""
    rank_of = {piece: rank for rank, piece in enumerate(pieces)}
    for rank, piece in enumerate(pieces):
        if len(piece) > 1:
            halves = _merge_to_two(piece, rank, rank_of)
            if halves:
                yield halves


def _merge_to_two(piece: bytes, limit: int, rank_of: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """Byte-pair encoding of `piece` with ranks below `limit`, ended at two parts; None where it stops earlier."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    ranks = [rank_of.get(left + right, limit) for left, right in pairwise(parts)]  # of neighbours' merges
    while len(parts) > 2:
        best = min(ranks)
        if best >= limit:
            return None
        i = ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del ranks[i]
        if i > 0:
            ranks[i - 1] = rank_of.get(parts[i - 1] + parts[i], limit)
        if i < len(ranks):
            ranks[i] = rank_of.get(parts[i] + parts[i + 1], limit)
    return parts[0], parts[1]


def _read_added_tokens(file: Path) -> dict[int, str]:
    if not file.is_file():
        raise KimiLiteError(
            f"{file} is missing: it names the control tokens.", "Download it from the model's repository."
        )
    added = inner_object(read_json_object(file), "added_tokens_decoder", str(file))
    names: dict[int, str] = {}
    for i, token in added.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not (i.isascii() and i.isdecimal() and len(i) < 10 and isinstance(content, str)):
            problem = f"{file}: added_tokens_decoder has {shown(i)}: {shown(token)}, and must have ids and contents"
            raise KimiLiteError(f"{problem}.", "Download the file again.")
        names[int(i)] = content
    return names
