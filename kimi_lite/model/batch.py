"""The work of one forward pass: tokens of several sequences, flattened, with the pages their cache lies in.

Made by `engine.scheduler`, consumed by `model.cpu.transformer`. A decode step is a batch whose slices have length 1; a
prefill chunk is one long slice; both may share a batch.

Sums of floats depend on their order, and kernels for one token and for many add in different orders. Which ones a token
takes is a matter of what it is: tokens that were generated take one kind, tokens of prompts the other, however many of
either are in the batch. So a token's result depends on nothing but the tokens before it and what they are.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from kimi_lite.native.latent_rows import PAGE_TOKENS


class Cancelled(Exception):
    """`Transformer.forward` stopped between layers because `should_stop()` said so; the batch's cache rows are
    undefined."""


@dataclass(frozen=True, slots=True, eq=False)
class SequenceSlice:
    """Rows `start .. start+length` of a batch: consecutive positions of one sequence."""

    start: int
    length: int
    pages: np.ndarray  # (ceil(context / 64),) int32; position p lies in pages[p // 64], row p % 64
    is_generated: bool = False  # also where they are computed again; False: of a prompt


class Features(NamedTuple):
    """What stands in place of some rows' token embeddings: images, as the vision tower sees them."""

    rows: np.ndarray  # (F,) int64, ascending, of the batch
    values: np.ndarray  # (F, D) float32


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """T tokens of S sequences. Every token attends to its own sequence's positions up to and including its own."""

    token_ids: np.ndarray  # (T,) int32
    positions: np.ndarray  # (T,) int32, consecutive inside a slice
    wants_logits: np.ndarray  # (T,) bool; forward returns one row for each True
    sequences: tuple[SequenceSlice, ...]  # cover the rows 0..T in order, those that were generated first
    features: Features | None = None

    def __post_init__(self) -> None:
        num_tokens = sum(s.length for s in self.sequences)
        for array, dtype in ((self.token_ids, np.int32), (self.positions, np.int32), (self.wants_logits, np.bool_)):
            assert (array.shape, array.dtype) == ((num_tokens,), dtype), (array.shape, array.dtype, num_tokens)
        if self.features:
            rows, values = self.features
            assert (rows.dtype, values.dtype) == (np.int64, np.float32), (rows.dtype, values.dtype)
            assert rows.ndim == 1 and values.ndim == 2 and len(rows) == len(values), (rows.shape, values.shape)
            assert (np.diff(rows) > 0).all() and rows.min(initial=0) >= 0 and rows.max(initial=0) < num_tokens, rows
        kinds = [s.is_generated for s in self.sequences]
        assert kinds == sorted(kinds, reverse=True), kinds
        start = 0
        for s in self.sequences:
            assert s.start == start, (s.start, start)
            assert s.length > 0, s.length
            assert (s.pages.dtype, s.pages.ndim) == (np.int32, 1), (s.pages.dtype, s.pages.ndim)
            start += s.length
            first, last = int(self.positions[s.start]), int(self.positions[start - 1])
            assert last - first == s.length - 1, (first, last, s.length)
            assert 0 <= first <= last < PAGE_TOKENS * len(s.pages), (first, last, len(s.pages))

    @property
    def num_generated(self) -> int:
        """Rows of generated tokens: the first ones."""
        return sum(s.length for s in self.sequences if s.is_generated)

    def parts(self, most: int) -> list["Batch"]:
        """The same tokens in passes of up to `most` each, to be run in this order: their logits one behind the other
        are this batch's."""
        return [
            self._part(first, min(first + most, len(self.token_ids))) for first in range(0, len(self.token_ids), most)
        ]

    def _part(self, first: int, end: int) -> "Batch":
        """Rows first .. end."""
        if (first, end) == (0, len(self.token_ids)):
            return self
        sequences = tuple(
            replace(s, start=max(s.start, first) - first, length=min(s.start + s.length, end) - max(s.start, first))
            for s in self.sequences
            if s.start < end and s.start + s.length > first
        )
        features = None
        if self.features:
            rows, values = self.features
            here = (rows >= first) & (rows < end)
            features = Features(rows[here] - first, values[here])
        cut = slice(first, end)
        return Batch(self.token_ids[cut], self.positions[cut], self.wants_logits[cut], sequences, features)

    def cache_rows(self) -> np.ndarray:
        """int64 (T,): page * 64 + offset, where each token's row of the cache is."""
        rows = np.empty(len(self.token_ids), np.int64)
        for s in self.sequences:
            positions = self.positions[s.start : s.start + s.length]
            pages = s.pages[positions // PAGE_TOKENS].astype(np.int64)
            rows[s.start : s.start + s.length] = pages * PAGE_TOKENS + positions % PAGE_TOKENS
        return rows
