"""What changes from one run of a program to the next: the tokens of this batch. Kernels get the table's address."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kimi_lite.native.cpu.activations import aligned_zeros

# int64 cells, by byte offset
NUM_TOKENS, TOKEN_IDS, CACHE_ROWS, COS, SIN, EVERY_TOKEN, SCRATCH, SCRATCH_STRIDE = (8 * i for i in range(8))
NUM_ABSORBED, ABSORBED, NUM_EXPANDED, EXPANDED, NUM_GENERATED, PACKS = (8 * i for i in range(8, 14))
_NUM_CELLS = 14

# one record of 6 int64 for each absorbed token and each expanded sequence
RECORD_BYTES = 48
RECORD_TOKEN, RECORD_LENGTH, RECORD_POSITION, RECORD_PAGES = (8 * i for i in range(4))


class Attending(NamedTuple):
    """Tokens `token .. token + length - 1` of the batch, at `position` and on of a sequence with these `pages`."""

    token: int
    length: int
    position: int
    pages: np.ndarray  # int32, contiguous


class RunTable:
    """The table and the arrays it points to, for batches of up to `capacity` tokens on `num_threads` threads."""

    def __init__(self, capacity: int, num_threads: int, scratch_bytes: int, num_pairs: int = 0) -> None:
        """`scratch_bytes`: what any kernel needs per thread; `num_pairs`: (token, expert), where there are experts."""
        self.capacity = capacity
        stride = -(-scratch_bytes // 4096) * 4096 + 4096
        self._scratch = np.zeros(num_threads * stride + 4096, np.uint8)
        self._table = np.zeros(_NUM_CELLS, np.int64)
        self._owners: dict[int, object] = {}  # of the addresses, by cell
        self._packs: np.ndarray | None = None
        self._point(EVERY_TOKEN, np.arange(max(capacity, num_pairs), dtype=np.int32))
        self._set(SCRATCH, -(-self._scratch.ctypes.data // 4096) * 4096)
        self._set(SCRATCH_STRIDE, stride)

    @property
    def address(self) -> int:
        return self._table.ctypes.data

    def _set(self, cell: int, value: int) -> None:
        self._table[cell // 8] = value

    def _point(self, cell: int, array: np.ndarray, *behind: object) -> None:
        """The array's address; it and what it points to are kept until the cell is set again."""
        self._owners[cell] = (array, *behind)
        self._set(cell, array.ctypes.data)

    def reserve_packs(self, num_bytes: int) -> None:
        """Memory for the packs of an operation's tokens (`native.cpu.packing`), which operations use in turns."""
        if self._packs is None or num_bytes > self._packs.nbytes:
            self._packs = aligned_zeros((num_bytes,), np.uint8)
            self._set(PACKS, self._packs.ctypes.data)

    def set_tokens(self, token_ids: np.ndarray, num_generated: int = 0) -> None:
        """token_ids: int32 (T,), T <= capacity. Enough for programs without attention.

        The first `num_generated` take the kernels for few tokens, the others those for many. Their sums differ in
        order, so who takes which must not depend on how many tokens there happen to be (`model.batch`).
        """
        assert token_ids.dtype == np.int32 and len(token_ids) <= self.capacity, (token_ids.dtype, len(token_ids))
        assert 0 <= num_generated <= len(token_ids), (num_generated, len(token_ids))
        self._set(NUM_GENERATED, num_generated)
        self._set(NUM_TOKENS, len(token_ids))
        self._point(TOKEN_IDS, token_ids)

    def set_positions(self, cache_rows: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> None:
        """cache_rows: int64 (T,) page * 64 + offset of each token; cos, sin: float32 (T, rope / 2)."""
        assert cache_rows.dtype == np.int64 and cos.dtype == sin.dtype == np.float32, (cache_rows.dtype, cos.dtype)
        for cell, array in ((CACHE_ROWS, cache_rows), (COS, cos), (SIN, sin)):
            self._point(cell, array)

    def set_attention(self, absorbed: Sequence[Attending], expanded: Sequence[Attending]) -> None:
        """Who attends in which form: single tokens absorbed, whole slices of sequences expanded."""
        assert all(row.length == 1 for row in absorbed), absorbed
        for count, cell, rows in ((NUM_ABSORBED, ABSORBED, absorbed), (NUM_EXPANDED, EXPANDED, expanded)):
            self._set(count, len(rows))
            self._point(cell, _records(rows), rows)


def _records(rows: Sequence[Attending]) -> np.ndarray:
    """int64 (n, 6)"""
    records = np.zeros((len(rows), RECORD_BYTES // 8), np.int64)
    for record, (token, length, position, pages) in zip(records, rows, strict=True):
        assert pages.dtype == np.int32 and pages.flags.c_contiguous, (pages.dtype, pages.strides)
        record[:4] = token, length, position, pages.ctypes.data
    return records
