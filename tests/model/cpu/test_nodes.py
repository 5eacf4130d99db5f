"""A whole model whose threads and slots are divided over two memory nodes: the same bits as on one. The nodes are
pretended; both have all CPUs of this machine, and the kernel is asked where pages lie."""

import os
import warnings

import numpy as np
import pytest

from kimi_lite.experts import nodes
from kimi_lite.model.cpu import layers
from kimi_lite.native.cpu.nodes import ThreadGroup
from tests.model.runner import Runner
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are kept to CPUs on Linux")


@pytest.mark.parametrize("loading", ["map", "read"])
@pytest.mark.filterwarnings("ignore:.*lie on other memory nodes")
def test_two_nodes_change_no_bit(loading, tmp_path, monkeypatch):
    types = {"_exps": "TQ1_0", "blk.2.ffn_down_exps": "Q4_K", "_shexp": "Q8_0"}
    sizes = {"num_experts": 12, "hidden_size": 256, "expert_feed_forward_size": 256}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), types=types, **sizes)
    cpus, asked, touched, touch = frozenset(os.sched_getaffinity(0)), [], [], nodes.touch
    groups = (ThreadGroup(0, 0, cpus, 0, 1, ((0, 10), (1, 21))), ThreadGroup(1, 1, cpus, 1, 3, ((0, 21), (1, 10))))
    monkeypatch.setattr(layers, "place_threads", lambda num_threads: asked.append(num_threads) or groups)
    monkeypatch.setattr(nodes, "touch", lambda *arguments: touched.append(1) or touch(*arguments))
    ids, logits = np.random.default_rng(1).integers(0, 290, 30), []
    for numa in ("off", "auto"):
        with Runner(path, num_threads=3, loading=loading, numa=numa) as runner:
            logits.append(np.concatenate([runner.prefill(ids[:20]), runner.decode(ids[20:], start=20)]))
            assert runner.transformer.team.groups == (groups if numa == "auto" else ())
    assert np.array_equal(*logits)
    assert asked == [3] and bool(touched) == (loading == "read")
    assert os.sched_getaffinity(0) == cpus


def test_slots_that_lie_elsewhere_are_told(tmp_path, monkeypatch):
    """Here all pages are on node 0, or the system does not say."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    cpus = frozenset(os.sched_getaffinity(0))
    groups = (ThreadGroup(0, 0, cpus, 0, 1), ThreadGroup(7, 7, cpus, 1, 2))
    monkeypatch.setattr(layers, "place_threads", lambda num_threads: groups)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Runner(path, loading="read").__exit__()
    said = [str(each.message) for each in caught if "memory nodes" in str(each.message)]
    assert said and all("lie on other memory nodes" in text or "cannot be checked" in text for text in said)
