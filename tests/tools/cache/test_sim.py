"""tools.cache: known answers, the published statistics, the runtime's own classes, machines in words."""

import json

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.policy import HeatPolicy
from kimi_lite.experts.recorder import RoutingTrace, write_trace
from kimi_lite.model.hybrid.adaptive import Adaptive
from kimi_lite.tools.cache import sim as cache_sim
from kimi_lite.tools.cache.machine import Machine, Work
from kimi_lite.tools.cache.policies import BeladyCache, FavouriteCache, HeatCache, LruCache, Swaps
from kimi_lite.tools.cache.routing_synthetic import make_trace, reuse
from kimi_lite.tools.cache.shares import compare, own_way
from kimi_lite.tools.cache.sim import simulate


def trace_of(rows, num_experts=8):
    """rows: experts of a token, in one layer."""
    ids = np.array(rows, np.int16).reshape(len(rows), 1, -1)
    return RoutingTrace("known", num_experts, ids, np.arange(len(rows) + 1))


def hits(cache, trace):
    return [bool(cache.look_up(token, 0, chosen[0]).all()) for token, chosen in enumerate(trace.ids.astype(np.int64))]


def test_known_answers():
    trace = trace_of([0, 1, 2, 0, 1, 2, 0, 0])
    lru = LruCache(8, 2)
    assert hits(lru, trace) == [False] * 7 + [True]  # a loop larger than the cache
    assert lru.num_copies == 7
    # 2 is used and dropped, for 0 and 1 are needed before it is again (worked out by hand)
    optimum = hits(BeladyCache(trace.ids.astype(np.int64), [0], 8, 2), trace)
    assert optimum == [False, False, False, True, True, False, True, True]
    assert hits(LruCache(8, 3), trace) == [False] * 3 + [True] * 5
    assert hits(FavouriteCache(trace.ids.astype(np.int64), [0], 8, 1), trace) == [e == 0 for e in trace.ids[:, 0, 0]]


def test_a_list_for_all_layers_is_flushed_by_one_token():
    """Below what a token uses it finds nothing at all; a list for each layer still does."""
    ids = np.tile(np.arange(4, dtype=np.int16), (20, 3, 1))
    for num_sharing, found in ((0, 0), (3, 12)):
        cache = LruCache(8, 12 if num_sharing else 8, num_sharing)
        for token in range(20):
            last = [int(cache.look_up(token, layer, ids[token, layer].astype(np.int64)).sum()) for layer in range(3)]
        assert sum(last) == found


def test_swaps_bring_them_after_the_token():
    trace = trace_of([[0, 1], [0, 1], [0, 1], [0, 1]])
    cache = HeatCache(1, 8, 2, Swaps(1, 0.0))
    assert [cache.look_up(token, 0, np.array([0, 1])).sum() for token in range(4)] == [0, 1, 2, 2]
    assert simulate(HeatCache(1, 8, 2, Swaps(1, 0.0)), trace, [0]) == pytest.approx((5 / 6, 2 / 6))
    half = HeatCache(1, 8, 2, Swaps(0.5, 0.0))
    assert [half.look_up(token, 0, np.array([0, 1])).sum() for token in range(6)] == [0, 0, 1, 1, 2, 2]


def test_nothing_beats_the_optimum_and_the_runtime_is_its_own_class(monkeypatch):
    trace, used = make_trace(120, 2, 64, 4), []
    monkeypatch.setattr(
        HeatPolicy, "touch", lambda self, *a, original=HeatPolicy.touch: used.append(self) or original(self, *a)
    )
    for num_slots in (16, 48):
        for caches in (cache_sim.at_once, cache_sim.by_swaps):
            found = {
                name: simulate(make(), trace, [0, 1])[0] for name, make in caches(trace, [0, 1], num_slots).items()
            }
            optimum = simulate(cache_sim.at_once(trace, [0, 1], num_slots)["optimum"](), trace, [0, 1])[0]
            assert any("runtime" in name for name in found)
            assert all(0 < share <= optimum for name, share in found.items() if "favourites" not in name)
    assert len({id(policy) for policy in used}) >= 4


def test_a_synthetic_trace_reuses_experts_as_published():
    qwen = reuse(make_trace(600, 2, 128, 8))
    assert qwen.next_token == pytest.approx(0.45, abs=0.04) and qwen.within_8 == pytest.approx(0.80, abs=0.04)
    kimi = make_trace(600, 2, 256, 8)
    assert all(len(set(row)) == 8 for row in kimi.ids[:, 0].tolist())
    linear = reuse(kimi, (0.12, 0.24, 0.48))
    assert linear.next_token == pytest.approx(0.336, abs=0.07)
    assert linear.found == pytest.approx((0.62, 0.85, 0.94), abs=0.13)


def test_reuse_is_what_a_cache_finds():
    """Against the caches themselves."""
    trace = make_trace(200, 2, 32, 4)
    found = reuse(trace, (0.25, 0.5)).found
    for size, share in zip((8, 16), found, strict=True):
        assert simulate(LruCache(32, 2 * size, 2), trace, [0, 1])[0] == pytest.approx(share, abs=0.05)


def test_machines_in_words():
    desk = Machine.parse("24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores")
    assert desk == Machine(24.0, 60.0, 16, 23.5)
    assert Machine.parse("32GB VRAM, PCIe 5 x8, 90 GB/s, 24 cores, 1790 GB/s VRAM, 20 Gweights/s, copies 1.5x") == (
        Machine(32.0, 90.0, 24, 23.5, 1790.0, 20.0, 1.5)
    )
    for wrong in ("24 GB", "24 GB, 60 GB/s RAM, 16 cores, fast", "PCIe 9, 24 GB, 60 GB/s, 4 cores"):
        with pytest.raises(KimiLiteError, match="--machine"):
            Machine.parse(wrong)


def tok_s(machine, hit_share, bits, num_copies):
    each, nothing = np.full(60, 8.0), np.zeros(60)
    return 1 / machine.token_s(Work(hit_share * each, (1 - hit_share) * each, nothing, num_copies), bits)


def test_predictions_follow_physics():
    desk = Machine.parse("24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores")
    assert tok_s(desk, 0, 1.834, 0) == pytest.approx(10.6, rel=0.05)  # reference/peers: 10.6 at 60 GB/s without hits
    assert tok_s(desk, 0.4, 1.834, 0) == pytest.approx(16.2, rel=0.06)
    assert tok_s(desk, 0.4, 1.834, 100) < tok_s(desk, 0.4, 1.834, 0)
    slow = Machine.parse("24 GB, PCIe 4.0 x16, 60 GB/s RAM, 2 cores")
    assert tok_s(slow, 0, 1.834, 0) < 0.5 * tok_s(desk, 0, 1.834, 0)  # cores are the bound
    assert 480 < desk.num_slots(1.6875) < 1100 and Machine(8, 60, 16).num_slots(1.6875) == 0


machines = st.builds(
    Machine,
    vram_gb=st.just(24.0),
    ram_gb_s=st.floats(20, 400),
    num_cores=st.integers(2, 64),
    pcie_gb_s=st.floats(2, 60),
    vram_gb_s=st.floats(200, 3000),
    core_gweights_s=st.floats(5, 80),
    copy_traffic=st.floats(1, 5),
)
TRACE = make_trace(300, 4, 64, 4)


@given(machine=machines, size=st.floats(0.3, 4), seed=st.integers(0, 9))
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
def test_promotions_are_never_slower_than_none(machine, size, seed):
    """Whatever the RAM, the link, the cores and the copies: against the same slots with what came in first, and against
    no slots at all."""
    num_slots, counted = round(size * 16), slice(75, None)
    own_s = own_way(machine, TRACE, num_slots, 1.6875, seed=seed)[0][counted].mean()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kimi_lite.tools.cache.shares.Adaptive", NoPromotions)
        static_s = own_way(machine, TRACE, num_slots, 1.6875, seed=seed)[0][counted].mean()
    assert own_s < 1.05 * min(static_s, own_way(machine, TRACE, 0, 1.6875, seed=seed)[0][counted].mean())


class NoPromotions(Adaptive):
    """The slots keep what came in first."""

    def begin(self, num_tokens, is_decoding):
        self._num_promoted = self._experts.begin_step(0, num_tokens, 1e9)


def test_comparison_with_constant_shares():
    """The link decides for a constant share; the own way does not mind it."""
    trace = make_trace(200, 3, 384, 8)
    fast, slow = (
        compare(link, Machine.parse(f"24 GB, {link}, 60 GB/s RAM, 16 cores"), trace, 1.6875)
        for link in ("PCIe 5 x16", "PCIe 3 x8")
    )
    assert slow.constant_tok_s[0.5] < 0.6 * fast.constant_tok_s[0.5]
    assert slow.own_tok_s > 0.95 * fast.own_tok_s > fast.uncached_tok_s
    assert slow.own_tok_s > 0.97 * max(slow.constant_tok_s.values())


def test_the_commands(tmp_path):
    write_trace(tmp_path / "trace.npz", make_trace(40, 3, 32, 4))
    run = CliRunner().invoke(
        cache_sim.app, ["policies", str(tmp_path / "trace.npz"), "--sizes", "0.5,2", "--layers", "2"]
    )
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout.strip().rpartition("\n")[2])
    assert [(o["way"], o["size"]) for o in document["outcomes"]][::6][:3] == [
        ("at once", 0.5),
        ("at once", 2.0),
        ("swaps", 0.5),
    ]
    assert all(len(o["net"]) == 2 for o in document["outcomes"])
    machine = "24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores"
    run = CliRunner().invoke(cache_sim.app, ["shares", "--machine", machine, "--layers", "2", "--tokens", "64"])
    assert run.exit_code == 0, run.output
    (row,) = json.loads(run.stdout.strip().rpartition("\n")[2])["rows"]
    assert row["machine"] == machine and row["own_tok_s"] > 5
    assert CliRunner().invoke(cache_sim.app, ["policies", "--sizes", "0"]).exit_code == 2
    assert CliRunner().invoke(cache_sim.app, ["shares", "--machine", "nothing"]).exit_code == 2
