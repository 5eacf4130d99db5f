"""The simulated prompt keeps to what arithmetic says: no faster than its parts, no slower than one after the other."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.plan.workspace import STREAM_EXPERTS
from kimi_lite.tools.bench.prompt_on_paper import Machine, layer_times, simulate

OWN = 2 * STREAM_EXPERTS


def bounds(machine: Machine, num_tokens: int, num_layers: int) -> tuple[float, float]:
    """Seconds a layer: the longest of what can overlap, and all in turn."""
    times = layer_times(machine, num_tokens, resident_share=0.04)
    on_gpu = times.dense_s + times.attention_s + times.experts_s
    return max(on_gpu, times.stream_s), on_gpu + times.stream_s


@settings(max_examples=4, deadline=None)
@given(
    num_tokens=st.sampled_from([512, 2048, 8192, 16384]),
    pcie=st.floats(5e9, 60e9),
    ram=st.floats(20e9, 300e9),
    num_slots=st.integers(OWN, 300),
)
def test_between_the_bounds(num_tokens, pcie, ram, num_slots):
    machine = Machine(pcie_bytes_s=pcie, ram_bytes_s=ram, thread_bytes_s=1e12)
    least_s, most_s = bounds(machine, num_tokens, 3)
    have = simulate(machine, num_tokens, num_slots, num_layers=3)
    assert 0.99 * least_s <= have.layer_s <= 1.05 * most_s + 2e-3
    assert have.bus_share <= 1.01 and have.ram_bytes_s <= 1.01 * ram


def test_slots_let_the_bus_work_through_attention():
    """The numbers of the README: 750 tokens/s at 8,192 want some eighty slots more than the stream's own."""
    few, many = (simulate(Machine(), 8192, n, num_layers=4) for n in (OWN, 192))
    assert many.layer_s < 0.8 * few.layer_s and many.bus_share > 0.9
    assert 8192 / (60 * many.layer_s) > 750
    staged = simulate(Machine(), 8192, OWN, is_in_cache=False, num_layers=4)
    assert staged.layer_s == pytest.approx(
        few.layer_s + layer_times(Machine(ram_bytes_s=15e9), 8192, 0.04).stream_s - 0.149, rel=0.1
    )
