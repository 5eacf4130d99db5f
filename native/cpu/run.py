"""What changes from one run of a program to the next: the tokens of this batch. Kernels get the table's address."""

from collections.abc import Sequence

import numpy as np

# int64 slots, by byte offset
NUM_TOKENS, TOKEN_IDS, POSITIONS, SLOTS, COS, SIN, EVERY_TOKEN, SCRATCH, SCRATCH_STRIDE = (8 * i for i in range(9))
NUM_ABSORBED, ABSORBED, NUM_EXPANDED, EXPANDED, NUM_SPLITS = (8 * i for i in range(9, 14))
NUM_SLOTS = 14

# one record of 6 int64 for each absorbed token and each expanded sequence
RECORD_BYTES = 48
RECORD_TOKEN, RECORD_LENGTH, RECORD_POSITION, RECORD_PAGES = (8 * i for i in range(4))


class RunTable:
    """The table and the arrays it points to, for batches of up to `capacity` tokens on `num_threads` threads."""

    def __init__(self, capacity: int, num_threads: int, scratch_bytes: int, num_slots: int = 0) -> None:
        """`scratch_bytes`: what any kernel needs per thread; `num_slots`: (token, expert) pairs, where there are
        experts."""
        self.capacity = capacity
        stride = -(-scratch_bytes // 4096) * 4096 + 4096
        self._scratch = np.zeros(num_threads * stride + 4096, np.uint8)
        self._every_token = np.arange(max(capacity, num_slots), dtype=np.int32)
        self._kept: Sequence[np.ndarray] = ()
        self.table = np.zeros(NUM_SLOTS, np.int64)
        self._set(EVERY_TOKEN, self._every_token.ctypes.data)
        self._set(SCRATCH, -(-self._scratch.ctypes.data // 4096) * 4096)
        self._set(SCRATCH_STRIDE, stride)

    @property
    def address(self) -> int:
        return self.table.ctypes.data

    def _set(self, slot: int, value: int) -> None:
        self.table[slot // 8] = value

    def set_tokens(self, token_ids: np.ndarray) -> None:
        """token_ids: int32 (T,), T <= capacity. Enough for programs without attention."""
        assert token_ids.dtype == np.int32 and len(token_ids) <= self.capacity, (token_ids.dtype, len(token_ids))
        self._token_ids = token_ids
        self._set(NUM_TOKENS, len(token_ids))
        self._set(TOKEN_IDS, token_ids.ctypes.data)

    def set_positions(self, slots: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> None:
        """slots: int64 (T,) page * 64 + offset of each token; cos, sin: float32 (T, rope / 2)."""
        self._positions = (slots, cos, sin)
        for slot, array in ((SLOTS, slots), (COS, cos), (SIN, sin)):
            self._set(slot, array.ctypes.data)

    def set_attention(
        self, absorbed: np.ndarray, expanded: np.ndarray, num_splits: int, keep: Sequence[np.ndarray]
    ) -> None:
        """absorbed, expanded: int64 (n, 6) records; `keep`: the page tables they point to."""
        self._kept = (absorbed, expanded, *keep)
        self._set(NUM_ABSORBED, len(absorbed))
        self._set(ABSORBED, absorbed.ctypes.data)
        self._set(NUM_EXPANDED, len(expanded))
        self._set(EXPANDED, expanded.ctypes.data)
        self._set(NUM_SPLITS, num_splits)
