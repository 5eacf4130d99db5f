"""Where RAM does not hold all experts, VRAM's slots are no copies: together they hold more than either, and an expert
gives the same bits wherever it is."""

import numpy as np
import pytest

from kimi_lite.experts.index import ExpertIndex
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.hybrid.transformer import HybridTransformer
from tests.model.hybrid.runner import DEVICE, HybridRunner
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="bits of CPU and GPU are compared")


NUM_SLOTS, NUM_LAYERS, NUM_EXPERTS = 6, 2, 8  # in VRAM, and layers and experts of the tiny model


def only_rows(runner: HybridRunner) -> HybridRunner:
    """No expert of a prompt is worth an upload."""
    runner.transformer.experts.costs.stream_s = 1e9
    return runner


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    types = {"_exps": "Q4_0", "ffn_down_exps": "Q8_0"}
    return write_tiny_gguf(tmp_path_factory.mktemp("exclusive") / "tiny.gguf", np.random.default_rng(0), types=types)


@pytest.fixture(scope="module")
def tier(path):
    """RAM for exactly the experts that have no slot in VRAM."""
    store = GGUFStore.open(path)
    with HybridRunner(path) as runner:
        index = ExpertIndex.find(store, runner.config)
    ((slot_bytes, layers),) = index.ram_pools.items()
    assert len(layers) == NUM_LAYERS
    return {"ram_expert_bytes": (NUM_LAYERS * NUM_EXPERTS - NUM_SLOTS) * slot_bytes, "is_reading_direct": False}


def in_two_places(model: HybridTransformer) -> int:
    """Experts that have a slot in VRAM and one in RAM."""
    experts = model.experts
    layers = experts.store.index.layers
    return sum(int((experts.slots.residents(n) & experts.store.ram.residents(n)).sum()) for n in layers)


def test_vram_and_ram_hold_every_expert_once(path, tier):
    """Promotions free slots in RAM, what VRAM gives up is read again: once all have been read, nothing more is, however
    the slots change hands; and the bits are those of a model in RAM."""
    ids = np.random.default_rng(1).integers(0, 250, 160)
    with only_rows(HybridRunner(path)) as runner:
        want = [runner.prefill(ids[:40]), runner.decode(ids[40:], start=40)]
    with only_rows(HybridRunner(path, num_gpu_experts=NUM_SLOTS, **tier)) as runner:
        model = runner.transformer
        have = [runner.prefill(ids[:40])]
        have.append(runner.decode(ids[40:], start=40))
        assert np.array_equal(have[0], want[0]) and np.array_equal(have[1], want[1])
        model.experts.slots.finish()
        assert model.counters()["gpu_experts"] == NUM_SLOTS and model.counters()["expert_promotions"] > NUM_SLOTS
        ram = model.experts.store.ram
        for _ in range(50):  # what is on its way arrives
            if not any(pool.jobs for pool in ram._pools.values()):
                break
            ram.collect(is_waiting=True)
        assert in_two_places(model) <= 1, "one that is being promoted, until it has arrived"
        num_held = sum(int((model.experts.slots.residents(n) | ram.residents(n)).sum()) for n in (1, 2))
        assert num_held >= NUM_LAYERS * NUM_EXPERTS - 1


def test_a_slot_changes_hands(path, tier):
    """By hand: VRAM takes an expert and gives up another. RAM's slot is free at once, and what was given up comes
    back."""
    with HybridRunner(path, num_gpu_experts=NUM_SLOTS, **tier) as runner:
        ram, store = runner.transformer.experts.store.ram, runner.transformer.experts.store
        with ram.request(1, np.arange(4)) as request:
            while request.take():
                pass
            store.moved(1, 0, is_in_vram=True)
            assert ram.residents(1)[0] or not ram.residents(1)[:4].all()  # pinned by the request, or free
        store.moved(1, 1, is_in_vram=True)
        assert not ram.residents(1)[1] and ram.residents(1)[2]
        mapped = ram._mapped[1][1]
        assert np.array_equal(ram._tables[1][1], mapped), "kernels would read the file"
        store.moved(1, 1, is_in_vram=False)
        ram.collect(is_waiting=True)
        assert ram.residents(1)[1] and not np.array_equal(ram._tables[1][1], mapped)
        want = store.index.layers[1].gate.data[1].reshape(-1)
        assert np.array_equal(ram._resident[1, 1][0], want)


@pytest.mark.parametrize("loading", ["read", "lock"])
def test_nothing_is_released_where_ram_holds_all(path, loading):
    """`--load` on the hybrid path: every expert is read once, at the start, and keeps its slot."""
    with HybridRunner(path, num_gpu_experts=NUM_SLOTS, loading=loading) as runner:
        read_bytes = runner.transformer.counters()["disk_bytes"]
        runner.decode(np.random.default_rng(2).integers(0, 250, 40))
        runner.transformer.experts.slots.finish()
        assert in_two_places(runner.transformer) == NUM_SLOTS
        assert runner.transformer.counters()["disk_bytes"] == read_bytes
