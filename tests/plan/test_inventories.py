"""Plans of real files: tensor lists of Kimi K2.5 in many types, on generated machines, against sums over the lists that
know nothing of `arch.sizes`."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.arch.known import K2_5
from kimi_lite.arch.sizes import ModelSizes, sizes_of
from kimi_lite.arch.tensors import tensor_shapes
from kimi_lite.hardware.machine import Gpu
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.options import Options
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.types import DENSE, EMBEDDING, KV, SLOTS, Plan
from kimi_lite.tools.make.skeleton import ListedTensor, read_tensor_list
from kimi_lite.units import GIB
from tests.plan.test_plan import check_experts, follow, machine

REAL = sorted((Path(__file__).parents[3] / "shared/data/k2.5-files").glob("*.tsv"))
BITS = {"q8_0": 34 / 32, "q6_k": 210 / 256, "q4_k": 144 / 256}  # bytes a weight
CACHE_ROW = {"f32": 576 * 4, "f16": 576 * 2, "bf16": 576 * 2, "q8": 576 + 2 * 18}  # bytes of a position in a layer


def made_list(experts: str, rest: str) -> list[ListedTensor]:
    """As our recipes type it, where the lists of real files are not here."""

    def layout(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) == 1 or "ffn_gate_inp" in name:
            return "F32"
        wanted = experts if "_exps" in name else rest
        return wanted if shape[-1] % BY_NAME[wanted].block_size == 0 else "Q8_0"

    return [ListedTensor(name, shape, BY_NAME[layout(name, shape)]) for name, shape in tensor_shapes(K2_5).items()]


LISTS = {path.stem: read_tensor_list(path, takes_nearest=True)[0] for path in REAL} | {
    f"{experts}, {rest}": made_list(experts, rest)
    for experts, rest in (("TQ1_0", "Q8_0"), ("Q4_0", "BF16"), ("Q2_K", "Q6_K"), ("IQ1_S", "Q4_K"))
}
SIZES: dict[str, ModelSizes] = {name: sizes_of(K2_5, tensors) for name, tensors in LISTS.items()}


def dense_bytes(tensors: list[ListedTensor], kind: str) -> float:
    """What the loader must take: everything but experts and embedding, in fewer bits where the file has more."""
    total = 0.0
    for name, shape, layout in tensors:
        num_bytes = prod(shape[:-1]) * layout.row_bytes(shape[-1])
        if "_exps" in name or name == "token_embd.weight":
            continue
        if len(shape) == 1 or "ffn_gate_inp" in name:
            total += num_bytes
        else:
            fewest = BITS[kind] if shape[-1] % (32 if kind == "q8_0" else 256) == 0 else BITS["q8_0"]
            total += min(num_bytes, prod(shape) * fewest)
    return total


@pytest.mark.parametrize("name", LISTS)
def test_sizes_are_the_lists(name):
    """No gate and up of these files differ in type, so that joining them changes nothing."""
    tensors, sizes = LISTS[name], SIZES[name]
    of = {each.name: each.num_bytes for each in tensors}
    assert sizes.total_bytes == sum(of.values())
    assert sizes.expert_bytes == sum(size for tensor, size in of.items() if "_exps" in tensor)
    assert sizes.embedding_bytes == of["token_embd.weight"]
    for kind in BITS:
        size = sizes.gpu[kind]
        assert size.num_bytes == dense_bytes(tensors, kind)
        assert (
            size.num_bytes == sum(size.layer_bytes) + size.other_bytes == sum(taken for _, taken in size.bytes_by_type)
        )
        assert len(size.layer_bytes) == 61 and min(size.layer_bytes) > 0
    largest = max(
        sum(of[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")) // 384
        for layer in range(1, 61)
    )
    assert largest <= sizes.slot_bytes < largest + 3 * 256


@st.composite
def situations(draw: st.DrawFn) -> tuple[str, Plan]:
    name = draw(st.sampled_from(sorted(LISTS)))
    vram_gib, ram_gib = draw(st.integers(8, 48)), draw(st.integers(16, 768))
    gpu = Gpu(
        "a GPU", vram_gib * GIB, int(draw(st.floats(0.5, 0.98)) * vram_gib * GIB), has_display=draw(st.booleans())
    )
    options = Options(
        context_length=draw(st.none() | st.integers(1, 262_144)),
        kv_dtype=draw(st.sampled_from(sorted(CACHE_ROW))),
        num_sequences=draw(st.sampled_from([1, 1, 4])),
        device=draw(st.sampled_from([None, None, "cpu"])),
        dense_type=draw(st.sampled_from(["auto", "auto", *BITS])),
        ram_bytes=draw(st.none() | st.integers(8, 400).map(lambda gib: gib * GIB)),
        num_gpu_experts=draw(st.none() | st.sampled_from([0, 300])),
    )
    hardware = machine(ram_gib, draw(st.sampled_from([gpu, gpu, None])))
    return name, make_plan(SIZES[name], hardware, options)


@settings(max_examples=120, deadline=None)
@given(situations())
def test_plans_add_up_and_never_exceed(situation):
    name, plan = situation
    tensors, options = LISTS[name], plan.limits
    place = "VRAM" if plan.is_on_gpu else "RAM"
    for budget in plan.budgets:
        assert plan.refusal or plan.place_bytes(budget.place) <= budget.have_bytes
    assert plan.is_on_gpu == (plan.hardware.gpu is not None and options.device != "cpu")
    if plan.is_on_gpu:
        assert plan.part_bytes("VRAM", DENSE) == dense_bytes(tensors, plan.dense_type)
        assert plan.part_bytes("VRAM", SLOTS) == plan.num_vram_slots * plan.sizes.slot_bytes
        if options.dense_type == "auto" and plan.finer:
            finer_bytes = dense_bytes(tensors, plan.finer.dense_type) - dense_bytes(tensors, plan.dense_type)
            assert finer_bytes > 0 or plan.refusal
            assert plan.refusal or not plan.finer.fits_in("VRAM"), "the finest that fits"
    pages = options.num_sequences * -(-plan.context_length // 64)
    assert plan.num_cache_pages == pages
    assert plan.part_bytes(place, KV) == pages * 64 * 61 * CACHE_ROW[options.kv_dtype]
    assert plan.part_bytes("RAM", EMBEDDING) == next(
        each.num_bytes for each in tensors if each.name == "token_embd.weight"
    )
    check_experts(plan)
    if plan.refusal:
        for remedy in plan.refusal.remedies:
            assert not follow(remedy, plan).refusal, (remedy, plan.refusal.problem)


@pytest.mark.parametrize("name", LISTS)
def test_no_type_is_widened(name):
    """The fault that a real list showed: weights of two bits were planned in eight."""
    kept = replace(SIZES[name], dense_type="q8_0")
    assert kept.gpu_dense_bytes <= kept.dense_bytes
