"""What changes of its own accord between steps, on experts that are made up."""

import logging
from types import SimpleNamespace

import pytest

from kimi_lite.experts.costs import ExpertCosts, promotion_words
from kimi_lite.model.hybrid.adaptive import MAX_PROMOTIONS, Adaptive


class Experts:
    """Each step takes what it is allowed to promote; `begun`: (budget, least gain) of every step."""

    def __init__(self, hits_per_promotion: float = 4.0, capacity: int = 900) -> None:
        policy = SimpleNamespace(hits_per_promotion=hits_per_promotion)
        self.slots, self.costs = (
            SimpleNamespace(policy=policy, capacity=capacity),
            ExpertCosts(cpu_s=1e-4, choice_s=1e-4),
        )
        self.num_threads, self.begun = 1, []
        self.is_worth_it = True

    def begin_step(self, budget: int, num_tokens: int, least_gain: float) -> int:
        self.begun.append((budget, least_gain))
        return budget if self.is_worth_it else 0


def run(adaptive: Adaptive, cost_s: float, num_steps: int = 200, num_tokens: int = 1, is_steady: bool = True) -> None:
    for step in range(num_steps):
        adaptive.begin(num_tokens, is_decoding=True)
        adaptive.end(num_tokens, step + 1, 0.05 + cost_s * adaptive._num_promoted, is_steady)


def test_the_price_of_a_promotion_is_what_was_measured():
    experts = Experts()
    adaptive = Adaptive(experts, [1])
    run(adaptive, cost_s=3e-4)  # of a miss's 2e-4
    budget, least_gain = experts.begun[-1]
    assert 0 < budget <= MAX_PROMOTIONS and least_gain == pytest.approx(1.5, rel=0.01)
    assert adaptive.counters()["promotion_cost_s"] == pytest.approx(3e-4, rel=0.01)


def test_a_prompt_earns_promotions_for_its_answer():
    """None during the prompt; more than usual in the first steps after it, until those are used up."""
    experts = Experts()
    adaptive = Adaptive(experts, [1])
    run(adaptive, cost_s=1e-4, num_steps=20)
    for _ in range(2):
        adaptive.begin(512, is_decoding=False)
    assert [budget for budget, _ in experts.begun[-2:]] == [0, 0]
    adaptive.begin(1, is_decoding=True)
    assert experts.begun[-1][0] == 2 * 512 // 4
    adaptive.end(1, 1, 0.2, is_steady=True)
    run(adaptive, cost_s=1e-4, num_steps=10)
    assert all(budget <= MAX_PROMOTIONS for budget, _ in experts.begun[-10:])
    for _ in range(1000):
        adaptive.begin(4096, is_decoding=False)
    experts.is_worth_it = False
    adaptive.begin(1, is_decoding=True)
    assert experts.begun[-1][0] == 900, "no more than there are slots"
    adaptive.begin(1, is_decoding=True)
    assert experts.begun[-1][0] <= MAX_PROMOTIONS, "where none was worth it no more are owed"


def test_it_says_when_it_changes_its_mind(caplog):
    experts = Experts(hits_per_promotion=0.5)
    adaptive = Adaptive(experts, [1])
    with caplog.at_level(logging.INFO, "kimi_lite.model"):
        run(adaptive, cost_s=5e-3)
        assert [record.getMessage() for record in caplog.records] == [
            f"experts copied to VRAM while it answers: {promotion_words(0, 0, 0)}"
        ]
        caplog.clear()
        experts.slots.policy.hits_per_promotion = 50.0
        run(adaptive, cost_s=1e-4, num_steps=300)
        (line,) = (record.getMessage() for record in caplog.records)
        assert "up to 1 a step" in line and "saves about 10.00 ms" in line


def test_steps_that_are_no_measure_change_nothing():
    experts = Experts(hits_per_promotion=0.5)
    adaptive = Adaptive(experts, [1, 2])
    before = adaptive.counters()
    run(adaptive, cost_s=1.0, is_steady=False)
    assert adaptive.counters() == before


def test_without_experts_there_is_nothing_to_do():
    adaptive = Adaptive(None, [1])
    adaptive.begin(1, is_decoding=True)
    adaptive.end(1, 1, 0.1, is_steady=True)
    assert adaptive.counters() == {}
