"""What is learned from real steps, on machines that are made up: the choices must become the right ones and stay."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.experts.costs import ExpertCosts, Growth, PromotionBudget, Tuner


def learned(stream_s: float, cpu_s: float, choice_s: float, noise: float = 0.05) -> ExpertCosts:
    """Costs after forty layers of different sizes on a machine that needs these times."""
    rng, costs = np.random.default_rng(0), ExpertCosts()
    for _ in range(40):
        experts = int(rng.integers(1, 100))
        choices = int(experts * rng.integers(1, 40))
        factor = 1 + noise * rng.standard_normal()
        costs.observe_cpu(experts, choices, factor * (experts * cpu_s + choices * choice_s))
        costs.observe_stream(experts, factor * experts * stream_s)
    return costs


def test_costs_are_found():
    costs = learned(stream_s=4e-4, cpu_s=1.5e-4, choice_s=2e-5)
    assert costs.stream_s == pytest.approx(4e-4, rel=0.1)
    assert costs.cpu_s == pytest.approx(1.5e-4, rel=0.3)
    assert costs.choice_s == pytest.approx(2e-5, rel=0.1)


def test_one_token_at_a_time_changes_only_what_it_shows():
    """Decoding shows cpu + choice and not the two apart: their sum is learned, and the prompt's share stays
    plausible."""
    costs = ExpertCosts()
    for _ in range(200):
        costs.observe_cpu(8, 8, 8 * 1e-3)
    assert costs.cpu_s + costs.choice_s == pytest.approx(1e-3, rel=0.02)
    assert min(costs.cpu_s, costs.choice_s) > 0


def test_few_tokens_stay_on_the_cpu_and_many_stream():
    """A 4090's bus and a desktop's memory: the crossover lies at some tens of tokens, as peers measure it."""
    costs = learned(stream_s=4e-4, cpu_s=1.5e-4, choice_s=2e-5)
    share = {}
    for num_tokens in (1, 16, 64, 512, 8192):
        wanted = np.sort(np.bincount(np.random.default_rng(1).integers(0, 384, 8 * num_tokens), minlength=384))[::-1]
        wanted = wanted[wanted > 0]
        share[num_tokens] = costs.split(wanted.tolist(), -(-num_tokens // 512)) / len(wanted)
    assert share[1] < 0.4 < share[512] < share[8192] < 1
    assert list(share.values()) == sorted(share.values())


def test_a_cold_start_is_no_verdict():
    """The first prompt's experts came from the disk, ten times slower than the bus: later prompts stream all the
    same."""
    costs = learned(stream_s=4e-4, cpu_s=1.5e-4, choice_s=2e-5)
    wanted = [20] * 384
    warm = costs.split(wanted)
    for _ in range(30):
        costs.observe_stream(384, 384 * 40e-3)
    num_layers = 0
    while costs.split(wanted) < 0.9 * warm and num_layers < 300:
        num_streamed, num_layers = costs.split(wanted, 1, costs.trial(wanted)), num_layers + 1
        costs.divided(num_streamed, len(wanted) - num_streamed)
        costs.observe_stream(num_streamed, num_streamed * 4e-4)
    assert warm > 100 and num_layers < 300, "a few chunks of sixty layers"


def played(costs: ExpertCosts, num_streamed: int, cpu_s: float) -> float:
    """Seconds until both sides have ended, each at its own speed once the other has."""
    bus_slowdown = costs.stream_beside_s / costs.stream_s
    cpu_ends_s, bus_ends_s = costs.cpu_slowdown * cpu_s, num_streamed * costs.stream_beside_s
    if cpu_ends_s < bus_ends_s:
        return cpu_ends_s + (bus_ends_s - cpu_ends_s) / bus_slowdown
    return bus_ends_s + (cpu_ends_s - bus_ends_s) / costs.cpu_slowdown


def test_split_is_the_best_of_all():
    """Against trying every division."""
    rng = np.random.default_rng(2)
    for _ in range(50):
        costs = ExpertCosts(*rng.uniform(1e-6, 1e-3, 3), cpu_slowdown=rng.uniform(1, 4))
        costs.observe_stream(1, costs.stream_s)
        costs.observe_stream(1, rng.uniform(1, 4) * costs.stream_s, is_beside=True)
        wanted = np.sort(rng.integers(1, 50, rng.integers(1, 20)))[::-1]
        each = costs.cpu_s * np.minimum(2, wanted) + costs.choice_s * wanted
        times = [played(costs, m, each[m:].sum()) for m in range(len(wanted) + 1)]
        assert times[costs.split(wanted.tolist(), 2)] == pytest.approx(min(times))
    assert costs.split([]) == 0


def run_tuner(tuner: Tuner, time_of: dict[int, float], rng: np.random.Generator, num_steps: int = 200) -> None:
    for _ in range(num_steps):
        tuner.observe(time_of[tuner.value] * (1 + 0.01 * rng.standard_normal()))


def test_tuner_climbs_and_stays():
    rng = np.random.default_rng(3)
    tuner = Tuner([4, 6, 7, 8], start=8)
    run_tuner(tuner, {4: 1.5, 6: 1.0, 7: 1.1, 8: 1.3}, rng)
    assert tuner.value == 6 and tuner.is_final
    run_tuner(tuner, {4: 0.1, 6: 1.0, 7: 1.0, 8: 1.0}, rng)
    assert tuner.value == 6, "settled: no more trying"
    tuner.restart()
    run_tuner(tuner, {4: 0.1, 6: 1.0, 7: 1.0, 8: 1.0}, rng)
    assert tuner.value == 4


def test_tuner_ignores_noise_and_outliers():
    """Two per cent are no reason to change; one step that stutters is none either."""
    rng = np.random.default_rng(4)
    tuner = Tuner([7, 8], start=8)
    for step in range(100):
        tuner.observe((1.0 if tuner.value == 8 else 0.98) * (50 if step % 10 == 3 else 1))
    assert tuner.value == 8
    single = Tuner([5], start=5)
    run_tuner(single, {5: 1.0}, rng, 10)
    assert single.value == 5 and single.is_final


def run_budget(
    budget: PromotionBudget,
    cost_s: float,
    gain_s: float,
    num_steps: int = 600,
    noise: float = 0.0,
    slow: Mapping[int, float] | None = None,
    seed: int = 5,
) -> np.ndarray:
    """The budget after each step, of 64 ms and the promotions' cost. slow: steps that take so long instead."""
    return _run(budget, cost_s, gain_s, num_steps, noise, slow, seed)[1]


def began(budget: PromotionBudget, cost_s: float, gain_s: float, num_steps: int = 600) -> np.ndarray:
    """How many promotions began in each step."""
    return _run(budget, cost_s, gain_s, num_steps)[0]


def _run(
    budget: PromotionBudget,
    cost_s: float,
    gain_s: float,
    num_steps: int,
    noise: float = 0.0,
    slow: Mapping[int, float] | None = None,
    seed: int = 5,
) -> tuple[np.ndarray, np.ndarray]:
    rng, counts, held = np.random.default_rng(seed), [], []
    for i in range(num_steps):
        count = budget.next()
        elapsed_s = 0.064 * (1 + noise * rng.standard_normal()) + cost_s * count
        budget.observe(1, count, (slow or {}).get(i, elapsed_s), gain_s)
        counts.append(count)
        held.append(budget.budget)
    return np.array(counts), np.array(held)


def test_promotions_that_pay_become_more():
    budget = PromotionBudget(most=4)
    counts = began(budget, cost_s=1e-4, gain_s=1e-3)
    assert budget.budget == 4 and counts.max() == 4
    assert (counts == 0).sum() >= 600 // 16, "now and then a step without, to know what one takes"


def test_promotions_that_cost_more_than_they_bring_stop():
    budget = PromotionBudget(most=4)
    assert (run_budget(budget, cost_s=5e-3, gain_s=1e-3, noise=0.01, num_steps=2000) > 0)[100:].sum() == 0
    counts = began(budget, cost_s=5e-3, gain_s=1e-3, num_steps=1000)
    assert 0 < (counts > 0).sum() < 50, "now and then a trial: the topic may have changed"
    assert (run_budget(budget, cost_s=0, gain_s=1e-3) > 0)[260:].all(), "and when they are cheap again they come back"
    assert not began(PromotionBudget(most=0), cost_s=0, gain_s=1e-3).any()


def test_noise_is_no_cost():
    """Steps that vary by more than a promotion brings, whether they promote or not: the budget holds."""
    assert run_budget(PromotionBudget(most=4), cost_s=0, gain_s=1.5e-3, num_steps=2000, noise=0.05)[100:].mean() > 3


STORIES = {
    "the context doubles: plain calls, then a capture": {500: 0.15, 501: 0.6},
    "a prompt's tail of 16 tokens": {500: 0.9},
    "a first use that compiles": {500: 5.0},
    "a busy second": dict.fromkeys(range(500, 520, 2), 0.3),
}


@pytest.mark.parametrize("story", STORIES)
def test_a_slow_step_does_not_stop_promotions(story):
    """Even if its slowness were not known for what it is."""
    for seed in range(5):
        held = run_budget(PromotionBudget(most=4), 6e-4, 1.5e-3, 3000, noise=0.01, slow=STORIES[story], seed=seed)
        assert (held == 0).sum() < 50 and held[600:].mean() > 3.5


slow_steps = st.dictionaries(st.integers(0, 499), st.floats(0.001, 30), max_size=250)


@settings(max_examples=40, deadline=None)
@given(slow=slow_steps, most=st.integers(1, 8), seed=st.integers(0, 99))
def test_whatever_was_slow_promotions_that_pay_come_back(slow, most, seed):
    """Within 256 steps after the last of up to 250 odd ones; and those that do not pay stay away."""
    held = run_budget(PromotionBudget(most), 2e-4, 2e-3, num_steps=1200, noise=0.01, slow=slow, seed=seed)
    assert (held[756:] > 0).all()
    held = run_budget(PromotionBudget(most), 6e-3, 1e-3, num_steps=2000, noise=0.01, slow=slow, seed=seed)
    assert (held[756:] > 0).mean() < 0.03


def test_steps_of_other_sizes_are_no_pair():
    """Nor steps with something else between them."""
    budget = PromotionBudget(most=4)
    for _ in range(300):
        count = budget.next()
        num_tokens = 1 if count else 16  # sixteen tokens take longer, which says nothing about promotions
        budget.observe(num_tokens, count, 0.01 if count else 0.9, 1e-3)
    assert budget.cost_s == 0
    for _ in range(300):
        budget.observe(1, budget.next(), 0.1, 1e-3)
        budget.interrupt()
    assert budget.cost_s == 0


def test_context_growth():
    growth = Growth(first=4096)
    assert [growth.has_doubled(n) for n in (10, 4095, 4096, 5000, 8191, 8192, 100_000, 100_001)] == [
        *(False, False, True, False, False, True, True, False),
    ]
