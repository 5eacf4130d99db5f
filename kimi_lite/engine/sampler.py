"""Chooses the next token from a row of logits.

Order, as in Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p; each filter sees what the
one before left. Over 163,840 logits a sort would cost more than everything else, so the filters find their cut with a
histogram and sort one bin of it. One `Sampler` per request: its random numbers depend on the request's seed and on
nothing else.
"""

from collections.abc import Iterable

import numpy as np

from kimi_lite.engine.types import SamplingParams
from kimi_lite.errors import KimiLiteError

BINS_PER_NAT, NUM_BINS = 32, 2048  # the histogram reaches 64 nats (a factor of 1e28) below the best token
NEAR_NATS = 7.0  # tokens less than a thousandth as likely as the best are looked at only when the others are too few


class Sampler:
    """The state of one request: its random generator and the tokens its repetition penalty knows."""

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int], vocab_size: int) -> None:
        self.params = params
        self.random = np.random.default_rng(params.seed)
        self.is_seen = None
        if params.repetition_penalty != 1:
            self.is_seen = np.zeros(vocab_size, np.bool_)
            self.is_seen[list(prompt_ids)] = True

    def sample(self, logits: np.ndarray) -> int:
        """`logits` (vocab,) float32 -> a token id. Raises KimiLiteError on logits that are no numbers."""
        assert (logits.dtype, logits.ndim) == (np.float32, 1), (logits.dtype, logits.shape)
        if self.is_seen is not None:
            logits = self._penalize(logits)
        best = int(logits.argmax())  # finds NaN and +inf too, if there are any
        if not np.isfinite(logits[best]):
            problem = (
                f"The model's output is no number: the best logit is {logits[best]} (token {best}). A weight is broken."
            )
            raise KimiLiteError(
                problem, "Fetch the file again, or check one of your own with kimi-lite quantize --verify."
            )
        chosen = best if self.params.temperature == 0 else self._draw(logits, logits[best])
        if self.is_seen is not None:
            self.is_seen[chosen] = True
        return chosen

    def _penalize(self, logits: np.ndarray) -> np.ndarray:
        """Seen tokens become less likely: positive logits are divided by the penalty, negative ones multiplied."""
        seen = np.flatnonzero(self.is_seen)
        values = logits[seen]
        penalized = logits.copy()
        penalized[seen] = np.where(
            values > 0, values / self.params.repetition_penalty, values * self.params.repetition_penalty
        )
        return penalized

    def _draw(self, logits: np.ndarray, best_logit: np.float32) -> int:
        depths = (best_logit - logits) * np.float32(1 / self.params.temperature)  # (vocab,) nats below the best token
        ids, weights = candidates(depths, self.params)
        cumulative = np.cumsum(weights, dtype=np.float64)
        index = np.searchsorted(cumulative, self.random.random() * cumulative[-1], side="right")
        index = min(int(index), len(weights) - 1)  # random() is below 1, but the product may round up to the sum
        return index if ids is None else int(ids[index])


def candidates(depths: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """The tokens that the filters leave: ids (N,), or None for all, and their weights (N,), proportional to the
    probabilities.

    `depths` (vocab,) float32 is how far below the best token each is, in units of the temperature.
    """
    ids, weights = None, np.exp(-depths)
    if 0 < params.top_k < len(depths):
        ids = _topmost(depths, np.ones_like(depths), params.top_k)
        depths, weights = depths[ids], weights[ids]
    if params.top_p < 1:
        kept = _topmost(depths, weights, params.top_p * weights.sum(dtype=np.float64))
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= params.min_p)  # the best token's weight is 1
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def _topmost(depths: np.ndarray, amounts: np.ndarray, target: float) -> np.ndarray:
    """Indices of the least deep tokens, no more than it takes for their `amounts` to sum to `target`; ties go by
    index."""
    near = np.flatnonzero(depths < NEAR_NATS)
    if (
        len(near) < len(depths) // 8 and amounts[near].sum(dtype=np.float64) >= target
    ):  # usual, and the rest is six times faster
        return near[_topmost(depths[near], amounts[near], target)]
    bins = np.minimum(depths * BINS_PER_NAT, NUM_BINS - 1).astype(np.int32)
    cumulative = np.cumsum(np.bincount(bins, weights=amounts, minlength=NUM_BINS))
    edge = min(int(np.searchsorted(cumulative, target)), NUM_BINS - 1)  # the bin in which the target is reached
    missing = target - (cumulative[edge - 1] if edge else 0.0)
    on_edge = np.flatnonzero(bins == edge)
    on_edge = on_edge[np.argsort(depths[on_edge], kind="stable")]
    num_needed = int(np.searchsorted(np.cumsum(amounts[on_edge], dtype=np.float64), missing)) + 1
    return np.concatenate([np.flatnonzero(bins < edge), on_edge[:num_needed]])
