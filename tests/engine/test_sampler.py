"""The sampler against the distribution it should draw from, computed the obvious way in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.engine.sampler import Sampler, candidates, index_at, logprobs
from kimi_lite.engine.types import SamplingParams
from kimi_lite.errors import KimiLiteError

OFF = {"temperature": 1.0, "top_p": 1.0}


def exact_distribution(logits: np.ndarray, params: SamplingParams, seen: tuple[int, ...] = ()) -> np.ndarray:
    """(vocab,) float64: full sorts, one filter after the other."""
    x = logits.astype(np.float64)
    for token in set(seen):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    p = np.exp((x - x.max()) / params.temperature)
    order = np.argsort(-p, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    if params.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= params.top_p]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def test_greedy_is_the_maximum() -> None:
    logits = np.random.default_rng(0).normal(size=163_840).astype(np.float32)
    assert Sampler(SamplingParams(temperature=0), (), 163_840).sample(logits) == logits.argmax()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(**OFF),
        SamplingParams(temperature=0.6, top_p=0.95),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=2.0, top_p=1.0, top_k=7),
        SamplingParams(temperature=1.0, top_p=0.7, top_k=12),
        SamplingParams(temperature=1.0, top_p=1.0, min_p=0.1),
        SamplingParams(temperature=1.3, top_p=0.9, top_k=20, min_p=0.02, repetition_penalty=1.5),
    ],
    ids=lambda params: (
        f"T{params.temperature}-k{params.top_k}-p{params.top_p}-m{params.min_p}-r{params.repetition_penalty}"
    ),
)
def test_draws_follow_the_exact_distribution(params: SamplingParams) -> None:
    """Chi-square over 8,000 draws: the bound is crossed by chance once in a million, and the seed is fixed."""
    logits = np.random.default_rng(1).normal(scale=2.0, size=60).astype(np.float32)
    seen, num_draws = (3, 5, 5, 59), 8_000
    sampler = Sampler(params, seen, len(logits))
    sampler.random = np.random.default_rng(2)
    known = None if sampler.is_seen is None else sampler.is_seen.copy()
    counts = np.zeros(len(logits))
    for _ in range(num_draws):
        counts[sampler.sample(logits)] += 1
        if known is not None:
            sampler.is_seen[:] = known  # every draw from the same state
    expected = exact_distribution(logits, params, seen) * num_draws
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    chi_square = ((counts[common] - expected[common]) ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 10, (chi_square, freedom)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.sampled_from([1, 2, 50, 300, 5000]),
    scale=st.sampled_from([0.0, 0.3, 2.0, 20.0]),
    temperature=st.sampled_from([0.05, 0.6, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 10_000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_the_filters_keep_exactly_the_right_tokens(
    seed: int, vocab_size: int, scale: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = np.random.default_rng(seed).normal(scale=scale, size=vocab_size).astype(np.float32)
    depths = (logits.max() - logits) * np.float32(1 / temperature)
    ids, weights = candidates(depths, params)
    kept = np.zeros(vocab_size)
    kept[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    expected = exact_distribution(logits, params)
    # float32 against float64 may disagree about the one token just at the cut of top-p or min-p
    differing = np.flatnonzero((expected > 1e-20) != (kept > 1e-20))  # float32 ends earlier than float64
    assert len(differing) <= 1, differing
    assert np.abs(kept - expected).sum() < 1e-4 + 2.1 * np.maximum(expected, kept)[differing].sum()


@given(
    seed=st.integers(0, 9999),
    size=st.integers(1, 2000),
    num_zeros=st.integers(0, 2000),
    share=st.floats(0, 1, exclude_max=True) | st.just(float(np.nextafter(1, 0))),
)
def test_a_share_of_the_sum_falls_on_a_weight_that_is_not_zero(
    seed: int, size: int, num_zeros: int, share: float
) -> None:
    """The index of the obvious running sum, but for rounding; zeros, at the end too, are never hit."""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=size).astype(np.float32) * np.float32(10.0) ** rng.integers(-12, 1, size)
    weights[rng.permutation(size)[: min(num_zeros, size - 1)]] = 0
    index = index_at(weights, share)
    assert weights[index] > 0
    cumulative = np.cumsum(weights, dtype=np.float64)
    slack = 1e-12 * cumulative[-1]
    assert cumulative[index] - weights[index] - slack <= share * cumulative[-1] <= cumulative[index] + slack


def test_ties_are_broken_by_index() -> None:
    ids, _ = candidates(np.zeros(10, np.float32), SamplingParams(top_k=3, top_p=1.0))
    assert ids.tolist() == [0, 1, 2]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    logits = np.random.default_rng(3).normal(size=(50, 1000)).astype(np.float32)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed), (), 1000)
        return [sampler.sample(row) for row in logits]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_repetition_penalty_counts_what_was_sampled() -> None:
    logits = np.array([2.0, 1.9, 1.8, -5.0], np.float32)
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=1.2), (), 4)
    assert [sampler.sample(logits) for _ in range(4)] == [0, 1, 2, 0]
    assert logits.tolist() == np.array([2.0, 1.9, 1.8, -5.0], np.float32).tolist()  # the caller's row is not changed


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float) -> None:
    logits = np.zeros(100, np.float32)
    logits[42] = bad
    with pytest.raises(KimiLiteError, match="token 42"):
        Sampler(SamplingParams(temperature=temperature), (), 100).sample(logits)
    with pytest.raises(KimiLiteError):
        Sampler(SamplingParams(), (), 100).sample(np.full(100, -np.inf, np.float32))


def test_a_token_of_minus_infinity_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf], np.float32)
    for params in (SamplingParams(**OFF), SamplingParams(top_k=2, top_p=1.0), SamplingParams(top_p=0.99)):
        assert Sampler(params, (), 3).sample(logits) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"max_tokens": 0},
        {"seed": -1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_with_the_range(wrong: dict) -> None:
    with pytest.raises(KimiLiteError, match="it must be"):
        SamplingParams(**wrong)


def test_penalties_and_biases_as_the_api_has_them() -> None:
    """logit - count * frequency - presence, over generated tokens only; then the bias."""
    logits = np.array([3.0, 2.9, 2.0, 0.0], np.float32)
    params = SamplingParams(temperature=0, frequency_penalty=0.3, presence_penalty=0.5, logit_bias=((3, 1.5),))
    sampler = Sampler(params, (0, 0, 0), 4)
    chosen = [sampler.sample(logits) for _ in range(6)]
    counts, want = np.zeros(4), []
    for _ in range(6):
        x = logits - 0.3 * counts - 0.5 * (counts > 0) + np.array([0, 0, 0, 1.5])
        want.append(int(x.argmax()))
        counts[want[-1]] += 1
    assert chosen == want and len(set(want)) > 2
    assert Sampler(SamplingParams(temperature=0, logit_bias=((2, 100.0),)), (), 4).sample(logits) == 2
    assert Sampler(SamplingParams(temperature=0, logit_bias=((0, -100.0),)), (), 4).sample(logits) == 1
    with pytest.raises(KimiLiteError, match="token 4; the ids go from 0 to 3"):
        Sampler(SamplingParams(logit_bias=((4, 1.0),)), (), 4)


def test_a_mask_leaves_only_what_it_allows() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=4, size=1000).astype(np.float32)
    allowed_ids = np.sort(rng.choice(990, 7, replace=False))
    bits = np.zeros(31, np.uint32)  # 992 tokens: those past the last word are not allowed
    for i in allowed_ids:
        bits[i // 32] |= np.uint32(1) << np.uint32(i % 32)
    assert Sampler(SamplingParams(temperature=0), (), 1000).sample(logits, bits) == max(
        allowed_ids, key=lambda i: logits[i]
    )
    sampler = Sampler(SamplingParams(temperature=2.0, top_p=1.0, seed=0), (), 1000)
    drawn = {sampler.sample(logits, bits) for _ in range(3000)}
    assert drawn <= set(allowed_ids.tolist()) and len(drawn) > 3


def test_logprobs_are_the_models_own() -> None:
    logits = np.random.default_rng(4).normal(scale=3, size=500).astype(np.float32)
    exact = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    found = logprobs(logits, 17, 5)
    assert found.chosen == (17, pytest.approx(exact[17]))
    assert [entry.token_id for entry in found.top] == np.argsort(-exact)[:5].tolist()
    assert [entry.logprob for entry in found.top] == pytest.approx(np.sort(exact)[::-1][:5])
    assert logprobs(logits, 3, 0).top == ()
