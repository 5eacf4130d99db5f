"""When two results of the hybrid path count as the same.

On the stand-in an expert gives the same bits in a slot and on the CPU, so results are the same bit for bit, or within
float32 sums in another order. A GPU rounds factors of large products to bfloat16: hidden states move by some 2^-9, and
now and then a token chooses another expert, whose logits are then others altogether. So on a GPU the median must be
within the roundings, and every row whose routing was the same on both sides within a few times as much; most rows must
be such rows. A fault moves all rows, or a row whose routing agrees.

`watch()` makes runners remember each row's routing; `tests/model/hybrid/test_rounded.py` shows that all this passes
with a GPU's roundings and fails with a fault.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from kimi_lite.arch.config import ModelConfig
from tests.model import runner
from tests.model.runner import relative_error, relative_errors

F32_LIMIT = 2e-5  # the same float32 sums in another order
MEDIAN_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2**-7}  # of a GPU's factors, through a few layers
INT8_LIMIT = 2**-5  # the CPU's int8 activations next to float ones
_MOST_OF_A_ROW = 8  # times the median's limit: a row whose neighbours chose others sees them in attention
_MOST_DIFFERING = 0.2  # of the rows


class Routings:
    """The experts behind every row of logits that a runner gave while it was watched."""

    def __init__(self) -> None:
        self._of_row: dict[bytes, bytes] = {}

    def recorder(self, config: ModelConfig) -> "PassRecorder | None":
        return PassRecorder(self._of_row, config) if config.num_moe_layers else None

    def compare(self, have: np.ndarray, want: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """bool (T,) twice, for the rows of two results (T, vocabulary): made by the same experts, made by others.

        Neither where a row's routing is not known.
        """
        pairs = [(self._find(a), self._find(b)) for a, b in zip(have, want, strict=True)]
        is_known = np.array([None not in pair for pair in pairs])
        is_same = np.array([a == b for a, b in pairs])
        return is_known & is_same, is_known & ~is_same

    def _find(self, row: np.ndarray) -> bytes | None:
        return self._of_row.get(np.ascontiguousarray(row).tobytes())


class PassRecorder:
    """In the place of `RoutingRecorder`: the last pass, in memory."""

    def __init__(self, of_row: dict[bytes, bytes], config: ModelConfig) -> None:
        self._of_row, self._config = of_row, config
        self._ids = np.empty(0)

    def begin(self, num_tokens: int) -> None:
        self._ids = np.full((num_tokens, self._config.num_layers, self._config.num_experts_used), -1, np.int16)

    def add(self, layer: int, expert_ids: np.ndarray) -> None:
        self._ids[:, layer] = np.sort(expert_ids, axis=1)

    def keep(self, logits: np.ndarray) -> None:
        """These are the logits of the pass, a row a token."""
        for row, ids in zip(logits, self._ids, strict=True):
            self._of_row[row.tobytes()] = ids.tobytes()

    def drop(self) -> None:
        self.begin(0)

    def close(self) -> None:
        self.drop()


_routings: Routings | None = None  # None: the stand-in, where results are the same bits


@contextmanager
def watch() -> Iterator[None]:
    """Inside, results are compared as a GPU's."""
    global _routings
    _routings = Routings()
    runner.make_recorder = _routings.recorder
    try:
        yield
    finally:
        _routings, runner.make_recorder = None, runner.no_recorder


def is_exact() -> bool:
    return _routings is None


def same(have: np.ndarray, want: np.ndarray, dtype: torch.dtype = torch.bfloat16, limit: float = 0.0) -> bool:
    """Logits (T, vocabulary) that must be the same bits where hits and misses have the same.

    dtype: of a GPU's factors; with float32, in decoding, its hits have the bits of the CPU's misses. limit: of what the
    CPU rounds besides.
    """
    if _routings is None or dtype == torch.float32:
        return np.array_equal(have, want)
    return _is_near(have, want, max(MEDIAN_LIMITS[dtype], limit))


def near(have: np.ndarray, want: np.ndarray, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Likewise within float32 sums in another order."""
    if _routings is None:
        return relative_error(have, want) < F32_LIMIT
    return _is_near(have, want, MEDIAN_LIMITS[dtype])


def median_limit(limit: float) -> float:
    """Of a median that has a limit of its own: a GPU's products cannot be better than its factors."""
    return limit if _routings is None else max(limit, MEDIAN_LIMITS[torch.bfloat16])


def _is_near(have: np.ndarray, want: np.ndarray, limit: float) -> bool:
    errors, (agrees, differs) = relative_errors(have, want), _routings.compare(have, want)
    worst, share = errors[agrees].max(initial=0.0), differs.mean()
    is_near = np.median(errors) < limit and share <= _MOST_DIFFERING and worst < _MOST_OF_A_ROW * limit
    if not is_near:
        print(f"median {np.median(errors):.1e}, {share:.0%} routed otherwise, others {worst:.1e}, limit {limit:.1e}")
    return bool(is_near)
