"""A batch in passes over the layers: one, or several where the GPU's memory has ended."""

import logging
from collections.abc import Callable

import numpy as np

from kimi_lite.experts.gpu_failure import GpuMemoryEnded
from kimi_lite.model.batch import Batch
from kimi_lite.model.hybrid.kernels import MAX_DECODE_TOKENS

_TRIED_AFTER, _MOST_AFTER = 8, 1024  # batches that were cut, until twice as many tokens are tried again
ShouldStop = Callable[[], bool] | None
_log = logging.getLogger(__name__)


class Passes:
    """Remembers how many tokens have not been too many yet. After some batches that had to be cut for it, twice as many
    are tried; where they are still too many, the next trial comes after twice as many batches."""

    def __init__(
        self, max_tokens: int, run: Callable[[Batch, ShouldStop], np.ndarray], give_back: Callable[[], None]
    ) -> None:
        """run: one pass, float32 (rows where wants_logits, vocabulary). give_back: frees what only saves time."""
        self.max_tokens = self.most_tokens = max_tokens  # the second ends where memory did
        self._run, self._give_back = run, give_back
        self._num_cut, self._tried_after = 0, _TRIED_AFTER // 2  # the second doubles with every time it was too much

    def forward(self, batch: Batch, should_stop: ShouldStop) -> np.ndarray:
        """float32 (rows where wants_logits, vocabulary). Raises GpuMemoryEnded where half as much did not fit
        either."""
        num_tokens = len(batch.token_ids)
        assert num_tokens <= self.max_tokens, (num_tokens, self.max_tokens)
        try:
            logits = self._forward_parts(batch, should_stop, self.most_tokens)
            if num_tokens > self.most_tokens:
                self._count_cut()
            return logits
        except GpuMemoryEnded as error:
            _log.warning("%s; trying half at a time.", error.message)
        self._give_back()  # behind the `except`: the error holds what the pass had allocated
        fewer = max(1, min(num_tokens, self.most_tokens) // 2)
        if num_tokens > MAX_DECODE_TOKENS:  # a captured step that finds no memory says nothing of prompts
            self.most_tokens, self._num_cut = max(MAX_DECODE_TOKENS, fewer), 0
            self._tried_after = min(2 * self._tried_after, _MOST_AFTER)
        return self._forward_parts(batch, should_stop, fewer)

    def _count_cut(self) -> None:
        self._num_cut += 1
        if self._num_cut >= self._tried_after:
            self.most_tokens, self._num_cut = min(self.max_tokens, 2 * self.most_tokens), 0

    def _forward_parts(self, batch: Batch, should_stop: ShouldStop, most: int) -> np.ndarray:
        logits = [self._run(part, should_stop) for part in batch.parts(most)]
        return logits[0] if len(logits) == 1 else np.concatenate(logits)
