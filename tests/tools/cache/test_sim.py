"""cache_sim: known answers, the published curve, the runtime's own class, machines in words."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.policy import HeatPolicy
from kimi_lite.experts.recorder import RoutingTrace, write_trace
from kimi_lite.tools.cache import sim as cache_sim
from kimi_lite.tools.cache.policies import BeladyCache, HeatCache, LruCache
from kimi_lite.tools.cache.routing_synthetic import make_trace
from kimi_lite.tools.cache.sim import Machine, simulate


def trace_of(rows, num_experts=8):
    """rows: one expert a token, in one layer."""
    ids = np.array(rows, np.int16).reshape(len(rows), 1, -1)
    return RoutingTrace("known", num_experts, ids, np.arange(len(rows) + 1))


def hits(cache, trace):
    return [bool(cache.look_up(token, 0, chosen[0]).all()) for token, chosen in enumerate(trace.ids.astype(np.int64))]


def test_known_answers():
    trace = trace_of([0, 1, 2, 0, 1, 2, 0, 0])
    assert hits(LruCache(8, 2, None), trace) == [False] * 7 + [True]  # a loop larger than the cache
    # 2 is used and dropped, for 0 and 1 are needed before it is again (worked out by hand)
    optimum = hits(BeladyCache(trace.ids.astype(np.int64), [0], 8, 2), trace)
    assert optimum == [False, False, False, True, True, False, True, True]
    assert hits(LruCache(8, 3, None), trace) == [False] * 3 + [True] * 5


def test_a_budget_brings_them_after_the_token():
    trace = trace_of([[0, 1], [0, 1], [0, 1], [0, 1]])
    for cache in (LruCache(8, 2, 1), HeatCache(1, 8, 2, 1)):
        found = [cache.look_up(token, 0, np.array([0, 1])).sum() for token in range(4)]
        assert found == [0, 1, 2, 2], cache
    assert simulate(LruCache(8, 2, 1), trace, [0]) == pytest.approx(5 / 6)  # the first token is not counted


def test_nothing_beats_the_optimum_and_the_runtime_is_its_own_class(monkeypatch):
    trace, used = make_trace(120, 2, 64, 4), []
    monkeypatch.setattr(
        HeatPolicy, "touch", lambda self, *a, original=HeatPolicy.touch: used.append(self) or original(self, *a)
    )
    for num_slots in (16, 48):
        found = {
            name: simulate(make(), trace, [0, 1])
            for name, make in cache_sim.policies(trace, [0, 1], num_slots, None).items()
        }
        assert set(found) == {"LRU", "LFU, decay", "runtime", "optimum"}
        assert all(0 < share <= found["optimum"] for share in found.values())
    assert len({id(policy) for policy in used}) >= 2


def test_a_synthetic_trace_has_the_published_curve():
    """With a cache of its own for the layer, which is what the curve is about."""
    trace = make_trace(800, 1, 384, 8)
    assert all(len(set(row)) == 8 for row in trace.ids[:, 0].tolist())
    for share, published in ((0.125, 0.67), (0.25, 0.81)):
        assert simulate(LruCache(384, round(share * 384), None), trace, [0]) == pytest.approx(published, abs=0.07)


def test_machines_in_words():
    desk = Machine.parse("24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores")
    assert desk == Machine(24.0, 60.0, 16, 23.5)
    assert Machine.parse("32GB VRAM, PCIe 5 x8, 90 GB/s, 24 cores, 1790 GB/s VRAM") == Machine(
        32.0, 90.0, 24, 23.5, 1790.0
    )
    for wrong in ("24 GB", "24 GB, 60 GB/s RAM, 16 cores, fast", "PCIe 9, 24 GB, 60 GB/s, 4 cores"):
        with pytest.raises(KimiLiteError, match="--machine"):
            Machine.parse(wrong)


def test_predictions_follow_physics():
    desk = Machine.parse("24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores")
    assert desk.tok_s(0, 1.834, 0) == pytest.approx(10.6, rel=0.05)  # reference/peers: 10.6 at 60 GB/s without hits
    assert desk.tok_s(0.4, 1.834, 0) == pytest.approx(16.2, rel=0.06)
    assert desk.tok_s(0.4, 1.834, 100) < desk.tok_s(0.4, 1.834, 0)
    slow = Machine.parse("24 GB, PCIe 4.0 x16, 60 GB/s RAM, 2 cores")
    assert slow.tok_s(0, 1.834, 0) < 0.5 * desk.tok_s(0, 1.834, 0)  # cores are the bound
    assert 0.02 < desk.slot_share(1.6875) < 0.05 and Machine(8, 60, 16).slot_share(1.6875) == 0


def test_the_command(tmp_path):
    write_trace(tmp_path / "trace.npz", make_trace(40, 3, 32, 4))
    run = CliRunner().invoke(cache_sim.app, [str(tmp_path / "trace.npz"), "--sizes", "10,50", "--layers", "2"])
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout.strip().rpartition("\n")[2])
    assert [(o["policy"], o["size_share"]) for o in document["outcomes"]][:5] == [
        *(("LRU", 0.1), ("LFU, decay", 0.1), ("runtime", 0.1), ("optimum", 0.1), ("LRU", 0.5))
    ]
    machine = [
        "--machine",
        "24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores",
        "--budget",
        "120",
        "--tokens",
        "24",
        "--layers",
        "2",
    ]
    run = CliRunner().invoke(cache_sim.app, machine)
    assert run.exit_code == 0 and "up to 120 promotions a token" in run.stdout
    assert all(o["tok_s"] > 5 for o in json.loads(run.stdout.strip().rpartition("\n")[2])["outcomes"])
    assert CliRunner().invoke(cache_sim.app, ["--sizes", "0"]).exit_code == 2
