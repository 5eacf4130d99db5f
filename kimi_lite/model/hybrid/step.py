"""One batch as the device sees it: rotations, rows of the cache, and which rows attend in which form.

Absorbed rows (decoding, short slices) are described by tables, expanded slices (prompts) by Python objects, which no
CUDA graph can hold. `StepMaker` makes a long batch's; what a captured decode step reads lies in `StepInputs`, which
never move.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.rope import rope_attention_factor, rope_inverse_frequencies
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.model.hybrid.kernels import Angles
from kimi_lite.native.latent_rows import PAGE_TOKENS, MlaShape

_ALIGNMENT = 256  # bytes, of what one copy brings
_MAX_ABSORBED_TOKENS = 64  # rows of slices of several tokens that attend absorbed; the others are expanded


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


class HostStep(NamedTuple):
    """T tokens before they are on the device; the fields of `Step` with these names."""

    cos: np.ndarray  # float32 (T, rope / 2)
    sin: np.ndarray
    cache_rows: np.ndarray  # int64 (T,)
    page_table: np.ndarray  # int32 (rows that attend absorbed, pages)
    lengths: np.ndarray  # int32 (rows that attend absorbed,)


class StepInputs:
    """What decode steps of one shape read, on the device: `x` (R, D), `step`, all rows of which attend absorbed, and
    `first`, int64 (1,), the number before the step's first turn. Written on the host, uploaded by one copy."""

    def __init__(self, config: ModelConfig, streams: GpuStreams, num_rows: int, num_pages: int) -> None:
        c, half = config, config.qk_rope_head_dim // 2
        fields = {
            "first": ((1,), torch.int64),
            "cache_rows": ((num_rows,), torch.int64),
            "x": ((num_rows, c.hidden_size), torch.float32),
            "cos": ((num_rows, half), torch.float32),
            "sin": ((num_rows, half), torch.float32),
            "page_table": ((num_rows, num_pages), torch.int32),
            "lengths": ((num_rows,), torch.int32),
        }
        sizes = [-(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape, dtype in fields.values()]
        self._streams, self.num_rows, self.num_pages = streams, num_rows, num_pages
        self._host = streams.pinned((sum(sizes),), torch.uint8)
        self._device = streams.zeros((sum(sizes),), torch.uint8)
        self._written = {name: part.numpy() for name, part in _parts(self._host, fields, sizes)}
        parts = dict(_parts(self._device, fields, sizes))
        self.x, self.first = parts["x"], parts["first"]
        self.step = Step(
            angles=Angles(parts["cos"], parts["sin"]),
            cache_rows=parts["cache_rows"],
            page_table=parts["page_table"],
            lengths=parts["lengths"],
            absorbed=None,
        )

    def set(self, x: np.ndarray, step: HostStep) -> None:
        """x float32 (num_rows, D)."""
        for name, array in {"x": x, **step._asdict()}.items():
            assert array.shape == self._written[name].shape, (name, array.shape)
            self._written[name][:] = array

    def set_first(self, number: int) -> None:
        self._written["first"][0] = number

    def upload(self) -> None:
        """What was set, behind all that the current stream was given."""
        self._streams.copy(self._device, self._host)


def _parts(memory: torch.Tensor, fields: dict, sizes: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """uint8 memory as arrays, one behind the other."""
    start = 0
    for (name, (shape, dtype)), size in zip(fields.items(), sizes, strict=True):
        num_bytes = math.prod(shape) * dtype.itemsize
        yield name, memory[start : start + num_bytes].view(dtype).view(shape)
        start += size


class StepMaker:
    """Turns batches into steps."""

    def __init__(self, config: ModelConfig, streams: GpuStreams) -> None:
        self._streams = streams
        self._frequencies = rope_inverse_frequencies(config)  # (rope / 2,)
        self._factor = rope_attention_factor(config)

    def make(self, batch: Batch, expanded: list[SequenceSlice]) -> Step:
        """A long batch's. `expanded`: slices that attend in the expanded form."""
        host, to = self.host_step(batch, expanded), self._to_device
        starts = {piece.start for piece in expanded}
        rows = [np.arange(p.start, p.start + p.length) for p in batch.sequences if p.start not in starts]
        return Step(
            angles=Angles(to(host.cos), to(host.sin)),
            cache_rows=to(host.cache_rows),
            page_table=to(host.page_table),
            lengths=to(host.lengths),
            absorbed=to(np.concatenate(rows or [np.empty(0, np.int64)])) if expanded else None,
            expanded=[self._expanded(batch, piece) for piece in expanded],
            is_decoding=is_decoding(batch),
        )

    def host_step(
        self, batch: Batch, expanded: Sequence[SequenceSlice] = (), num_rows: int = 0, num_pages: int = 0
    ) -> HostStep:
        """num_rows, num_pages: at least so many, for a graph's shapes; where num_rows is given nothing is expanded."""
        num_tokens = max(len(batch.token_ids), num_rows)
        cache_rows = np.full(num_tokens, -1, np.int64)
        cache_rows[: len(batch.token_ids)] = batch.cache_rows()
        angles = np.zeros((num_tokens, len(self._frequencies)))
        angles[: len(batch.positions)] = batch.positions[:, None] * self._frequencies
        starts = {piece.start for piece in expanded}
        absorbed = [piece for piece in batch.sequences if piece.start not in starts]
        table_rows = num_rows or sum(piece.length for piece in absorbed)
        page_table, lengths = _absorbed_tables(batch, absorbed, table_rows, num_pages)
        cos, sin = ((turn(angles) * self._factor).astype(np.float32) for turn in (np.cos, np.sin))
        return HostStep(cos, sin, cache_rows, page_table, lengths)

    def _expanded(self, batch: Batch, piece: SequenceSlice) -> ExpandedSlice:
        num_positions = int(batch.positions[piece.start]) + piece.length
        pages = self._to_device(piece.pages[: -(-num_positions // PAGE_TOKENS)].astype(np.int64))
        return ExpandedSlice(piece.start, piece.length, num_positions, pages)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._streams.device)


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
    allow. Never those of one token, however many: keys and values would be made for a single query."""
    several = sorted(
        (p for p in sequences if p.length > 1 and not expanded_is_cheaper(p.length, shape)), key=lambda p: p.length
    )
    while sum(p.length for p in several) > _MAX_ABSORBED_TOKENS:
        several.pop()
    kept = {id(p) for p in several}
    return [p for p in sequences if p.length > 1 and id(p) not in kept]
