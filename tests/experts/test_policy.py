"""The slots' policy: scores, eviction, promotion, pins and budgets, against a bookkeeping of plain dictionaries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kimi_lite.experts.policy import HALF_LIVES, SWAP_WEIGHTS, HeatPolicy, Promotion

LAYERS, EXPERTS, SLOTS = 3, 6, 5


def filled(policy, layer, ids):
    slots = policy.admit(layer, ids)
    for slot in slots:
        policy.commit(slot)
    return slots


def test_scores_follow_recency_and_frequency():
    policy = HeatPolicy(1, 4, 0)
    for step in range(200):
        policy.touch(step, 0, [0])  # the favourite of old
    for step in range(200, 215):
        policy.touch(step, 0, [1])  # the topic of now
    policy.touch(215, 0, [2])
    scores = policy.scores()
    assert scores[1] > scores[0] > scores[2] > scores[3] == 0
    policy.touch(900, 0, [3])
    scores = policy.scores()
    assert scores[3] > scores[0] > scores[1] > scores[2]  # the topic has gone, the favourite is remembered longer


def test_an_expert_chosen_always_scores_one_per_average():
    policy = HeatPolicy(1, 2, 0)
    for step in range(5000):
        policy.touch(step, 0, [1])
    assert policy.scores()[1] == pytest.approx(len(HALF_LIVES), rel=1e-2)


def test_heat_survives_long_runs_and_restarts():
    policy, other = HeatPolicy(2, 3, 0), HeatPolicy(2, 3, 0)
    for step in (0, 1e5, 1e7, 1e7 + 3):
        policy.touch(step, 1, [0, 2, 2, -1])
    assert np.isfinite(policy.scores()).all() and policy.scores()[5] == pytest.approx(2 * policy.scores()[3])
    other.import_heat(policy.export_heat())
    assert np.allclose(other.scores(), policy.scores(), rtol=1e-6)
    assert other.hottest(5) == [(1, 2), (1, 0)]


def test_the_coldest_goes():
    policy = HeatPolicy(1, 6, 3)
    slots = filled(policy, 0, [0, 1, 2])
    for expert, times in ((0, 3), (1, 1), (2, 2)):
        policy.touch(0, 0, [expert] * times)
    assert policy.admit(0, [5]) == [slots[1]]
    assert policy.find(0, [0, 1, 2, 5, -1]).tolist() == [slots[0], -1, slots[2], -1, -1]
    assert policy.loading_slot(0, 5) == slots[1] and policy.key(slots[1]) == (0, 5)
    policy.abort(slots[1])
    assert policy.key(slots[1]) is None and policy.loading_slot(0, 5) == -1


def test_pinned_and_loading_slots_are_safe():
    policy = HeatPolicy(1, 6, 2)
    slots = filled(policy, 0, [0, 1])
    policy.pin([slots[0], -1])
    assert policy.admit(0, [2, 3]) == [slots[1], -1]
    assert policy.num_free == 0 and policy.choose_victims(99) == []
    policy.commit(slots[1])
    policy.unpin([slots[0]])
    assert sorted(policy.admit(0, [4, 5])) == sorted(slots)


def test_a_guess_does_not_evict_what_is_hotter():
    policy = HeatPolicy(1, 4, 2)
    filled(policy, 0, [0, 1])
    policy.touch(0, 0, [0, 1, 1])
    assert policy.admit(0, [2], max_score=0.0) == [-1]
    assert policy.admit(0, [2, 3], max_score=policy.scores()[0])[1] == -1
    assert policy.loading_slot(0, 2) >= 0 and policy.residents(0).tolist() == [False, True, False, False]


def test_promotions_within_a_budget():
    policy = HeatPolicy(2, 4, 3)
    slots = filled(policy, 0, [0, 1])
    policy.touch(0, 0, [0, 0, 0, 0, 1])
    policy.touch(0, 1, [0, 0, 0, 1, 1, 2])
    found = policy.promotions(2, least_gain=0)
    assert [p[:3] for p in found] == [(1, 0, 2), (1, 1, slots[1])]  # a free slot, then the coldest one's
    assert policy.promotions(9, least_gain=0) == found  # expert (1, 2) is no hotter than what it would replace
    assert policy.promotions(0) == []
    for promotion in found:
        policy.begin_promotion(promotion)
    assert policy.promotions(9, least_gain=0) == []
    for promotion in found:
        policy.commit(promotion.slot)
    assert policy.residents(1).tolist() == [True, True, False, False]


def test_a_swap_must_pay_back():
    """Only those begin that are expected to bring as many hits as their copies cost."""
    policy = HeatPolicy(1, 3, 1)
    filled(policy, 0, [0])
    for step in range(100):
        policy.touch(step, 0, [0] if step % 2 else [1])
    assert policy.promotions(1) == [], "near-equals stay"
    for step in range(100, 103):
        policy.touch(step, 0, [1])
    (found,) = policy.promotions(1)
    assert found[:3] == (0, 1, 0) and found.score > 0
    expected = found.score * policy.hits_per_score
    assert policy.promotions(1, least_gain=expected * 0.99) and not policy.promotions(1, least_gain=expected * 1.01)


@given(rate=st.floats(0, 1), evicted_rate=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_what_swaps_bring_is_counted(rate, evicted_rate, seed):
    """Newcomers that are chosen at one rate, in the place of experts that are chosen at another: the difference is what
    a promotion is said to bring, whatever was believed before."""
    rng, policy = np.random.default_rng(seed), HeatPolicy(1, 400, 200, weights=SWAP_WEIGHTS)
    filled(policy, 0, range(200))
    for expert in range(150):
        policy.begin_promotion(Promotion(0, 200 + expert, expert, 0.25))
    for step in range(1, 34):
        new, old = rng.random(150) < rate, rng.random(150) < evicted_rate
        policy.touch(step, 0, np.concatenate([200 + np.flatnonzero(new), np.flatnonzero(old)]))
    brought = 32 * (rate - evicted_rate)
    usual = HeatPolicy(1, 1, 0).hits_per_promotion
    assert policy.hits_per_promotion == pytest.approx(max(0, (150 * brought + 20 * usual) / 170), abs=2)
    assert (policy.hits_per_score > HeatPolicy(1, 1, 0).hits_per_score) == (brought > usual + 1e-9) or abs(
        brought - usual
    ) < 1
    policy.touch(9000, 0, [0])
    assert policy.hits_per_promotion == pytest.approx(usual, abs=0.5), "what is long ago says nothing"


def test_a_prompt_is_as_its_tokens_one_by_one():
    rng, whole, one = np.random.default_rng(0), HeatPolicy(1, 20, 0), HeatPolicy(1, 20, 0)
    ids = rng.integers(-1, 20, (50, 3))
    whole.touch(50, 0, ids)
    for step, row in enumerate(ids, start=1):
        one.touch(step, 0, row)
    assert np.allclose(whole.scores(), one.scores(), rtol=1e-9)


def test_each_layer_keeps_its_share():
    """Fewer slots than a token needs: without shares, what comes in for one layer pushes out the other's."""
    num_layers, top_k, hits = 8, 4, {}
    for num_sharing in (0, num_layers):
        rng = np.random.default_rng(0)
        chosen = rng.permuted(np.tile(np.arange(64), (num_layers, 1)), axis=1)[:, :top_k]
        policy = HeatPolicy(num_layers, 64, 3 * num_layers, num_sharing=num_sharing)
        hits[num_sharing] = 0
        for step in range(1, 200):
            for layer in range(num_layers):
                others = rng.permutation(np.setdiff1d(np.arange(64), chosen[layer]))[:top_k]
                ids = chosen[layer] = np.where(rng.random(top_k) < 0.5, chosen[layer], others)
                policy.touch(step, layer, ids)
                slots = policy.find(layer, ids)
                hits[num_sharing] += int((slots >= 0).sum())
                policy.pin(slots)
                for slot in policy.admit(layer, ids[slots < 0].tolist()):
                    if slot >= 0:
                        policy.commit(slot)
                policy.unpin(slots)
    assert hits[num_layers] > 1.15 * hits[0] > 0
    policy = HeatPolicy(3, 8, 6, num_sharing=3)
    slots = filled(policy, 0, range(6))
    policy.pin(slots[:5])
    assert policy.admit(1, [0, 1]) == [slots[5], -1], "whatever is there is taken before nothing is"


def test_a_policy_without_slots():
    policy = HeatPolicy(1, 4, 0)
    policy.touch(0, 0, [1])
    assert policy.find(0, [0, 1]).tolist() == [-1, -1] and policy.admit(0, [1]) == [-1]
    assert policy.promotions(3) == [] and not policy.residents(0).any()


class Slots(RuleBasedStateMachine):
    """Anything in any order; `self.model` is what must be true."""

    num_sharing = 0

    @initialize()
    def begin(self):
        self.policy, self.step = HeatPolicy(LAYERS, EXPERTS, SLOTS, num_sharing=self.num_sharing), 0
        self.model = {}  # slot -> [key, is_resident, pins]

    @rule(
        layer=st.integers(0, LAYERS - 1),
        ids=st.lists(st.integers(-1, EXPERTS - 1), max_size=8),
        tokens=st.integers(0, 300),
    )
    def touch(self, layer, ids, tokens):
        self.step += tokens
        self.policy.touch(self.step, layer, ids)

    @rule(layer=st.integers(0, LAYERS - 1), ids=st.sets(st.integers(0, EXPERTS - 1), max_size=4))
    def admit(self, layer, ids):
        taken = {key for key, _, _ in self.model.values()}
        absent = sorted(e for e in ids if (layer, e) not in taken)
        for expert, slot in zip(absent, self.policy.admit(layer, absent), strict=True):
            if slot < 0:
                assert all(not is_resident or pins for _, is_resident, pins in self.model.values())
                continue
            assert slot not in self.model or self.model[slot][1:] == [True, 0]
            self.model[slot] = [(layer, expert), False, 0]

    @rule(budget=st.integers(0, 4))
    def promote(self, budget):
        found = self.policy.promotions(budget)
        assert len({p.slot for p in found}) == len(found) <= budget
        for promotion in found:
            layer, expert, slot, _ = promotion
            assert (layer, expert) not in {key for key, _, _ in self.model.values()}
            self.policy.begin_promotion(promotion)
            self.model[slot] = [(layer, expert), False, 0]

    @rule(which=st.integers(0, SLOTS - 1), comes=st.booleans())
    def finish(self, which, comes):
        entry = self.model.get(which)
        if entry is None or entry[1] or (not comes and entry[2]):
            return
        (self.policy.commit if comes else self.policy.abort)(which)
        if comes:
            entry[1] = True
        else:
            del self.model[which]

    @rule(which=st.integers(0, SLOTS - 1), more=st.booleans())
    def pin(self, which, more):
        entry = self.model.get(which)
        if entry is None or (not more and not entry[2]):
            return
        (self.policy.pin if more else self.policy.unpin)([which])
        entry[2] += 1 if more else -1

    @invariant()
    def the_books_agree(self):
        if not hasattr(self, "policy"):
            return
        for layer in range(LAYERS):
            want = np.full(EXPERTS, -1)
            for slot, (key, is_resident, _) in self.model.items():
                if key[0] == layer and is_resident:
                    want[key[1]] = slot
            assert np.array_equal(self.policy.find(layer, np.arange(EXPERTS)), want)
            assert np.array_equal(self.policy.residents(layer), want >= 0)
        free = self.policy.num_slots - len(self.model)
        evictable = sum(is_resident and not pins for _, is_resident, pins in self.model.values())
        assert self.policy.num_free == free and len(self.policy.choose_victims(SLOTS)) == evictable
        assert self.policy.num_resident == sum(is_resident for _, is_resident, _ in self.model.values())


class SharedSlots(Slots):
    """With a share for each layer."""

    num_sharing = LAYERS


Slots.TestCase.settings = settings(max_examples=30, stateful_step_count=60, deadline=None)
SharedSlots.TestCase.settings = Slots.TestCase.settings
TestSlots = Slots.TestCase
TestSharedSlots = SharedSlots.TestCase
