"""The numbers of one test, made of its samples: what `tools.bench` prints, compares and writes as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from kimi_lite.tools.bench.plan import BenchTest
from kimi_lite.tools.bench.roofline import Limit
from kimi_lite.tools.bench.run import Samples

_ALWAYS_NOISE = 0.01  # relative: smaller changes say nothing


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and standard deviation of single values, and the values."""

    mean: float
    sd: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        array = np.asarray(values, np.float64)
        return cls(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0, tuple(array.tolist()))


@dataclass(frozen=True, slots=True)
class Result:
    """One test of one program. Rates count the tokens of all sequences; what does not apply is None."""

    test: BenchTest
    program: str
    tok_s: Spread  # warm
    first_tok_s: float  # the first run: compiled code, page tables and the page cache may have been cold
    ttft_s: float | None  # median, prompts only
    gap_p50_s: float | None
    gap_p99_s: float | None
    gb_s: float | None  # bytes that the roofline counts, at the measured speed
    limit_share: float | None
    disk_bytes_per_token: float
    expert_hit_share: float | None  # of routed experts that were in their slots; None where all are in RAM
    num_dropped: int
    is_noisy: bool
    lost_share: float  # worst of the kept runs

    def to_json(self) -> dict:
        return asdict(self) | {"test": self.test.name, **asdict(self.test)}


def make_result(test: BenchTest, program: str, samples: Samples, limit: Limit | None) -> Result:
    tok_s = Spread.of(samples.tok_s())
    gaps_s = [gap for sample in samples.warm for gap in sample.run.gaps_s]
    num_tokens = sum(sample.run.num_tokens for sample in samples.warm)
    is_prompt = test.kind == "pp"
    return Result(
        test=test,
        program=program,
        tok_s=tok_s,
        first_tok_s=samples.first.run.tok_s,
        ttft_s=float(np.median([sample.run.first_token_s for sample in samples.warm])) if is_prompt else None,
        gap_p50_s=float(np.percentile(gaps_s, 50)) if gaps_s else None,
        gap_p99_s=float(np.percentile(gaps_s, 99)) if gaps_s else None,
        gb_s=limit.token_bytes * tok_s.mean / 1e9 if limit else None,
        limit_share=tok_s.mean / limit.limit_tok_s if limit else None,
        disk_bytes_per_token=sum(sample.disk_bytes for sample in samples.warm) / num_tokens,
        expert_hit_share=_hit_share(samples),
        num_dropped=samples.num_dropped,
        is_noisy=samples.is_noisy,
        lost_share=max(sample.lost_share for sample in samples.warm),
    )


def _hit_share(samples: Samples) -> float | None:
    totals = [sum(s.run.counters.get(f"expert_{name}", 0) for s in samples.warm) for name in ("hits", "late", "misses")]
    return totals[0] / sum(totals) if sum(totals) else None


def compare(ours: Samples, theirs: Samples) -> Spread:
    """Our speed over theirs, turn by turn."""
    return Spread.of(ours.tok_s() / theirs.tok_s())


def find_regressions(baseline: Mapping, document: Mapping) -> list[str]:
    """Sentences about every ratio that fell by more than its noise: shares of the limit, and ratios to other programs.

    Ratios, not tokens/s: those two move with the machine, and these do not. Noise is two standard errors of the
    difference.
    """
    sentences = []
    for what, old, new in _paired_ratios(baseline, document):
        for name in sorted(old.keys() & new.keys()):
            (old_mean, old_error), (new_mean, new_error) = old[name], new[name]
            noise = max(2 * (old_error**2 + new_error**2) ** 0.5, _ALWAYS_NOISE * old_mean)
            if new_mean < old_mean - noise:
                sentences.append(f"{name}: {what} fell from {old_mean:.3f} to {new_mean:.3f}; its noise is {noise:.3f}")
    return sentences


def num_comparable(baseline: Mapping, document: Mapping) -> int:
    """Ratios that both have."""
    return sum(len(old.keys() & new.keys()) for _, old, new in _paired_ratios(baseline, document))


def _paired_ratios(baseline: Mapping, document: Mapping) -> list[tuple[str, dict, dict]]:
    """(what, old, new): test name -> (mean, standard error)."""
    others = dict.fromkeys(map(_other, document["comparison"]))
    return [
        ("the share of the limit", _limit_shares(baseline), _limit_shares(document)),
        *((f"the ratio to {other}", _ratios(baseline, other), _ratios(document, other)) for other in others),
    ]


def _limit_shares(document: Mapping) -> dict[str, tuple[float, float]]:
    return {
        result["test"]: (result["limit_share"], result["limit_share"] * _relative_error(result["tok_s"]))
        for result in document["results"]
        if result["program"] == "kimi-lite" and result["limit_share"]
    }


def _ratios(document: Mapping, other: str) -> dict[str, tuple[float, float]]:
    return {
        each["test"]: (each["ratio"]["mean"], each["ratio"]["mean"] * _relative_error(each["ratio"]))
        for each in document["comparison"]
        if _other(each) == other
    }


def _other(comparison: Mapping) -> str:
    """The program compared with; documents from before there were several do not name it."""
    return comparison.get("other", "llama.cpp")


def _relative_error(spread: Mapping) -> float:
    return spread["sd"] / len(spread["samples"]) ** 0.5 / spread["mean"]
