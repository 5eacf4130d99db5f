"""Slots in VRAM: whatever is promoted, evicted or cancelled, a slot that is named holds its expert's bytes."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.vram import VramSlots
from tests.experts.slots_case import NumberedExperts, SlowDevice

NUM_SLOTS, TOP_K = 6, 2
LAYERS, EXPERTS = range(1, 3), range(8)


class SlotsMachine(RuleBasedStateMachine):
    """Steps of a model in random order with everything that may happen between them; copies end late, at random."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.source = SlowDevice(), NumberedExperts()
        self.slots = VramSlots(self.device, self.source, NUM_SLOTS)
        self.num_noted = 0
        self.lent: list[int] = []

    def teardown(self) -> None:
        self.device.complete()
        self.slots.close()

    @rule(
        layer=st.sampled_from(LAYERS),
        ids=st.lists(st.sampled_from(EXPERTS), min_size=TOP_K, max_size=TOP_K, unique=True),
    )
    def use(self, layer: int, ids: list[int]) -> None:
        """A layer runs: what it finds in slots are the experts it asked for."""
        chosen = np.array([ids], np.int32)
        for expert, slot in zip(ids, self.slots.slots_of(layer, chosen)[0], strict=True):
            if slot >= 0:
                assert np.array_equal(self.slots.slots[slot].numpy(), self.source.bytes_of(layer, expert)), (
                    layer,
                    expert,
                )
        self.slots.count(layer, chosen)
        self.num_noted += TOP_K

    @rule(budget=st.integers(0, 5))
    def step(self, budget: int) -> None:
        assert self.slots.begin_step(budget) <= budget

    @rule()
    def copies_end(self) -> None:
        self.device.complete()

    @rule()
    def cancel(self) -> None:
        self.slots.cancel()

    @rule()
    def finish(self) -> None:
        self.slots.finish()
        assert len(self.slots._uploads) == 0

    @precondition(lambda self: self.num_noted)
    @rule()
    def fill(self) -> None:
        self.slots.fill()

    @rule(count=st.integers(1, NUM_SLOTS))
    def lend(self, count: int) -> None:
        """Whoever borrows writes what it likes, and nothing that is named is harmed."""
        new, freed = self.slots.lend(count)
        freed.synchronize()
        assert len(new) <= count and not set(new) & set(self.lent)
        self.lent += new
        self.slots.slots[self.lent] = 0xEE

    @rule()
    def take_back(self) -> None:
        self.slots.take_back(self.lent)
        self.lent = []

    @invariant()
    def lent_slots_keep_what_was_written(self) -> None:
        assert (self.slots.slots[self.lent] == 0xEE).all()

    @invariant()
    def tables_agree(self) -> None:
        """Host, device and policy name the same slots, each once; none of them is being written."""
        table = self.slots.table.numpy()
        named = table[table >= 0]
        assert len(set(named.tolist())) == len(named) == self.slots.policy.num_resident
        for layer in range(self.source.num_layers):
            every = np.arange(self.source.num_experts, dtype=np.int32)
            assert np.array_equal(table[layer], self.slots.slots_of(layer, every))
            assert np.array_equal(table[layer], self.slots.policy.find(layer, every))

    @invariant()
    def no_slot_leaks(self) -> None:
        """Every slot is free, loading, resident or lent."""
        policy, num_loading = self.slots.policy, len(self.slots._uploads)
        assert policy.num_free + num_loading + policy.num_resident + len(self.lent) == policy.num_slots <= NUM_SLOTS

    @invariant()
    def every_choice_is_counted(self) -> None:
        assert self.slots.num_hits + self.slots.num_misses == self.num_noted


class TestSlots(SlotsMachine.TestCase):
    """A few runs for every day."""

    settings = settings(
        max_examples=20,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )


@pytest.mark.slow
class TestSlotsLong(SlotsMachine.TestCase):
    """More than 10,000 steps: `pytest -m slow tests/experts/test_vram.py`."""

    settings = settings(
        max_examples=120,
        stateful_step_count=100,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )


@pytest.fixture
def slots():
    device = SlowDevice()
    opened = VramSlots(device, NumberedExperts(), NUM_SLOTS)
    yield opened
    device.complete()
    opened.close()


def count(slots: VramSlots, layer: int, *ids: int) -> None:
    slots.count(layer, np.array([ids], np.int32))


def test_an_upload_is_never_waited_for(slots):
    """A step begins, though a copy has not ended; the expert is used from the first step after it has."""
    count(slots, 1, 3, 5)
    assert slots.begin_step(2) == 2
    assert slots.begin_step(0) == 0
    assert (slots.slots_of(1, np.array([3, 5], np.int32)) < 0).all()
    for upload in slots._uploads:
        upload.is_handled.wait()
    slots._streams.complete()
    assert (slots.slots_of(1, np.array([3, 5], np.int32)) < 0).all(), "not before the next step"
    slots.begin_step(0)
    assert (slots.slots_of(1, np.array([3, 5], np.int32)) >= 0).all()


def test_evicted_at_once_and_overwritten_later(slots):
    """The table forgets an expert when its slot is given away, not when the new bytes come."""
    count(slots, 1, 0, 1)
    count(slots, 1, 2, 3)
    count(slots, 1, 4, 5)
    slots.fill()
    old = {slot: slots.slots[slot].numpy().copy() for slot in range(NUM_SLOTS)}
    for _ in range(20):
        slots.begin_step(0)
        count(slots, 2, 6, 7)
    assert slots.begin_step(2) == 2
    assert slots.residents(1).sum() == 4 and not slots.residents(2).any()
    assert all(np.array_equal(slots.slots[slot].numpy(), old[slot]) for slot in old), (
        "nothing is written before the copy runs"
    )
    slots.finish()
    assert slots.residents(2).sum() == 2


def test_budget_and_hot_experts(slots):
    count(slots, 1, 0, 1)
    for _ in range(3):
        count(slots, 2, 4, 5)
    slots.begin_step(1)
    slots.finish()
    assert slots.residents(2)[[4, 5]].sum() == 1, "the hottest first, within the budget"
    counters = slots.counters()
    assert counters["expert_promotions"] == 1 and counters["gpu_expert_slots"] == NUM_SLOTS
    assert counters["gpu_expert_misses"] == 8


def test_a_failed_read_frees_the_slot(slots):
    slots._store.fail_on = (1, 3)
    count(slots, 1, 3, 5)
    slots.begin_step(2)
    with pytest.raises(KimiLiteError, match="broken disk"):
        slots.finish()
    slots.finish()
    assert slots.residents(1)[5] and not slots.residents(1)[3]
    assert slots.policy.num_free + slots.policy.num_resident == NUM_SLOTS


def test_slots_for_all_are_filled_with_all():
    """In two layers of eight; one with fewer slots brings only what was used."""
    device, source = GpuStreams("cpu"), NumberedExperts()
    for num_slots, num_wanted in ((16, 16), (15, 2)):
        slots = VramSlots(device, source, num_slots)
        count(slots, 2, 4, 5)
        slots.fill()
        assert slots.policy.num_resident == num_wanted
        for layer in LAYERS:
            for expert in np.flatnonzero(slots.residents(layer)):
                slot = slots.slots_of(layer, np.array([expert], np.int32))[0]
                assert np.array_equal(slots.slots[slot].numpy(), source.bytes_of(layer, expert))
        slots.close()
