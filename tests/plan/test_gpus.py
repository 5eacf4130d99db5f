"""Several GPUs: each layer is on one of them, and what the plan says each holds, it holds."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware.machine import described
from kimi_lite.options import OPTIONS, Options
from kimi_lite.plan.plan import lay_out, make_plan
from kimi_lite.plan.refusal import find_problem
from kimi_lite.plan.types import SLOTS, WORK, PlanInputs
from kimi_lite.plan.view import limit_flags, plan_lines, start_panel
from kimi_lite.units import GIB
from tests.plan.test_plan import GPU, K25, MOONLIGHT, machine

SIZES = st.lists(st.integers(8, 96), min_size=1, max_size=4)


def plan_on(sizes_gib, sizes=K25["tq1_0"], ram_gib=256.0, **options):
    first, *others = (replace(GPU, vram_total_bytes=n * GIB, vram_free_bytes=int(n * 0.97 * GIB)) for n in sizes_gib)
    return lay_out(PlanInputs(sizes, machine(ram_gib, first, more_gpus=tuple(others)), Options(**options)))


@settings(deadline=None, max_examples=25)
@given(SIZES, st.sampled_from([K25["tq1_0"], MOONLIGHT]), st.sampled_from([None, 0, 7, 1000]), st.integers(1, 128))
def test_layers_and_slots(sizes_gib, sizes, num_gpu_experts, context_k):
    """Every layer once, in order; a GPU has slots for its own experts only, and no more than it holds."""
    plan = plan_on(sizes_gib, sizes, num_gpu_experts=num_gpu_experts, context_length=context_k * 1024)
    config, parts = sizes.config, plan.gpu_parts
    assert len(parts) == len(sizes_gib)
    assert [layer for part in parts for layer in part.layers] == list(range(config.num_layers))
    assert all(len(part.layers) for part in parts)
    most = [config.num_experts * sum(n >= config.num_dense_layers for n in part.layers) for part in parts]
    assert all(0 <= part.num_slots <= count for part, count in zip(parts, most, strict=True))
    assert plan.num_vram_slots == sum(part.num_slots for part in parts)
    if num_gpu_experts is not None:
        assert plan.num_vram_slots == min(num_gpu_experts, sizes.num_experts)
    one = plan_on([sum(sizes_gib)], sizes, num_gpu_experts=num_gpu_experts, context_length=context_k * 1024)
    kinds = {row.part for row in plan.rows if row.place == "VRAM"} - {SLOTS, WORK, "safety margin"}
    if plan.dense_type == one.dense_type:
        assert all(plan.part_bytes("VRAM", kind) == one.part_bytes("VRAM", kind) for kind in kinds)
    budgets = [budget for budget in plan.budgets if budget.place == "VRAM"]
    assert sum(map(plan.budget_bytes, budgets)) == plan.place_bytes("VRAM")
    fits = all(plan.budget_bytes(budget) <= budget.have_bytes for budget in budgets)
    assert fits == ("VRAM" not in find_problem(plan))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(16, 48), min_size=2, max_size=3))
def test_slots_are_even(sizes_gib):
    """The same share of every GPU's experts, but for the layer where the split falls."""
    plan = plan_on(sizes_gib, dense_type="q8_0")
    shares = [part.num_slots / (384 * sum(layer >= 1 for layer in part.layers)) for part in plan.gpu_parts]
    layer_bytes = max(row.num_bytes for row in plan.rows if row.place == "VRAM") / 10
    assert plan.fits_in("VRAM") and min(shares) > 0
    for part, share in zip(plan.gpu_parts, shares, strict=True):
        slack = layer_bytes / (384 * len(part.layers) * plan.sizes.slot_bytes)
        assert abs(share - min(shares)) <= slack, (sizes_gib, shares)


def test_two_equal_ones_hold_more_than_one():
    """Slots of both, less what both need themselves; as many tokens/s as their bytes allow."""
    one, two = plan_on([24]), plan_on([24, 24])
    assert 2 * one.num_vram_slots < two.num_vram_slots
    assert two.decode.expected_tok_s > one.decode.expected_tok_s
    slower = replace(GPU, vram_bytes_s=GPU.vram_bytes_s / 2)
    mixed = make_plan(K25["tq1_0"], machine(256, GPU, more_gpus=(slower,)), Options())
    assert GPU.vram_bytes_s / 2 < mixed.rates.vram.per_s < GPU.vram_bytes_s
    assert mixed.rates.pcie == two.rates.pcie


def test_a_part_of_the_plan():
    """Slots of the GPU's own, and RAM by its layers with routed experts."""
    plan = plan_on([24, 24], ram_gib=128)
    parts = [plan.of_gpu(number) for number in range(2)]
    assert [part.num_vram_slots for part in parts] == [part.num_slots for part in plan.gpu_parts]
    ram_bytes = sum(part.ram_expert_bytes for part in parts)
    assert plan.has_ram_slots and plan.ram_expert_bytes - 2 < ram_bytes <= plan.ram_expert_bytes


def test_what_is_shown():
    """Both GPUs, and whose the layers are; one GPU is shown as ever."""
    plan = plan_on([24, 12], vram_bytes=(20 * GIB, 11 * GIB))
    text, panel = "\n".join(plan_lines(plan)), "\n".join(start_panel(plan, width=200))
    assert "VRAM 0 " in text and "VRAM 1 " in text and f"layers 0 to {plan.gpu_parts[0].layers.stop - 1}" in text
    assert "--vram allows 20.0 GiB" in text and "--vram allows 11.0 GiB" in text
    assert "GPU 0" in panel and "GPU 1" in panel and limit_flags(plan) == " --vram 20G+11G"
    one = "\n".join([*plan_lines(plan_on([24])), *start_panel(plan_on([24]))])
    assert "VRAM 0" not in one and "GPU 0" not in one and ", layers" not in one
    parts = plan.to_json()["gpu_parts"]
    assert [part["num_layers"] for part in parts] == [len(part.layers) for part in plan.gpu_parts]


def test_a_gpu_that_is_too_small_is_named():
    refusal = make_plan(K25["tq1_0"], machine(more_gpus=(GPU,)), Options(vram_bytes=(20 * GIB, GIB))).refusal
    assert "VRAM 1" in refusal.problem or "VRAM 0" in refusal.problem
    assert not any("without --vram" in remedy.action for remedy in refusal.remedies)


def test_sizes_as_they_are_written():
    """`24G+12G`, a size for each GPU; what is not one is refused."""
    option = OPTIONS["vram_bytes"]
    assert option.parse("24G+12G", "--vram") == (24 * GIB, 12 * GIB)
    assert option.parse("24G", "--vram") == 24 * GIB and option.parse("0", "--vram") == 0
    for text in ("24G+", "+24G", "24G+0", "24G+x", "24G,12G"):
        with pytest.raises(KimiLiteError, match="--vram"):
            option.parse(text, "--vram")
    two = (24 * GIB, 12 * GIB)
    assert Options(vram_bytes=two).devices == "cuda:0,cuda:1"
    assert Options(vram_bytes=two, device="cuda:2,cuda:0").devices == "cuda:2,cuda:0"
    assert Options(vram_bytes=GIB).devices is None
    for device in ("cuda:1", "cuda:0,cuda:1,cuda:2"):
        with pytest.raises(KimiLiteError, match="2 sizes"):
            Options(vram_bytes=two, device=device)
    for options in ({"vram_bytes": two}, {"device": "cuda:0,cuda:1"}):
        with pytest.raises(KimiLiteError, match="--defer-experts"):
            Options(num_deferred_experts=1, **options)


def test_gpus_that_are_not_here():
    """As many as there are sizes; those that are here and large enough stay."""
    here = machine(64, GPU)
    both = described(here, vram_bytes=(20 * GIB, 12 * GIB))
    assert both.gpus[0] is GPU and both.gpus[1].vram_total_bytes == 12 * GIB and both.has_assumed_cpu
    assert len(described(here, vram_bytes=(8 * GIB, 8 * GIB, 8 * GIB)).gpus) == 3
    assert described(here).gpus == (GPU,) and described(here, vram_bytes=0).gpus == ()
    two = replace(here, more_gpus=(GPU,))
    assert described(two, vram_bytes=(20 * GIB, 20 * GIB)) == two
