"""Text for training: files as token ids, the end of each held out, batches that depend on nothing but their number.

A batch is a function of the seed and of its number, so a run that was killed goes on with what it would have seen.
`tools.texts` fetches texts that may be redistributed; `write_tokenizer` learns a byte-level vocabulary from texts and
writes it as Kimi's own tokenizer files (`tiktoken.model`), for models made from scratch.
"""

import base64
import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import MAX_CORPUS_BYTES, read_text, whole_file
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.tools.make.slice_tokenizer import CONTROL_NAMES, NUM_CONTROL

_HELD_OUT = 0.05  # of every text: its end
_WORDS = re.compile(r" ?[^\W\d_]+|\d{1,3}| ?[^\w\s]+|\s+|_")  # about where Kimi's pre-tokenizer cuts


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Token ids uint32 of all texts: what is trained on, and what is held out."""

    train: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[Path], tokenizer: Tokenizer, length: int) -> "Corpus":
        """Raises KimiLiteError where both parts are not longer than a sequence of `length`."""
        parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for path in texts:
            ids = np.array(tokenizer.encode(read_text(path, "The text", MAX_CORPUS_BYTES)), np.uint32)
            cut = len(ids) - int(len(ids) * _HELD_OUT)
            parts[0].append(ids[:cut])
            parts[1].append(ids[cut:])
        train, held_out = (np.concatenate(each) for each in parts)
        if min(len(train), len(held_out)) <= length:
            have = f"{len(train) + len(held_out):,} tokens, of which {len(held_out):,} are held out"
            raise KimiLiteError(f"The texts have {have}; more than {length} are needed.", "Give longer texts.")
        return cls(train, held_out)

    def batch(self, number: int, size: int, length: int, seed: int) -> torch.Tensor:
        """int64 (size, length + 1): pieces from random places."""
        starts = np.random.default_rng([seed, number]).integers(0, len(self.train) - length, size)
        return _pieces(self.train, starts, length)

    def held_out_batches(self, size: int, length: int, count: int) -> Iterator[torch.Tensor]:
        """Up to `count` batches (size, length + 1), spread evenly over what is held out: the same each time."""
        most = (len(self.held_out) - 1) // length
        wanted = max(1, min(most, size * count))
        starts = np.linspace(0, len(self.held_out) - length - 1, wanted).astype(np.int64)
        for first in range(0, wanted, size):
            yield _pieces(self.held_out, starts[first : first + size], length)


def _pieces(ids: np.ndarray, starts: np.ndarray, length: int) -> torch.Tensor:
    return torch.from_numpy(ids[starts[:, None] + np.arange(length + 1)].astype(np.int64))


def write_tokenizer(folder: Path, texts: Sequence[Path], vocab_size: int) -> None:
    """Kimi's tokenizer files with `vocab_size` ids, of which the last 256 are control tokens. Raises KimiLiteError."""
    num_pieces = vocab_size - NUM_CONTROL
    if num_pieces < 256:
        raise KimiLiteError(f"A vocabulary of {vocab_size} has no place for bytes and control tokens.", "Take 512.")
    counts = Counter[str]()
    for path in texts:
        counts.update(_WORDS.findall(read_text(path, "The text", MAX_CORPUS_BYTES)))
    pieces = train_pieces(counts, num_pieces)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "tiktoken.model") as file:
        file.writelines(f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces))
    first = len(pieces)
    named = {str(first + i): {"content": name, "special": True} for i, name in CONTROL_NAMES.items()}
    with whole_file(folder / "tokenizer_config.json") as file:
        json.dump({"added_tokens_decoder": named}, file, indent=1)


def train_pieces(words: Counter[str], count: int) -> list[bytes]:
    """Byte-pair encoding (Sennrich et al. 2016): the 256 bytes, then the most frequent pair of neighbours again and
    again, of equally frequent ones the first by its bytes; fewer than `count` where no pair is left."""
    pieces = [bytes([byte]) for byte in range(256)]
    split = [[bytes([byte]) for byte in word.encode()] for word in words]
    frequencies = list(words.values())
    totals, places = Counter[tuple[bytes, bytes]](), defaultdict(set)
    for index, parts in enumerate(split):
        for pair in pairwise(parts):
            totals[pair] += frequencies[index]
            places[pair].add(index)
    known, queue = set(pieces), [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(queue)
    while len(pieces) < count and queue:
        total, best = heapq.heappop(queue)
        if -total != totals[best] or not total:
            continue  # it has changed since it was put there
        if (merged := best[0] + best[1]) not in known:
            pieces.append(merged)
            known.add(merged)
        changed = set()
        for index in list(places[best]):
            before, split[index] = split[index], _merge(split[index], *best)
            for parts, sign in ((before, -1), (split[index], 1)):
                for pair in pairwise(parts):
                    totals[pair] += sign * frequencies[index]
                    changed.add(pair)
            for pair in pairwise(before):
                places[pair].discard(index)
            for pair in pairwise(split[index]):
                places[pair].add(index)
        for pair in changed:
            heapq.heappush(queue, (-totals[pair], pair))
    return pieces


def _merge(parts: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    out: list[bytes] = []
    for part in parts:
        if out and out[-1] == left and part == right:
            out[-1] = left + right
        else:
            out.append(part)
    return out
