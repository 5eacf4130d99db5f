"""The loader allocates what the plan says: another plan, other allocations. On the CPU path; the hybrid path's is in
`tests.model.hybrid.test_parts`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.engine import loader
from kimi_lite.engine.planning import plan_load
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.options import Options
from tests.tiny import write_tiny_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("choice") / "tiny.gguf", np.random.default_rng(0))


def load_with(monkeypatch, path, options, **numbers):
    """An engine for the real plan with other numbers."""
    monkeypatch.setattr(loader, "plan_load", lambda *args: replace(plan_load(*args), **numbers))
    return loader.load(path, options)


def test_the_plans_numbers_are_allocated(path, monkeypatch):
    """RAM for experts, pages of the cache for several sequences, threads."""
    store = GGUFStore.open(path)
    index = ExpertIndex.find(store, ModelConfig.from_metadata(store.metadata))
    slot_bytes = index.ram_bytes // (index.num_experts * len(index.layers))
    for num_slots, num_pages, num_threads in ((9, 8, 1), (13, 12, 2)):
        numbers = {"num_cache_pages": num_pages, "num_threads": num_threads}
        numbers |= {"ram_expert_bytes": num_slots * slot_bytes, "disk_expert_bytes": 1}
        with load_with(monkeypatch, path, Options(context_length=256), **numbers) as engine:
            counters = engine.counters()
            assert (counters["expert_slots"], counters["kv_pages"]) == (num_slots, num_pages)
            assert engine.model.team.num_threads == num_threads
        heat = path.with_name("tiny.heat.npz")
        assert heat.exists()
        heat.unlink()
    with load_with(monkeypatch, path, Options(context_length=256, num_sequences=3)) as engine:
        assert engine.counters()["kv_pages"] == 12 and "expert_slots" not in engine.counters()
    assert not heat.exists()


def test_experts_are_loaded_with_progress(path):
    seen = []
    with loader.load(path, Options(loading="read", num_threads=1), lambda *progress: seen.append(progress)) as engine:
        counters = engine.counters()
    assert counters["expert_slots"] == 16 and counters["disk_bytes"] > 0 and "disk_is_direct" in counters
    stages = [(done, total) for stage, done, total in seen if stage == "reading experts"]
    assert stages and stages[-1][0] == stages[-1][1] > 0
