"""The statistics of `tools.quality`: losses, divergences, agreement and ranks from rows of logits, with standard
errors.

As llama.cpp's `llama-perplexity`: chunks of 512 tokens that know nothing of each other, of which the second half is
scored; the standard errors take tokens as independent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

CHUNK_TOKENS = 512
FIRST_SCORED = CHUNK_TOKENS // 2  # this row's successor is the first token that is scored


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Estimate":
        wide = np.asarray(values, np.float64)
        return cls(float(wide.mean()), float(wide.std(ddof=1) / len(wide) ** 0.5) if len(wide) > 1 else 0.0)

    def exp(self) -> "Estimate":
        return Estimate(float(np.exp(self.mean)), float(np.exp(self.mean) * self.error))


@dataclass(frozen=True, slots=True)
class Losses:
    """Of one run: the loss of every scored token in nats (N,)."""

    nats: np.ndarray

    @property
    def perplexity(self) -> Estimate:
        return Estimate.of(self.nats).exp()


@dataclass(frozen=True, slots=True)
class Divergence:
    """Every scored token of a run beside the reference's, each (N,)."""

    kl_nats: np.ndarray  # D(reference || run)
    ranks: np.ndarray  # of the reference's best token in the run; 0: also its best
    loss_differences: np.ndarray  # run - reference, nats
    probability_differences: np.ndarray  # of the true token, run - reference

    def to_json(self) -> dict:
        """Means with standard errors, and the tail."""
        kl, same = Estimate.of(self.kl_nats), Estimate.of(self.ranks == 0)
        ratio = Estimate.of(self.loss_differences).exp()
        return {
            "kl_nats": {"mean": kl.mean, "error": kl.error, **_tail(self.kl_nats)},
            "top1_agreement": {"mean": same.mean, "error": same.error},
            "rank": {
                "mean": float(self.ranks.mean()) + 1,
                "within_5": float((self.ranks < 5).mean()),
                "max": int(self.ranks.max()) + 1,
            },
            "perplexity_ratio": {"mean": ratio.mean, "error": ratio.error},
            "probability_difference_rms": float(np.sqrt(np.mean(self.probability_differences**2))),
        }


def chunks_of(ids: Sequence[int], bos_id: int | None, num_chunks: int | None = None) -> Iterator[np.ndarray]:
    """int32 (512,) each; the text's last, not whole chunk is left out. `bos_id` takes the place of a chunk's first
    token."""
    available = len(ids) // CHUNK_TOKENS
    for i in range(min(available, num_chunks or available)):
        chunk = np.array(ids[i * CHUNK_TOKENS : (i + 1) * CHUNK_TOKENS], np.int32)
        if bos_id is not None:
            chunk[0] = bos_id
        yield chunk


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 (T, vocabulary) -> the same shape, sums in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def losses(log_probs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Nats (T,): log_probs (T, vocabulary) of the rows before the targets (T,)."""
    return -log_probs[np.arange(len(targets)), targets].astype(np.float64)


def diverge(log_probs: np.ndarray, reference: np.ndarray, targets: np.ndarray) -> Divergence:
    """Both (T, vocabulary), normalized."""
    probs = np.exp(reference)
    known = probs > 0  # a stored reference may say that a token is impossible
    terms = np.where(known, probs * (np.where(known, reference, 0) - log_probs), 0)
    is_best = reference == reference.max(axis=1, keepdims=True)  # several, where the reference is rounded
    ranks = (log_probs > np.where(is_best, log_probs, -np.inf).max(axis=1, keepdims=True)).sum(axis=1)
    run_loss, reference_loss = losses(log_probs, targets), losses(reference, targets)
    return Divergence(
        kl_nats=terms.sum(axis=1, dtype=np.float64),
        ranks=ranks,
        loss_differences=run_loss - reference_loss,
        probability_differences=np.exp(-run_loss) - np.exp(-reference_loss),
    )


def join(parts: Sequence[Divergence]) -> Divergence:
    return Divergence(*(np.concatenate([getattr(part, name) for part in parts]) for name in Divergence.__slots__))


def _tail(values: np.ndarray) -> dict[str, float]:
    median, high = np.percentile(values, (50, 99))
    return {"median": float(median), "p99": float(high), "max": float(values.max())}
