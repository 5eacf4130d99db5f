"""Plans for machines whose sockets have memory of their own."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.arch.known import KNOWN
from kimi_lite.arch.recipe import named_recipe
from kimi_lite.arch.sizes import sizes_of
from kimi_lite.arch.tensors import tensor_shapes
from kimi_lite.hardware.machine import SOCKET_RAM_BYTES_S, Hardware, described
from kimi_lite.hardware.nodes import described_nodes, reach, reach_of
from kimi_lite.options import Options
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.types import EXPERTS, Plan
from kimi_lite.plan.view import limit_flags, plan_lines
from kimi_lite.units import GIB

HERE = Hardware("here", 2, "avx2", 32 * GIB, 30 * GIB, ram_bytes_s=30e9, clock_hz=3e9)
_TYPES = named_recipe("tq1_0")
K25 = sizes_of(
    KNOWN["kimi-k2.5"].config,
    (
        (name, shape, _TYPES.choose(name, shape).layout)
        for name, shape in tensor_shapes(KNOWN["kimi-k2.5"].config, ()).items()
    ),
)


def plan_of(num_sockets: int, **limits: object) -> Plan:
    hardware = described(HERE, 512 * GIB, None, num_sockets=num_sockets)
    return make_plan(K25, hardware, Options(**limits))


def text_of(plan: Plan) -> str:
    return " ".join(" ".join(plan_lines(plan)).split())


def test_two_sockets_read_twice_as_fast_where_rows_are_divided():
    one, two, off = plan_of(1), plan_of(2), plan_of(2, numa="off")
    assert one.rates.ram.per_s == SOCKET_RAM_BYTES_S == off.rates.ram.per_s == two.rates.ram.per_s / 2
    assert (two.memory_use, off.memory_use) == ("by rows", "one node")
    assert two.decode.limit_tok_s == pytest.approx(2 * one.decode.limit_tok_s)
    assert one.decode.expected_tok_s < two.decode.expected_tok_s < 2 * one.decode.expected_tok_s
    assert off.decode.limit_tok_s == pytest.approx(one.decode.limit_tok_s)


def test_what_is_shown():
    assert "2 memory nodes: 32 + 32 CPUs, 256.0 + 256.0 GiB" in text_of(plan_of(2))
    assert "RAM 400 GB/s*" in text_of(plan_of(2)) and "rows of every matrix" in text_of(plan_of(2))
    off = plan_of(2, numa="off")
    assert "planned with one node's RAM speed, 50% of all (estimated; 80%" in text_of(off)
    assert "memory nodes" not in text_of(plan_of(1)) and "typical server" in text_of(plan_of(1))
    assert "--numa off" in limit_flags(off)
    weights = sum(row.num_bytes for row in plan_of(2).rows if row.part in ("dense weights", EXPERTS))
    assert f"{weights / 2 / GIB:.1f} + {weights / 2 / GIB:.1f} GiB of weights in 244.8 + 244.8 free" in text_of(
        plan_of(2)
    )
    found = json.loads(json.dumps(plan_of(2).to_json()))
    assert sum(found["node_weights_bytes"].values()) == pytest.approx(weights, abs=2)
    assert plan_of(1).to_json()["node_weights_bytes"] == {} == off.to_json()["node_weights_bytes"]
    assert found["memory_use"] == "by rows" and [node["num_cpus"] for node in found["hardware"]["nodes"]] == [32, 32]
    assert plan_of(1).to_json()["memory_use"] is None


def test_speeds_that_are_given_are_of_all_sockets():
    hardware = described(HERE, 512 * GIB, None, 96, 2).with_speeds("given", ram=500e9)
    assert make_plan(K25, hardware, Options()).rates.ram.per_s == 500e9
    assert make_plan(K25, hardware, Options(numa="off")).rates.ram.per_s == 250e9
    assert [len(node.cpus) for node in hardware.nodes] == [48, 48] and hardware.num_cores == 96


def test_a_node_that_is_full_is_named():
    hardware = described(HERE, 512 * GIB, None, num_sockets=2)
    first, second = hardware.nodes
    full = replace(hardware, nodes=(first, replace(second, free_bytes=10 * GIB)))
    warnings = make_plan(K25, full, Options()).warnings
    assert len(warnings) == 1 and "Node 1 has 10.0 GiB of memory free, and its threads read" in warnings[0]
    assert not make_plan(K25, hardware, Options()).warnings
    assert not make_plan(K25, full, Options(numa="off")).warnings


def test_numactl_goes_before_us():
    hardware = replace(described(HERE, 512 * GIB, None, num_sockets=2), memory_policy="interleaved")
    plan = make_plan(K25, hardware, Options())
    assert plan.memory_use == "interleaved" and plan.rates.ram.per_s == pytest.approx(0.8 * 2 * SOCKET_RAM_BYTES_S)
    assert "numactl spreads the pages" in text_of(plan)
    measured = hardware.with_speeds("measured", ram=300e9)  # with the pages spread
    assert make_plan(K25, measured, Options()).rates.ram.per_s == 300e9
    bound = replace(measured, memory_policy="bound")
    assert make_plan(K25, bound, Options()).memory_use == "one node"


def test_one_thread_has_one_node():
    assert plan_of(2, num_threads=1).memory_use == "one node"


@given(st.integers(1, 8), st.integers(1, 4), st.floats(0.05, 1))
def test_rows_are_never_slower_than_interleaving(sockets: int, parts: int, link_share: float):
    num_nodes = sockets * parts
    by_rows, mixed, one = (reach(num_nodes, sockets, use, link_share) for use in ("by rows", "interleaved", "one node"))
    assert by_rows == 1 >= mixed and one == 1 / num_nodes
    assert sockets > 1 or mixed == 1


def test_nodes_as_described():
    nodes = described_nodes(3, 32, 96 * GIB, 90 * GIB)
    assert sorted(len(node.cpus) for node in nodes) == [10, 11, 11]
    assert reach_of(nodes, "one node") == pytest.approx(1 / 3) and reach_of(nodes[:1], "one node") == 1
    assert reach_of((), "one node") == 1
