"""How well a model predicts a text: losses, divergences from a reference, agreement and ranks, with standard errors.

As llama.cpp's `llama-perplexity`: chunks of 512 tokens that know nothing of each other, of which the second half is
scored; the standard errors take tokens as independent. `tools.quality` and `quantize --verify` measure with it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from kimi_lite.arch.tensors import open_model
from kimi_lite.errors import KimiLiteError
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.options import Options

TEXT = Path(__file__).with_name("emma.txt")  # public-domain prose; tools/data/SOURCES.md says whose
CHUNK_TOKENS = 512
FIRST_SCORED = CHUNK_TOKENS // 2  # this row's successor is the first token that is scored
_SCORED_TOKENS = CHUNK_TOKENS - FIRST_SCORED - 1  # of a chunk


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

    def of_chunks(self, first: int, last: int) -> "Losses":
        """Of the tokens of some chunks alone."""
        return Losses(self.nats[_tokens_of(first, last)])

    @property
    def perplexity(self) -> Estimate:
        return Estimate.of(self.nats).exp()


@dataclass(frozen=True, slots=True)
class Divergence:
    """Every scored token of a run and of its reference, each (N,)."""

    kl_nats: np.ndarray  # D(reference || run)
    ranks: np.ndarray  # of the reference's best token in the run; 0: also its best
    loss_differences: np.ndarray  # run - reference, nats
    probability_differences: np.ndarray  # of the true token, run - reference

    def of_chunks(self, first: int, last: int) -> "Divergence":
        """Of the tokens of some chunks alone."""
        return Divergence(*(getattr(self, name)[_tokens_of(first, last)] for name in Divergence.__slots__))

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


def _tokens_of(first: int, last: int) -> slice:
    """Scored tokens of chunks `first` to `last`."""
    return slice(first * _SCORED_TOKENS, last * _SCORED_TOKENS)


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


class ScoreSource(Protocol):
    """Normalized log-probabilities of the rows of a chunk that are scored, float32 (255, vocabulary)."""

    name: str

    def scored_rows(self, index: int, chunk: np.ndarray) -> np.ndarray: ...

    def close(self) -> None: ...


class OurLogits:
    """A model through our forward pass, with a cache for one chunk."""

    def __init__(
        self,
        path: Path,
        num_threads: int | None = None,
        expert_share: float | None = None,
        cache_bias: float = 0.0,
        num_deferred_experts: int = 0,
        is_decoding: bool = False,
    ) -> None:
        """expert_share: of the routed experts that RAM holds, the others come through the disk tier. is_decoding:
        tokens run one by one, as generated ones do; so they do with a cache_bias, for what is there changes from token
        to token, and with deferred experts, which prompts never have."""
        from kimi_lite.engine.loader import load  # the benchmark's flags need only the text
        from kimi_lite.experts.index import ExpertIndex

        self.store, self.config = open_model(path)
        self.name = self.store.path.name
        num_bytes = None
        if expert_share is not None:
            num_bytes = int(expert_share * ExpertIndex.find(self.store, self.config).routed_bytes)
        options = Options(
            context_length=CHUNK_TOKENS,
            num_threads=num_threads,
            device="cpu",
            cache_bias=cache_bias,
            num_deferred_experts=num_deferred_experts,
            defers_on_cpu=True,
            ram_expert_bytes=num_bytes,
            keeps_heat=False,
        )
        self._engine = load(path, options)
        self.tokenizer = self._engine.tokenizer
        self._pages = np.arange(CHUNK_TOKENS // PAGE_TOKENS, dtype=np.int32)
        self._is_one_by_one = is_decoding or cache_bias > 0 or num_deferred_experts > 0

    @property
    def num_threads(self) -> int:
        return self._engine.plan.num_threads

    @property
    def bos_id(self) -> int | None:
        """The token that every text begins with, where the file says so."""
        says_so = bool(self.store.metadata.get("tokenizer.ggml.add_bos_token", False))
        bos_id = self.store.metadata.get("tokenizer.ggml.bos_token_id")
        return int(bos_id) if says_so and bos_id is not None else None

    def close(self) -> None:
        self._engine.close()

    def logits(self, ids: np.ndarray, first: int = 0) -> np.ndarray:
        """float32 (T - first, vocabulary): rows `first ..` of one prompt of at most 512 tokens."""
        if not self._is_one_by_one:
            return self._forward(ids, 0, first)
        return np.concatenate([self._forward(ids[i : i + 1], i, first) for i in range(len(ids))])

    def _forward(self, ids: np.ndarray, start: int, first: int) -> np.ndarray:
        positions = np.arange(start, start + len(ids), dtype=np.int32)
        whole = (SequenceSlice(0, len(ids), self._pages, is_generated=self._is_one_by_one),)
        return self._engine.model.forward(Batch(np.asarray(ids, np.int32), positions, positions >= first, whole))

    def expert_counters(self) -> dict[str, float]:
        """What the disk tier did; nothing without it."""
        return self._engine.model.counters()

    def scored_rows(self, index: int, chunk: np.ndarray) -> np.ndarray:
        return log_softmax(self.logits(chunk[:-1], FIRST_SCORED))


def score_text(
    run: ScoreSource,
    references: Sequence[ScoreSource],
    chunks: Sequence[np.ndarray],
    keep: Callable[[np.ndarray], None],
    on_chunk: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Losses, list[tuple[Losses, Divergence]]]:
    """The run's losses, and each reference's with the divergence from it. `keep` gets the run's log-probabilities."""
    own, theirs = [], [[] for _ in references]
    for index, chunk in enumerate(chunks):
        targets = chunk[FIRST_SCORED + 1 :]
        log_probs = run.scored_rows(index, chunk)
        keep(log_probs)
        own.append(losses(log_probs, targets))
        for reference, found in zip(references, theirs, strict=True):
            rows = _same_width(reference.scored_rows(index, chunk), log_probs, reference.name)
            found.append((losses(rows, targets), diverge(log_probs, rows, targets)))
        on_chunk(index + 1, len(chunks))
    joined = [(Losses(np.concatenate([a for a, _ in found])), join([b for _, b in found])) for found in theirs]
    return Losses(np.concatenate(own)), joined


def _same_width(rows: np.ndarray, log_probs: np.ndarray, name: str) -> np.ndarray:
    if rows.shape != log_probs.shape:
        have = f"{rows.shape[1]:,} tokens; this model's has {log_probs.shape[1]:,}"
        raise KimiLiteError(f"The vocabulary of {name} has {have}.", "A reference must be the same model.")
    return rows
