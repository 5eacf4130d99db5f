"""Experts behind a GPU whose threads and slots are divided over two pretended memory nodes: the same bits as on one."""

import os

import numpy as np
import pytest

from kimi_lite.experts import ram
from kimi_lite.model.hybrid import cpu_experts
from kimi_lite.model.hybrid import experts as hybrid_experts
from kimi_lite.native.cpu.nodes import ThreadGroup
from tests.model.hybrid.runner import HybridRunner
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are kept to CPUs on Linux")


@pytest.mark.parametrize("loading", ["map", "read"])
def test_two_nodes_change_no_bit(loading, tmp_path, monkeypatch):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    cpus, asked, placed = frozenset(os.sched_getaffinity(0)), [], []
    groups = (ThreadGroup(0, 0, cpus, 0, 1), ThreadGroup(1, 1, cpus, 1, 3))
    for module in (cpu_experts, hybrid_experts):
        monkeypatch.setattr(module, "place_threads", lambda num_threads: asked.append(num_threads) or groups)
    monkeypatch.setattr(ram, "place_slots", lambda memory, layer, own: placed.append(own))
    ids, logits = np.random.default_rng(1).integers(0, 290, 30), []
    for numa in ("off", "auto"):
        with HybridRunner(path, num_threads=3, loading=loading, numa=numa, num_gpu_experts=4) as runner:
            logits.append(np.concatenate([runner.prefill(ids[:20]), runner.decode(ids[20:], start=20)]))
            assert runner.transformer.experts.cpu.team(3).groups == (groups if numa == "auto" else ())
    assert np.array_equal(*logits)
    assert asked and set(placed) == ({groups} if loading == "read" else set())
