"""A context that leaves little of VRAM for experts: the plan says so, and what it proposes keeps its word."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.options import Options
from kimi_lite.plan.cliff import LEAST_TOKENS, token_experts
from kimi_lite.plan.plan import make_plan
from kimi_lite.units import GIB, parse_token_count
from tests.plan.test_plan import GPU, K25, MOONLIGHT, machine

CONTEXTS = (32_768, 65_536, 131_072, 262_144)


def plan_of(limits, gpu=GPU, sizes=K25["tq1_0"]):
    return make_plan(sizes, machine(gpu=gpu), limits)


def warnings_of(plan):
    return [warning for warning in plan.warnings if "token uses" in warning]


def test_a_long_context_warns_with_remedies_that_work():
    assert not warnings_of(plan_of(Options(context_length=32_768)))
    limits = Options(context_length=131_072)
    plan = plan_of(limits)
    assert plan.refusal is None and plan.num_vram_slots < LEAST_TOKENS * 480
    (warning,) = warnings_of(plan)
    assert f"{plan.num_vram_slots:,} experts" in warning and "131,072 tokens" in warning
    check(plan, warning)


def check(plan, warning):
    """Every remedy leaves as many slots as it says, and enough of them."""
    found = re.findall(r"((?:--kv-dtype q8 ?)?(?:-c \d+K)?) ?\(([\d,]+) experts\)", warning)
    assert found
    for flags, promised in found:
        length = re.search(r"-c (\S+)", flags)
        limits = replace(
            plan.limits,
            kv_dtype="q8" if "q8" in flags else plan.limits.kv_dtype,
            context_length=parse_token_count(length[1], "-c") if length else plan.limits.context_length,
        )
        better = make_plan(plan.sizes, plan.hardware, limits)
        assert better.num_vram_slots == int(promised.replace(",", "")) >= LEAST_TOKENS * token_experts(plan)
        assert not warnings_of(better) and better.context_length <= plan.context_length


@given(
    vram=st.integers(14, 40),
    context=st.sampled_from(CONTEXTS),
    kv=st.sampled_from(("f16", "q8", "f32")),
    model=st.sampled_from(sorted(K25)),
)
@settings(max_examples=25, deadline=None)
def test_whatever_the_machine_it_warns_only_where_something_helps(vram, context, kv, model):
    gpu = replace(GPU, vram_total_bytes=vram * GIB, vram_free_bytes=int((vram - 0.5) * GIB))
    plan = plan_of(Options(context_length=context, kv_dtype=kv), gpu, K25[model])
    warnings = warnings_of(plan)
    if plan.refusal or plan.num_vram_slots >= LEAST_TOKENS * 480:
        assert not warnings
    for warning in warnings:
        check(plan, warning)


@pytest.mark.parametrize("limits", [{"num_gpu_experts": 10}, {"device": "cpu"}])
def test_no_warning_where_it_is_wanted_so(limits):
    assert not warnings_of(plan_of(Options(context_length=131_072, **limits)))
    assert not warnings_of(plan_of(Options(), sizes=MOONLIGHT)), "all experts have a slot"
