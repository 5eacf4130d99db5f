"""What a model is scored on besides the text that was named: a little of every kind, so that a file that was fitted to
one kind of text shows it.

The texts (`tools.texts.KINDS`) are beginnings of what that tool holds out of its calibration text, and no novel is in
it at all: a file calibrated on it has seen none of these words, and the novel's kind not even from afar.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kimi_lite.engine.scoring import Divergence, Estimate, Losses, OurLogits, chunks_of
from kimi_lite.tools.texts import KINDS

_NUM_CHUNKS = 2  # of 512 tokens of each kind


class Kind(NamedTuple):
    """Chunks `first` to `last` of what is scored."""

    name: str
    first: int
    last: int


class KindScores(NamedTuple):
    """A kind's perplexity, and the divergence from each reference."""

    kind: Kind
    perplexity: Estimate
    divergences: tuple[Divergence, ...]


def chunks_of_kinds(model: OurLogits) -> dict[str, list[np.ndarray]]:
    """The first chunks of each kind, in the model's tokens, int32 (512,)."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(KINDS.glob("*.txt"))}
    return {
        name: list(chunks_of(model.tokenizer.encode(text), model.bos_id, _NUM_CHUNKS)) for name, text in texts.items()
    }


def place_kinds(chunks: Mapping[str, Sequence[np.ndarray]], first: int) -> list[Kind]:
    """Where the kinds' chunks are, when they are scored behind `first` others."""
    kinds = []
    for name, each in chunks.items():
        kinds.append(Kind(name, first, first + len(each)))
        first += len(each)
    return kinds


def score_kinds(kinds: Sequence[Kind], own: Losses, found: Sequence[tuple[Losses, Divergence]]) -> list[KindScores]:
    """From the scores of all chunks."""
    return [
        KindScores(
            kind,
            own.of_chunks(kind.first, kind.last).perplexity,
            tuple(divergence.of_chunks(kind.first, kind.last) for _, divergence in found),
        )
        for kind in kinds
    ]


def mean_divergence(scores: Sequence[KindScores], reference: int = 0) -> float:
    """KL in nats, every kind counted alike."""
    return float(np.mean([each.divergences[reference].kl_nats.mean() for each in scores]))


def print_kinds(scores: Sequence[KindScores], names: Sequence[str]) -> None:
    print("\nheld-out kinds    perplexity" + "".join(f"   KL from {name[:16]:<16}" for name in names[:2]))
    for each in scores:
        divergences = (Estimate.of(divergence.kl_nats) for divergence in each.divergences[:2])
        found = "".join(f"   {estimate.mean:z.4f} ± {estimate.error:.4f}".ljust(27) for estimate in divergences)
        print(f"{each.kind.name:<18}{each.perplexity.mean:10.2f}{found}".rstrip())
    if names:
        means = "".join(f"   {mean_divergence(scores, index):z.4f}".ljust(27) for index in range(len(names[:2])))
        print(f"{'mean':<28}{means}".rstrip())
