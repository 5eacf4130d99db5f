"""One batch as the device sees it: rotations, rows of the cache, and which rows attend in which form.

Absorbed rows (decoding, short slices) are described by tables of fixed shapes, so that a captured CUDA graph can be run
again with other contents; expanded slices (prompts) are Python objects, as no graph runs them. Made by
`HybridTransformer.forward`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.rope import rope_attention_factor, rope_inverse_frequencies
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.model.hybrid.kernels import Angles
from kimi_lite.native.latent_rows import PAGE_TOKENS, MlaShape

_MAX_ABSORBED_TOKENS = 64  # rows of a long batch that attend in the absorbed form; longer slices are expanded


@dataclass(frozen=True, slots=True, eq=False)
class ExpandedSlice:
    """Rows start .. start + length, which see the positions 0 .. num_positions of their sequence."""

    start: int
    length: int
    num_positions: int
    pages: torch.Tensor  # int64 (ceil(num_positions / 64),)


@dataclass(slots=True, eq=False)
class Step:
    """T tokens on the device."""

    angles: Angles  # (T, rope / 2)
    cache_rows: torch.Tensor  # int64 (T,): page * 64 + offset; -1: padding, which is written nowhere
    page_table: torch.Tensor  # int32 (rows that attend absorbed, pages)
    lengths: torch.Tensor  # int32 (rows that attend absorbed,), positions that each sees
    absorbed: torch.Tensor | None  # int64, which rows attend absorbed; None: all
    expanded: list[ExpandedSlice] = field(default_factory=list)
    is_decoding: bool = True  # every sequence has one token


class StepMaker:
    """Turns batches into steps."""

    def __init__(self, config: ModelConfig, streams: GpuStreams) -> None:
        self._streams = streams
        self._frequencies = rope_inverse_frequencies(config)  # (rope / 2,)
        self._factor = rope_attention_factor(config)

    def make(self, batch: Batch, expanded: list[SequenceSlice], num_rows: int = 0, num_pages: int = 0) -> Step:
        """`expanded`: slices that attend in the expanded form. num_rows, num_pages: at least so many, for a graph's
        shapes."""
        num_tokens = max(len(batch.token_ids), num_rows)
        cache_rows = np.full(num_tokens, -1, np.int64)
        cache_rows[: len(batch.token_ids)] = batch.cache_rows()
        angles = np.zeros((num_tokens, len(self._frequencies)))
        angles[: len(batch.positions)] = batch.positions[:, None] * self._frequencies
        expanded_starts = {piece.start for piece in expanded}
        absorbed = [piece for piece in batch.sequences if piece.start not in expanded_starts]
        rows = np.concatenate([np.arange(p.start, p.start + p.length) for p in absorbed] or [np.empty(0, np.int64)])
        page_table, lengths = _absorbed_tables(batch, absorbed, num_rows or len(rows), num_pages)
        to = self._to_device
        return Step(
            angles=Angles(
                cos=to(np.cos(angles) * self._factor, torch.float32),
                sin=to(np.sin(angles) * self._factor, torch.float32),
            ),
            cache_rows=to(cache_rows, torch.int64),
            page_table=to(page_table, torch.int32),
            lengths=to(lengths, torch.int32),
            absorbed=to(rows, torch.int64) if expanded else None,
            expanded=[self._expanded(batch, piece) for piece in expanded],
            is_decoding=is_decoding(batch),
        )

    def _expanded(self, batch: Batch, piece: SequenceSlice) -> ExpandedSlice:
        num_positions = int(batch.positions[piece.start]) + piece.length
        pages = self._to_device(piece.pages[: -(-num_positions // PAGE_TOKENS)], torch.int64)
        return ExpandedSlice(piece.start, piece.length, num_positions, pages)

    def _to_device(self, array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(dtype).to(self._streams.device)


def is_decoding(batch: Batch) -> bool:
    """Whether every sequence has one token."""
    return len(batch.sequences) == len(batch.token_ids)


def num_pages_seen(batch: Batch) -> int:
    """Pages of the longest context in the batch."""
    return int(batch.positions.max()) // PAGE_TOKENS + 1


def _absorbed_tables(
    batch: Batch, pieces: list[SequenceSlice], num_rows: int, num_pages: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32 (rows, pages) and (rows,); rows beyond the batch's see no position."""
    num_pages = max(num_pages, num_pages_seen(batch))
    page_table, lengths = np.zeros((num_rows, num_pages), np.int32), np.zeros(num_rows, np.int32)
    row = 0
    for piece in pieces:
        count = min(num_pages, len(piece.pages))
        page_table[row : row + piece.length, :count] = piece.pages[:count]
        lengths[row : row + piece.length] = batch.positions[piece.start : piece.start + piece.length] + 1
        row += piece.length
    return page_table, lengths


def expanded_is_cheaper(length: int, shape: MlaShape) -> bool:
    """Whether `length` new tokens of a sequence repay making keys and values: multiply-adds per cached position and
    head."""
    saved = (shape.kv_lora + shape.latent) - (shape.nope + shape.rope + shape.value)
    return length * saved > shape.kv_lora * (shape.nope + shape.value)


def choose_expanded(sequences: Sequence[SequenceSlice], shape: MlaShape) -> list[SequenceSlice]:
    """The slices whose attention is expanded: those where it is cheaper, and the longest beyond what absorbed rows
    allow."""
    absorbed = sorted((p for p in sequences if not expanded_is_cheaper(p.length, shape)), key=lambda p: p.length)
    while sum(p.length for p in absorbed) > _MAX_ABSORBED_TOKENS:
        absorbed.pop()
    kept = {id(p) for p in absorbed}
    return [p for p in sequences if id(p) not in kept]
