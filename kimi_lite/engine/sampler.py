"""Chooses the next token from a row of logits.

Order, as in Hugging Face transformers: repetition penalty (then frequency and presence penalties and biases as OpenAI's
API has them, then a grammar's mask), temperature, top-k, top-p, min-p; each filter sees what the one before left. Over
163,840 logits a sort would cost more than everything else, so the filters find their cut with a histogram and sort one
bin of it. One `Sampler` per request: its random numbers depend on the request's seed and on nothing else.
"""

from collections.abc import Iterable

import numpy as np

from kimi_lite.engine.types import Logprob, Logprobs, SamplingParams
from kimi_lite.errors import KimiLiteError

BINS_PER_NAT, NUM_BINS = 32, 2048  # the histogram reaches 64 nats (a factor of 1e28) below the best token
MIN_TEMPERATURE = 1e-6  # below it only the best token has a chance that float32 can hold
_BLOCK_WEIGHTS = 256
NEAR_NATS = 7.0  # tokens less than a thousandth as likely as the best are looked at only when the others are too few


class Sampler:
    """The state of one request: its random generator and what its penalties know of the tokens so far."""

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int], vocab_size: int) -> None:
        """Raises KimiLiteError where a biased token does not exist."""
        self.params = params
        self.random = np.random.default_rng(params.seed)
        self.is_seen: np.ndarray | None = None  # (vocab,) bool, prompt included
        self.counts: np.ndarray | None = None  # (vocab,) int32 of generated tokens
        if params.repetition_penalty != 1:
            self.is_seen = np.zeros(vocab_size, np.bool_)
            self.is_seen[list(prompt_ids)] = True
        if params.frequency_penalty or params.presence_penalty:
            self.counts = np.zeros(vocab_size, np.int32)
        unknown = [token_id for token_id, _ in params.logit_bias if not 0 <= token_id < vocab_size]
        if unknown:
            raise KimiLiteError(f"A bias is given for token {unknown[0]}; the ids go from 0 to {vocab_size - 1}.")

    def sample(self, logits: np.ndarray, allowed: np.ndarray | None = None) -> int:
        """`logits` (vocab,) float32 -> a token id; `allowed`: a `Constraint`'s bits.

        Raises KimiLiteError on logits that are not numbers.
        """
        assert (logits.dtype, logits.ndim) == (np.float32, 1), (logits.dtype, logits.shape)
        require_numbers(logits)
        logits = self._penalize(logits)
        if allowed is not None:
            logits = np.where(unpack_bits(allowed, len(logits)), logits, -np.inf)
        best = int(logits.argmax())
        chosen = best if self.params.temperature < MIN_TEMPERATURE else self._draw(logits, logits[best])
        if self.is_seen is not None:
            self.is_seen[chosen] = True
        if self.counts is not None:
            self.counts[chosen] += 1
        return chosen

    def forced(self, token_id: int) -> None:
        """This token came without being sampled."""
        if self.is_seen is not None:
            self.is_seen[token_id] = True
        if self.counts is not None:
            self.counts[token_id] += 1

    def _penalize(self, logits: np.ndarray) -> np.ndarray:
        """Seen tokens become less likely: positive logits are divided by the repetition penalty, negative ones
        multiplied; what was generated loses the other penalties; biases are added last."""
        params = self.params
        if self.is_seen is None and self.counts is None and not params.logit_bias:
            return logits
        logits = logits.copy()
        if self.is_seen is not None:
            seen = np.flatnonzero(self.is_seen)
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        if self.counts is not None:
            generated = np.flatnonzero(self.counts)
            logits[generated] -= params.frequency_penalty * self.counts[generated] + params.presence_penalty
        for token_id, bias in params.logit_bias:
            logits[token_id] += bias
        return logits

    def _draw(self, logits: np.ndarray, best_logit: np.float32) -> int:
        depths = (best_logit - logits) * np.float32(1 / self.params.temperature)  # (vocab,) nats below the best token
        ids, weights = candidates(depths, self.params)
        index = index_at(weights, self.random.random())
        return index if ids is None else int(ids[index])


def index_at(weights: np.ndarray, share: float) -> int:
    """Where the running sum of `weights` (N,) exceeds `share` (0 to 1, exclusive) of the whole; of a positive weight.

    The sum runs over blocks first: over 163,840 weights one by one it would take longer than everything else.
    """
    starts = np.arange(0, len(weights), _BLOCK_WEIGHTS)
    ends = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = share * ends[-1]
    block = min(int(np.searchsorted(ends, target, side="right")), int(np.searchsorted(ends, ends[-1])))
    inside = weights[starts[block] : starts[block] + _BLOCK_WEIGHTS]
    before = ends[block - 1] if block else 0.0
    index = int(np.searchsorted(np.cumsum(inside, dtype=np.float64), target - before, side="right"))
    return int(starts[block]) + min(index, int(np.flatnonzero(inside)[-1]))  # sums round, in two orders


def require_numbers(logits: np.ndarray) -> None:
    """Refuse a row whose best logit is NaN or infinite: sampling from it would repeat one token endlessly."""
    best = int(logits.argmax())  # finds NaN and +inf too, if there are any
    if np.isfinite(logits[best]):
        return
    problem = (
        f"The model's output is not a number: the best logit is {logits[best]} (token {best}). A weight is broken."
    )
    raise KimiLiteError(problem, "Fetch the file again, or check one of your own with kimi-lite quantize --verify.")


def unpack_bits(bits: np.ndarray, count: int) -> np.ndarray:
    """A `Constraint`'s uint32 words -> (count,) bool; tokens past the last word are not allowed."""
    flags = np.unpackbits(bits.view(np.uint8), bitorder="little").view(np.bool_)
    if len(flags) >= count:
        return flags[:count]
    return np.concatenate([flags, np.zeros(count - len(flags), np.bool_)])


def logprobs(logits: np.ndarray, chosen: int, num_top: int) -> Logprobs:
    """Log-probabilities of the model's own distribution: of `chosen` and of the `num_top` likeliest, ties by id."""
    depths = logits.astype(np.float64)
    depths -= depths.max()
    values = depths - np.log(np.exp(depths).sum())
    near = np.argpartition(-values, min(num_top, len(values) - 1))[:num_top] if num_top else np.empty(0, np.int64)
    ranked = sorted(near, key=lambda i: (-values[i], i))
    return Logprobs(Logprob(chosen, float(values[chosen])), tuple(Logprob(int(i), float(values[i])) for i in ranked))


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
