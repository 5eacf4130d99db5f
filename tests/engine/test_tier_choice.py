"""What the loader makes of a plan: mapping, the disk tier, or everything loaded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.engine.loader import load
from kimi_lite.engine.planning import choose_tier, plan_load
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.options import Options
from tests.tiny import write_tiny_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("choice") / "tiny.gguf", np.random.default_rng(0))


def test_the_plan_decides(path):
    store = GGUFStore.open(path)
    config = ModelConfig.from_metadata(store.metadata)
    plan = plan_load(store, config, Options())
    assert choose_tier(store, config, plan, Options()) is None
    small = replace(plan, ram_expert_bytes=1000, disk_expert_bytes=500)
    tier = choose_tier(store, config, small, Options(cache_bias=0.25))
    assert (tier.budget_bytes, tier.cache_bias, tier.heat_path) == (1000, 0.25, path.with_name("tiny.heat.npz"))
    assert not tier.is_loading_all
    loaded = choose_tier(store, config, plan, Options(loading="lock"))
    assert loaded.is_loading_all and loaded.is_locked and loaded.heat_path is None


def test_experts_are_loaded_with_progress(path):
    seen = []
    with load(path, Options(loading="read", num_threads=1), lambda *progress: seen.append(progress)) as engine:
        counters = engine.counters()
    assert counters["expert_slots"] == 16 and counters["disk_bytes"] > 0 and "disk_is_direct" in counters
    stages = [(done, total) for stage, done, total in seen if stage == "reading experts"]
    assert stages and stages[-1][0] == stages[-1][1] > 0
