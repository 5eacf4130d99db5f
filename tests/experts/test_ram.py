"""Slots in RAM: what a table names is the expert, whatever was promoted, evicted, cancelled or guessed before, and what
another thread copies from a slot is the expert too."""

import ctypes
import errno
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kimi_lite.arch.config import ModelConfig
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.experts.ram import RamSlots, heat_shape
from kimi_lite.experts.store import ExpertStore
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.cpu.experts import layer_experts
from kimi_lite.native.cpu.matrix import DATA
from tests.tiny import write_tiny_gguf

NUM_EXPERTS, TOP_K = 16, 2
LAYER, EXPERT = st.integers(1, 2), st.integers(0, NUM_EXPERTS - 1)


class Case:
    """A tiny model, its tables and a cache over them."""

    def __init__(self, path, num_slots, **options):
        self.store = GGUFStore.open(path)
        self.config = ModelConfig.from_metadata(self.store.metadata)
        self.index = ExpertIndex.find(self.store, self.config)
        layers = range(self.config.num_dense_layers, self.config.num_layers)
        self.experts = {layer: layer_experts(self.store, self.config, layer)[0] for layer in layers}
        self.whole = {layer: experts.table[:, :, DATA // 8].copy() for layer, experts in self.experts.items()}
        self.bytes = {
            (layer, e): [matrix.data[e].tobytes() for matrix in self.index.layers[layer].matrices]
            for layer in layers
            for e in range(NUM_EXPERTS)
        }
        self.slot_bytes = max(self.index.ram_pools)
        tables = {layer: experts.table for layer, experts in self.experts.items()}
        budget_bytes = (
            num_slots
            * sum(size * len(layers) for size, layers in self.index.ram_pools.items())
            // len(self.index.layers)
        )
        self.cache = RamSlots(self.index, tables, budget_bytes, TOP_K, **options)

    def check_bytes(self, layer, expert):
        """What the kernels would read at the table's addresses."""
        for part, want in enumerate(self.bytes[layer, expert]):
            address = int(self.experts[layer].table[expert, part, DATA // 8])
            assert address != self.whole[layer][expert, part], "still the mapped file"
            assert ctypes.string_at(address, len(want)) == want, (layer, expert, part)

    def run(self, layer, ids, is_ordered=False, guess=()):
        """A layer of a pass; the experts in the order in which they came."""
        came = []
        with self.cache.request(layer, np.array(ids), is_ordered) as request:
            self.cache.prefetch(layer % 2 + 1, np.array(guess, int))
            while experts := request.take():
                for expert in experts:
                    self.check_bytes(layer, expert)
                came += experts
        assert sorted(came) == sorted(set(ids))
        return came

    def settle(self):
        for _ in range(5000):
            self.cache.collect()
            if not any(pool.jobs for pool in self.cache._pools.values()):
                return
            time.sleep(0.0005)
        raise AssertionError("reads do not end")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    types = {"gate_exps": "Q4_0", "up_exps": "TQ2_0", "down_exps": "Q8_0"}
    sizes = {"hidden_size": 512, "expert_feed_forward_size": 64, "num_experts": NUM_EXPERTS}
    return write_tiny_gguf(
        folder / "tiny.gguf", np.random.default_rng(0), types=types, max_tensors_per_shard=20, **sizes
    )


@pytest.fixture
def case(path):
    made = []

    def make(num_slots=6, **options):
        made.append(Case(path, num_slots, **options))
        return made[-1]

    yield make
    for each in made:
        each.cache.close()


def test_shards(path):
    assert len(list(path.parent.glob("*.gguf"))) > 1


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("num_readers", [1, 4])
def test_misses_come_and_stay(case, is_direct, num_readers):
    c = case(is_direct=is_direct, num_readers=num_readers)
    assert c.cache.reader.is_direct <= is_direct
    c.run(1, [3, 5])
    c.run(1, [5, 3, 3])
    c.run(2, [3, 0])
    counters = c.cache.counters()
    assert (counters["expert_hits"], counters["expert_misses"], counters["expert_slots"]) == (2, 4, 6)
    assert counters["disk_bytes"] >= 4 * c.index.layers[1].expert_bytes
    assert counters["expert_resident_bytes"] == 4 * c.slot_bytes


@pytest.mark.parametrize("is_ordered", [True, False])
def test_more_experts_than_slots(case, is_ordered):
    """A prompt: every expert of the layer through few slots."""
    c = case()
    c.run(1, [9, 4])
    came = c.run(1, list(range(NUM_EXPERTS)), is_ordered)
    assert came == sorted(came) or not is_ordered
    assert is_ordered or came[:2] == [4, 9]  # what is there comes first
    c.run(2, [15, 0, 7], is_ordered)


def test_a_right_guess_is_there(case):
    c = case()
    c.run(1, [0], guess=[5, 6])
    c.settle()
    assert c.run(2, [5, 6]) == [5, 6]
    counts = c.cache.counts
    assert (counts.guesses, counts.right_guesses, counts.hits, counts.misses) == (2, 2, 2, 1)


def test_wrong_guesses_are_dropped_and_cost_no_slot(case):
    c = case(num_readers=1)
    for step in range(12):
        c.cache.begin(1)
        c.run(1 + step % 2, [step % 5, 7], guess=[10, 11, 12])
    c.settle()
    policy = c.cache.pool_of(1).policy
    assert policy.num_free + len(policy.choose_victims(99)) == policy.num_slots == 6


def test_hot_experts_survive_a_prompt(case):
    c = case(num_slots=8)
    for _ in range(30):
        c.cache.begin(1)
        c.run(1, [2, 8])
    c.cache.begin(16)
    c.run(1, list(range(NUM_EXPERTS)), is_ordered=True)
    assert c.cache.residents(1)[[2, 8]].all()


def test_heat_brings_the_hottest_back(case):
    first, second = case(), case()
    for _ in range(5):
        first.cache.begin(1)
        first.run(1, [3, 4])
        first.run(2, [3])
    second.cache.import_heat(first.cache.export_heat())
    assert second.cache.warm() == 3
    second.settle()
    assert second.cache.residents(1)[[3, 4]].all() and second.cache.residents(2)[3]
    second.run(1, [3, 4])
    assert second.cache.counts.hits == 2


def test_what_is_needed_goes_before_what_is_warmed(case):
    c = case(num_readers=1)
    heat = np.ones(heat_shape(c.index), np.float32)
    c.cache.import_heat(heat)
    assert c.cache.warm() == 6
    c.run(1, [15, 14])
    c.run(2, [13, 1])


def test_a_failed_read_is_a_sentence_and_costs_no_slot(case, monkeypatch):
    c = case()
    c.run(1, [1])

    def fail(place, offset):
        raise OSError(errno.EIO, "Input/output error")

    healthy = {file: file.read_into for file in c.cache.reader._files.values()}
    for file in healthy:
        monkeypatch.setattr(file, "read_into", fail)
    for is_ordered in (True, False):
        with pytest.raises(
            KimiLiteError, match=r"tiny-0000\d-of-0000\d.gguf: expert \d+ of layer 1 could not be read: Input/output"
        ):
            c.run(1, [1, 2, 3], is_ordered, guess=[9])
        c.settle()
        policy = c.cache.pool_of(1).policy
        assert policy.num_free + len(policy.choose_victims(99)) == policy.num_slots == 6
    for file, read in healthy.items():
        monkeypatch.setattr(file, "read_into", read)
    c.run(1, [1, 2, 3])


def test_a_file_that_became_shorter_is_a_sentence(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), num_experts=NUM_EXPERTS)
    c = Case(path, 6)
    try:
        with path.open("r+b") as file:
            file.truncate(c.index.layers[1].gate.start)
        with pytest.raises(KimiLiteError, match=r"expert 3 of layer 1 could not be read: the file ends"):
            c.run(1, [3])
    finally:
        c.cache.close()


def test_a_budget_of_nothing_is_refused(case):
    with pytest.raises(
        KimiLiteError, match=r"needs at least 0\.0.* GiB to hold 4 experts of a layer; the budget leaves"
    ):
        case(num_slots=3)


def test_the_tables_name_the_file_again_after_the_end(case):
    c = case()
    c.run(1, [1, 2])
    c.cache.close()
    for layer, experts in c.experts.items():
        assert np.array_equal(experts.table[:, :, DATA // 8], c.whole[layer])


def test_layers_of_other_types_have_pools_of_their_own(tmp_path):
    types = {"_exps": "Q4_0", "blk.2.ffn_down_exps": "F32", "blk.3.ffn_down_exps": "F32"}
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(
        path, np.random.default_rng(0), types=types, num_layers=4, num_experts=NUM_EXPERTS, is_gate_up_fused=True
    )
    c = Case(path, 15)
    try:
        assert len(c.cache._pools) == 2
        for layer in (1, 2, 3):
            c.run(layer, [5, 0, 15])
            c.run(layer, list(range(NUM_EXPERTS)), is_ordered=True)
        heat = c.cache.export_heat()
        c.cache.import_heat(heat)
        assert np.allclose(c.cache.export_heat(), heat) and (heat[:, 1:].sum(axis=2) > 0).all()
    finally:
        c.cache.close()


class Tiers(RuleBasedStateMachine):
    """10,000 steps of anything: passes, guesses, cancellations, failures. No slot is lost, no byte is
    wrong."""

    shared_path = None

    @initialize(num_readers=st.integers(1, 3), is_direct=st.booleans())
    def begin(self, num_readers, is_direct):
        self.case = Case(Tiers.shared_path, 8, num_readers=num_readers, is_direct=is_direct)

    @rule(
        layer=LAYER,
        ids=st.lists(EXPERT, min_size=1, max_size=6),
        is_ordered=st.booleans(),
        guess=st.lists(EXPERT, max_size=5),
    )
    def run_layer(self, layer, ids, is_ordered, guess):
        self.case.cache.begin(1)
        self.case.run(layer, ids, is_ordered, guess)

    @rule(layer=LAYER, is_ordered=st.booleans())
    def run_prompt(self, layer, is_ordered):
        self.case.cache.begin(64)
        self.case.run(layer, range(NUM_EXPERTS), is_ordered)

    @rule(layer=LAYER, ids=st.sets(EXPERT, min_size=1), num_takes=st.integers(0, 2))
    def stop_half_way(self, layer, ids, num_takes):
        with suppress(KeyboardInterrupt), self.case.cache.request(layer, np.array(sorted(ids))) as request:
            for _ in range(num_takes):
                for expert in request.take():
                    self.case.check_bytes(layer, expert)
            raise KeyboardInterrupt

    @rule(layer=LAYER, ids=st.sets(EXPERT, min_size=1))
    def fail(self, layer, ids):
        files = self.case.cache.reader._files.values()
        healthy = [file._num_bytes for file in files]
        self.case.settle()
        for file in files:
            file._num_bytes = 1 << 40  # reads run into the end of the file
            file._read_some = lambda place, offset: 0
        try:
            missing = not self.case.cache.residents(layer)[sorted(ids)].all()
            with self.case.cache.request(layer, np.array(sorted(ids))) as request:
                while request.take():
                    pass
            assert not missing
        except KimiLiteError:
            assert missing
        self.case.settle()
        for file, num_bytes in zip(files, healthy, strict=True):
            file._num_bytes = num_bytes
            del file._read_some

    @rule(layer=LAYER, ids=st.sets(EXPERT))
    def guess(self, layer, ids):
        self.case.cache.prefetch(layer, np.array(sorted(ids), int))

    @rule()
    def warm(self):
        self.case.cache.warm()

    @rule()
    def cancel(self):
        self.case.cache.cancel()

    @invariant()
    def no_slot_is_lost(self):
        if not hasattr(self, "case"):
            return
        cache = self.case.cache
        for pool in cache._pools.values():
            assert pool.policy.num_slots >= 4 and not pool.broken
            assert (
                pool.policy.num_free + len(pool.policy.choose_victims(99)) + len(pool.jobs) == pool.policy.num_slots
            )  # nothing is pinned between passes
        for layer, addresses in cache._tables.items():
            for expert in range(NUM_EXPERTS):
                targets = [np.zeros(len(data), np.uint8) for data in self.case.bytes[layer, expert]]
                is_there = [cache.copy_part(layer, expert, part, target) for part, target in enumerate(targets)]
                assert set(is_there) == {bool(cache.residents(layer)[expert])}
                if cache.residents(layer)[expert]:
                    self.case.check_bytes(layer, expert)
                    assert [target.tobytes() for target in targets] == self.case.bytes[layer, expert]
            absent = ~cache.residents(layer)
            assert np.array_equal(addresses[absent], cache._mapped[layer][absent])

    def teardown(self):
        if hasattr(self, "case"):
            self.case.settle()
            self.case.cache.close()


def test_anything_in_any_order(path):
    Tiers.shared_path = path
    run_state_machine_as_test(Tiers, settings=settings(max_examples=25, stateful_step_count=120, deadline=None))


def test_another_thread_reads_whole_experts_while_slots_change(case):
    """Few slots that change all the time, and threads that read any expert: never a mixture of two, and what a slot
    held was copied from there."""
    c = case(num_slots=6, num_readers=3)
    store, errors, is_over = ExpertStore(c.index, c.cache), [], threading.Event()

    def read_any(seed):
        rng = np.random.default_rng(seed)
        while not is_over.is_set():
            layer, expert = int(rng.integers(1, 3)), int(rng.integers(NUM_EXPERTS))
            slot = store.read(layer, expert)
            parts = [slot[matrix.offset : matrix.end].tobytes() for matrix in c.index.layers[layer].matrices]
            if parts != c.bytes[layer, expert]:
                errors.append((layer, expert))

    threads = [threading.Thread(target=read_any, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(9)
    for step in range(300):
        c.cache.begin(1)
        c.run(1 + step % 2, sorted(set(rng.integers(0, NUM_EXPERTS, 4).tolist())), guess=[int(rng.integers(16))])
    is_over.set()
    for thread in threads:
        thread.join()
    assert not errors and store.num_ram_reads > 0 and store.num_file_reads > 0
