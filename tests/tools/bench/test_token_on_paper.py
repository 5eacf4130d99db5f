"""A token on paper: what is read adds up, no memory and no link gives more than it has, and the limits are those of
`hardware.nodes`."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kimi_lite.arch.known import K2_5
from kimi_lite.hardware.nodes import reach
from kimi_lite.tools.bench import token_on_paper
from kimi_lite.tools.bench.predict import app
from kimi_lite.tools.bench.token_on_paper import (
    USES,
    Product,
    Server,
    Weights,
    _Reader,
    busier,
    product_s,
    simulate_token,
)

FAST = Weights(1.0, 1e-6)  # a byte each, and no arithmetic to speak of
LONG = Product("a product", 1, 20_000, 1000, FAST)


def eager(cores: int, sockets: int, bandwidth_gb_s: float = 100.0) -> Server:
    """Cores that could read more than there is."""
    return Server(cores, sockets, 3.0, bandwidth_gb_s, core_gb_s=1000.0, far_share=1.0)


@settings(deadline=None)
@given(cores=st.integers(1, 12), num_steps=st.integers(1, 300), slow=st.integers(0, 1), cycles=st.floats(0.01, 3))
def test_one_socket_is_as_fast_as_cores_and_memory_allow(cores, num_steps, slow, cycles):
    """Never faster than either; slower at most by the last piece that a slow core takes."""
    product = Product("a product", 1, num_steps, 4096, Weights(0.5, cycles))
    server = Server(cores, 1, 2.0, 20.0, core_gb_s=5.0, slow_cores=slow)
    core = min(5e9, 2e9 * 0.5 / cycles)
    allowed = min(20e9, core * (cores - 0.5 * slow))
    found, whole = product_s(product, server, "by rows"), num_steps * 2048
    assert found >= whole / allowed * (1 - 1e-9)
    assert found <= whole / allowed + 8 * 2048 / (0.5 * min(core, 20e9 / cores))


@pytest.mark.parametrize("sockets", [2, 4])
@pytest.mark.parametrize("use", USES)
def test_several_sockets_reach_what_the_plan_reckons_with(sockets, use):
    server = eager(4 * sockets, sockets)
    found = LONG.num_tasks * 1000 / product_s(LONG, server, use) / 100e9
    assert found == pytest.approx(reach(sockets, sockets, use), rel=0.03)


def test_a_slow_core_costs_what_it_lacks():
    """Others take its tasks: a core at half speed out of eight costs a sixteenth, not half."""
    server = replace(eager(8, 2), core_gb_s=2.0)
    quiet, busy = (product_s(LONG, each, "by rows") for each in (server, busier(server)))
    assert busy / quiet == pytest.approx(16 / 15, rel=0.02)


@given(
    sockets=st.integers(1, 4),
    places=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3), st.booleans()), min_size=1, max_size=12),
)
def test_rates_are_fair(sockets, places):
    """Nothing gives more than it has; each reader is as fast as its core, or something that it needs is used up."""
    server = Server(16, sockets, 3.0, 40.0 * sockets, core_gb_s=12.0)
    readers = [_Reader(s % sockets, min(source, sockets - 1), slow, 1.0) for s, source, slow in places]
    token_on_paper._set_rates(readers, server, FAST)
    used: dict = {}
    for reader in readers:
        for place, share in token_on_paper._needs(reader.likeness, sockets).items():
            used[place] = used.get(place, 0.0) + share * reader.rate
    have = {"ram": 40e9, "link": 0.4 * 40e9}
    assert all(amount <= have[kind] * (1 + 1e-9) for (kind, _), amount in used.items())
    full = {place for place, amount in used.items() if amount >= have[place[0]] * (1 - 1e-6)}
    for reader in readers:
        is_capped = reader.rate >= token_on_paper._core_rate(reader.likeness, server, FAST) * (1 - 1e-9)
        assert reader.rate > 0 and (is_capped or full & token_on_paper._needs(reader.likeness, sockets).keys())


def test_a_tokens_bytes_are_the_models():
    """Every matrix but the router and the embedding, which reads a row: K2.5's active weights."""
    count = simulate_token(eager(4, 1), "by rows", FAST, FAST, seconds=lambda product, server, use: 1e-3).num_bytes
    router = K2_5.num_moe_layers * K2_5.num_experts * K2_5.hidden_size
    assert count + router == pytest.approx(K2_5.active_parameters, rel=0.001)


def test_barriers_cost_more_across_sockets():
    """Eight gates of eight threads."""
    one, two = (Server(64, sockets, 3.0, 400.0).barrier_s for sockets in (1, 2))
    assert one == pytest.approx(8 * 40e-9 + 8 * 40e-9) and two == pytest.approx(8 * 40e-9 + 8 * 80e-9)
    assert Server(4, 1, 3.0, 50.0).barrier_s == pytest.approx(4 * 40e-9) and Server(1, 1, 3.0, 50.0).barrier_s == 0


def test_command_line(tmp_path):
    types = {name: {"bits_per_weight": 8.5, "cycles_per_weight": 0.1} for name in ("TQ1_0", "Q8_0")}
    report = {"tool": "kernel_bench", "cpu": "a CPU", "isa": {"name": "avx2"}, "clock_ghz": 3.0, "types": types}
    (tmp_path / "bench.txt").write_text(json.dumps(report))
    arguments = [str(tmp_path / "bench.txt"), "--cores", "8", "--sockets", "2", "--bandwidth", "100"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.split()[:1] == ["TQ1_0"]][1:]
    assert [" ".join(row[1:-4]) for row in rows] == list(USES)
    assert float(rows[0][-4]) > float(rows[1][-4]) > float(rows[2][-4])
    assert "Nothing of it was measured" in " ".join(done.output.split())
    assert CliRunner().invoke(app, [*arguments[:2], "1", *arguments[3:]]).exit_code == 2
    report["types"].pop("Q8_0")
    (tmp_path / "bench.txt").write_text(json.dumps(report))
    assert CliRunner().invoke(app, arguments).exit_code == 2
