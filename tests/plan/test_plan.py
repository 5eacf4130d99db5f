"""Plans: the design's physics, sums, limits that are kept, refusals that help."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.arch.known import KNOWN
from kimi_lite.arch.recipe import named_recipe
from kimi_lite.arch.sizes import ModelSizes, sizes_of
from kimi_lite.arch.tensors import tensor_shapes
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.memory import RING_BYTES
from kimi_lite.hardware.machine import CUDA_BYTES, TILES, Cores, Disk, Gpu, Hardware, described, free_of
from kimi_lite.kv.host import host_bytes
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.options import DENSE_TYPES, OPTIONS, Options
from kimi_lite.plan import speed
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.speed import HITS_HIGH, HITS_LOW, Split, decode_speed, interpolate, rates_of
from kimi_lite.plan.types import EXPERTS, KV, MARGIN, PINNED, SLOTS, SPILL, Plan, Remedy
from kimi_lite.plan.view import plan_lines
from kimi_lite.plan.workspace import pinned_block_bytes, ram_slot_bytes, vision_work_bytes
from kimi_lite.units import GIB

GPU = Gpu("RTX 4090", 24 * GIB, int(23.5 * GIB), 1008e9, 23e9, flops_s=165e12)


def sizes_in(name: str, recipe: str) -> ModelSizes:
    known, types = KNOWN[name], named_recipe(recipe)
    shapes = tensor_shapes(known.config, ())
    return sizes_of(known.config, ((name, shape, types.choose(name, shape).layout) for name, shape in shapes.items()))


K25 = {recipe: sizes_in("kimi-k2.5", recipe) for recipe in ("tq1_0", "iq1_m", "tq2_0", "iq2_xxs", "q2_k", "q4_0")}
MOONLIGHT = sizes_in("moonlight", "q4_0")


def machine(ram_gib: float = 256, gpu: Gpu | None = GPU, **more: object) -> Hardware:
    ram_bytes = int(ram_gib * GIB)
    return Hardware("a CPU", 16, "avx512-vnni", ram_bytes, free_of(ram_bytes), gpu=gpu, clock_hz=5e9, **more)


def token_expert_bytes(sizes: ModelSizes) -> float:
    """Routed experts that one token reads, in all layers."""
    return sizes.expert_bytes * sizes.config.num_experts_used / sizes.config.num_experts


def test_physics_of_the_design():
    """design.md's table: bytes a token, experts, the cache, a pass over PCIe."""
    sizes = K25["tq1_0"]
    assert sizes.num_experts == 23_040
    assert sizes.expert_bytes == pytest.approx(214e9, rel=0.002)
    bytes_of = {recipe: token_expert_bytes(K25[recipe]) / 1e9 for recipe in ("tq1_0", "iq1_m", "iq2_xxs")}
    assert bytes_of == pytest.approx({"tq1_0": 4.46, "iq1_m": 4.62, "iq2_xxs": 5.45}, rel=0.002)
    assert sizes.config.kv_bytes_per_token(2) == 70_272
    plan = make_plan(sizes, machine(), Options(context_length=32_768))
    assert plan.part_bytes("VRAM", KV) == 70_272 * 32_768
    assert plan.part_bytes("VRAM", "dense weights") == pytest.approx(11.2e9, rel=0.1)
    assert sizes.expert_bytes / plan.rates.pcie.per_s == pytest.approx(9.3, rel=0.005)
    assert 0.02 < plan.num_vram_slots / 23_040 < 0.05 and plan.num_vram_slots * sizes.slot_bytes <= GPU.vram_free_bytes
    assert plan.verdict == "fits" and plan.disk_expert_bytes == 0
    assert plan.prompt_chunk_tokens == 4096


@pytest.mark.parametrize(
    ("recipe", "tok_s"), [("q4_0", 6.7), ("q2_k", 11.5), ("iq2_xxs", 14.7), ("iq1_m", 17.3), ("tq1_0", 17.9)]
)
def test_ceilings_of_memory_alone(recipe, tok_s):
    """At 80 GB/s and with all else free, as ux.md tells them."""
    rates = rates_of(machine(ram_bytes_s=80e9, gpu=replace(GPU, vram_bytes_s=1e18)))
    assert decode_speed(K25[recipe], Split(1, 0, True), rates).tok_s == pytest.approx(tok_s, rel=0.01)


def test_the_gpu_works_before_and_beside_the_processor():
    """A token: attention on the GPU, then the longer of shared experts and routed experts."""
    sizes, rates = K25["tq1_0"], rates_of(machine(ram_bytes_s=80e9))
    alone_s = (sizes.gpu_dense_bytes + sizes.embedding_row_bytes - sizes.shared_expert_bytes) / 1008e9
    found = decode_speed(sizes, Split(1, 0, True), rates)
    assert 1 / found.tok_s == pytest.approx(alone_s + token_expert_bytes(sizes) / 80e9)
    assert found.limited_by == "RAM bandwidth"
    assert decode_speed(sizes, Split(0.5, 0, True), rates).limited_by == "disk"
    whole = decode_speed(MOONLIGHT, Split(1, 1, True), rates)
    read_bytes = MOONLIGHT.gpu_dense_bytes + MOONLIGHT.embedding_row_bytes + token_expert_bytes(MOONLIGHT)
    assert whole.limited_by == "VRAM bandwidth" and 1 / whole.tok_s == pytest.approx(read_bytes / 1008e9)


def test_processor_alone_reads_everything_from_memory():
    plan = make_plan(MOONLIGHT, machine(64, gpu=None, ram_bytes_s=50e9), Options(context_length=4096))
    read_bytes = MOONLIGHT.dense_bytes + MOONLIGHT.embedding_row_bytes + token_expert_bytes(MOONLIGHT)
    assert plan.decode.limit_tok_s == pytest.approx(50e9 / read_bytes)
    cache_bytes = 4096 * MOONLIGHT.config.kv_bytes_per_token(2)
    assert plan.decode_full.limit_tok_s == pytest.approx(50e9 / (read_bytes + cache_bytes))
    assert plan.prompt.bottleneck == "CPU arithmetic" and not plan.decode.hit_share and not plan.is_on_gpu
    assert plan.rates.cpu_macs.per_s == 16 * 64 * 5e9, "one 64-byte vpdpbusd a cycle"
    slow = make_plan(MOONLIGHT, replace(machine(64, gpu=None), isa="avx2", num_cores=2))
    assert slow.rates.cpu_macs.per_s == 2 * 32 * 5e9 and slow.prompt.limit_tok_s < plan.prompt.limit_tok_s
    few = make_plan(MOONLIGHT, machine(64, gpu=None, ram_bytes_s=5e9))
    assert few.prompt.bottleneck == "RAM bandwidth"


def test_matrix_tiles_are_the_bound_of_prompts_and_their_reach_is_what_is_expected():
    plain, tiles = (
        make_plan(MOONLIGHT, replace(machine(64, gpu=None, ram_bytes_s=500e9), isa=isa))
        for isa in ("avx512-vnni", TILES)
    )
    assert tiles.rates.cpu_macs.per_s == 16 * plain.rates.cpu_macs.per_s == 16 * 1024 * 5e9
    assert tiles.prompt.limit_tok_s > 4 * plain.prompt.limit_tok_s
    assert plain.prompt.expected_tok_s < tiles.prompt.expected_tok_s < 0.2 * tiles.prompt.limit_tok_s
    assert tiles.decode == plain.decode


def test_a_measured_peak_is_of_the_threads_that_run():
    hardware = replace(machine(64, gpu=None), num_cores=2, cpu_macs_s=333e9, origins={"cpu": "measured"})
    one, two = (make_plan(MOONLIGHT, hardware, Options(num_threads=count)).rates.cpu_macs for count in (1, 2))
    assert (one.per_s, two.per_s, two.origin) == (166.5e9, 333e9, "measured")


def test_threads_keep_to_what_the_process_may_use():
    hardware = replace(machine(64, gpu=None), num_cores=2, cores=Cores(2, 2, 16, ("the CPU quota is 2",)))
    for asked, used in ((None, 2), (1, 1), (64, 2)):
        plan = make_plan(MOONLIGHT, hardware, Options(num_threads=asked))
        assert plan.num_threads == used and bool(plan.warnings) == (asked == 64)
    assert "-t 64" in plan.warnings[0] and "the CPU quota is 2" in plan.warnings[0]


def test_the_limit_holds_the_cached_experts_and_what_is_expected_is_below_it():
    plan = make_plan(K25["tq1_0"], machine(ram_bytes_s=80e9))
    none = decode_speed(plan.sizes, Split(1, 0, True), plan.rates)
    assert plan.decode.expected_tok_s < plan.decode.limit_tok_s and none.tok_s < plan.decode.limit_tok_s
    assert 0 < plan.decode.hit_share < plan.decode.best_hit_share < 0.42
    nothing_cached = make_plan(K25["tq1_0"], machine(ram_bytes_s=80e9), Options(num_gpu_experts=0))
    assert nothing_cached.decode.limit_tok_s == pytest.approx(none.tok_s) and not nothing_cached.decode.hit_share


def test_expected_is_what_was_measured():
    """README, two Zen 4 cores at 2.6 GHz: the demo of 30 layers in Q8_0 decodes 72.8 tokens/s, its bytes allow 162."""
    step_s = 1 / 162 / speed._DECODE_SHARE + 30 * speed._LAYER_CYCLES / 2.6e9
    assert 1 / step_s == pytest.approx(72.8, rel=0.1)


def test_hits_follow_published_runs():
    for curve in (HITS_LOW, HITS_HIGH):
        values = [interpolate(curve, share / 100) for share in range(101)]
        assert values == sorted(values) and values[0] == 0 and values[-1] == 1
        assert all(value >= share / 100 - 1e-9 for share, value in enumerate(values))  # never worse than chance
    assert interpolate(HITS_HIGH, 0.046) == pytest.approx(0.408)


GIBS = st.floats(1, 600)


@settings(max_examples=60, deadline=None)
@given(GIBS, GIBS, st.sampled_from(sorted(K25)), st.booleans(), st.sampled_from([None, 4096, 131_072]))
def test_more_memory_is_never_worse(one_gib, other_gib, recipe, has_gpu, context_length):
    less, more = sorted((one_gib, other_gib))
    gpu, limits = GPU if has_gpu else None, Options(context_length=context_length)
    small, large = (make_plan(K25[recipe], machine(gib, gpu), limits) for gib in (less, more))
    order = ("refused", "from disk", "tight", "fits")
    assert order.index(small.verdict) <= order.index(large.verdict)
    assert small.ram_expert_bytes <= large.ram_expert_bytes
    assert small.decode.limit_tok_s <= large.decode.limit_tok_s * (1 + 1e-9)
    assert small.prompt.limit_tok_s <= large.prompt.limit_tok_s * (1 + 1e-9)
    assert small.decode.expected_tok_s <= large.decode.expected_tok_s * (1 + 1e-9)
    assert small.prompt.expected_tok_s <= large.prompt.expected_tok_s * (1 + 1e-9)
    for plan in (small, large):
        for forecast in (plan.decode, plan.decode_full, plan.prompt, plan.decode_at(100, 4)):
            assert 0 < forecast.expected_tok_s <= forecast.limit_tok_s and forecast.hit_share <= forecast.best_hit_share


@settings(max_examples=60, deadline=None)
@given(
    ram_limit=st.none() | GIBS,
    vram_limit=st.none() | st.floats(1, 30),
    ram_gib=GIBS,
    has_gpu=st.booleans(),
    recipe=st.sampled_from(sorted(K25)),
    kv_dtype=st.sampled_from(["f16", "q8"]),
    context_length=st.sampled_from([None, 0, 2048, 100_000]),
)
def test_sums_and_limits(ram_limit, vram_limit, ram_gib, has_gpu, recipe, kv_dtype, context_length):
    """Rows add up, no plan that is not refused exceeds a budget, and no budget exceeds what the user allows or what is
    free."""
    hardware = machine(ram_gib, GPU if has_gpu else None)
    ram_bytes, vram_bytes = (None if limit is None else int(limit * GIB) for limit in (ram_limit, vram_limit))
    limits = Options(context_length=context_length, kv_dtype=kv_dtype, ram_bytes=ram_bytes, vram_bytes=vram_bytes)
    plan = make_plan(K25[recipe], hardware, limits)
    for budget in plan.budgets:
        limit_bytes = {"RAM": ram_bytes, "VRAM": vram_bytes}[budget.place]
        free_bytes = hardware.ram_free_bytes if budget.place == "RAM" else GPU.vram_free_bytes
        assert budget.have_bytes == min(free_bytes, free_bytes if limit_bytes is None else limit_bytes)
        assert plan.refusal or plan.place_bytes(budget.place) <= budget.have_bytes
        assert plan.place_bytes(budget.place) == sum(row.num_bytes for row in plan.rows if row.place == budget.place)
    check_experts(plan)
    assert plan.part_bytes("RAM", EXPERTS) == plan.ram_expert_bytes
    assert plan.part_bytes("VRAM", SLOTS) == plan.num_vram_slots * plan.sizes.slot_bytes
    assert plan.process_bytes == plan.place_bytes("RAM") - plan.part_bytes("RAM", MARGIN)
    assert (plan.verdict == "refused") == (plan.refusal is not None)
    assert all(row.num_bytes > 0 for row in plan.rows)


def check_experts(plan: Plan) -> None:
    """Every expert has a place: VRAM, a slot in RAM, or the disk, where RAM does not hold them all; each once."""
    sizes = plan.sizes
    num_away = sizes.num_experts - plan.num_vram_slots
    if not plan.has_ram_slots:
        assert plan.ram_expert_bytes == (sizes.expert_bytes if num_away > 0 else 0) and not plan.disk_expert_bytes
        return
    expert_bytes = sizes.expert_bytes // sizes.num_experts
    num_in_ram, rest = divmod(plan.ram_expert_bytes, ram_slot_bytes(sizes))
    assert rest == 0 and num_in_ram * expert_bytes + plan.disk_expert_bytes == max(0, num_away) * expert_bytes
    spare_bytes = plan.have_bytes("RAM") - plan.place_bytes("RAM")
    assert plan.refusal or not plan.disk_expert_bytes or spare_bytes < ram_slot_bytes(sizes), "no RAM is left unused"


def remedies(plan: Plan) -> dict[str, str]:
    return {remedy.flags or remedy.action: remedy.effect for remedy in plan.refusal.remedies}


def test_a_laptop_is_refused_with_need_have_and_remedy():
    plan = make_plan(K25["tq1_0"], machine(16, gpu=None))
    with pytest.raises(KimiLiteError, match=r"At least [\d.]+ GiB of RAM are needed .*; 13\.4 GiB are free") as caught:
        plan.require()
    assert "a machine with more memory: 32 GiB of RAM would do" in caught.value.hint
    document = plan.to_json()
    assert document["decode"] is document["prompt"] is document["decode_full"] is None, "no speeds where it cannot run"


def parse_flags(text: str) -> dict[str, object]:
    """Fields of Options from flags as a remedy writes them."""
    words, by_flag = text.split(), {flag: option for option in OPTIONS.values() for flag in option.flags}
    pairs = zip(words[::2], words[1::2], strict=True)
    return {by_flag[flag].name: by_flag[flag].parse(value, flag) for flag, value in pairs}


def follow(remedy: Remedy, plan: Plan) -> Plan:
    """What becomes of the plan when its user does what the remedy says."""
    situation = plan.situation
    sizes, hardware, options = situation.sizes, situation.hardware, situation.limits
    file_bytes = situation.file_bytes
    if remedy.flags:
        options = replace(options, **parse_flags(remedy.flags))
    elif remedy.action.startswith("without "):
        flags = remedy.action.removeprefix("without ").split(" and ")
        options = replace(options, **{OPTIONS_BY_FLAG[flag].name: None for flag in flags})
    elif remedy.action.startswith("a machine with more memory"):
        ram_bytes = int(remedy.effect.split()[0]) * GIB
        hardware, options = described(hardware, ram_bytes), replace(options, ram_bytes=ram_bytes)
        options = replace(options, **parse_flags(remedy.action.partition(" and ")[2]))
    else:
        assert remedy.action == "a folder on a larger disk", remedy
        hardware = replace(hardware, disk=Disk(Path("/large"), file_bytes))
    return make_plan(sizes, hardware, options, file_bytes=file_bytes)


OPTIONS_BY_FLAG = {option.long_flag: option for option in OPTIONS.values()}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_remedy_runs_in_the_very_situation(data):
    """Machines, models and wishes of all kinds: whatever a refusal offers, doing it gives a plan that runs; and it
    offers something wherever memory or disk is what lacks."""
    draw = data.draw
    recipe = draw(st.sampled_from([*sorted(K25), "moonlight"]))
    sizes = MOONLIGHT if recipe == "moonlight" else K25[recipe]
    vram_gib = draw(st.none() | st.sampled_from([4, 8, 12, 16, 24, 48]))
    gpu = vram_gib and Gpu("a GPU", vram_gib * GIB, int(draw(st.floats(0.2, 0.97)) * vram_gib * GIB))
    disk = draw(st.none() | st.builds(Disk, st.just(Path("/models")), st.integers(0, 700).map(lambda gib: gib * GIB)))
    hardware = replace(
        machine(draw(st.sampled_from([4, 8, 16, 32, 64, 128, 256, 512])), gpu, disk=disk),
        num_cores=draw(st.sampled_from([1, 2, 16])),
    )
    limit = st.none() | st.integers(1, 300).map(lambda gib: gib * GIB)
    options = Options(
        context_length=draw(st.none() | st.sampled_from([0, 2048, 100_000, 262_144])),
        kv_dtype=draw(st.sampled_from(["f16", "q8", "f32"])),
        device=draw(st.sampled_from([None, "cpu", "cuda"])),
        vram_bytes=draw(limit),
        ram_bytes=draw(limit),
        num_gpu_experts=draw(st.none() | st.sampled_from([0, 100, 20_000])),
        dense_type=draw(st.sampled_from(["auto", *DENSE_TYPES])),
    )
    plan = make_plan(sizes, hardware, options, file_bytes=draw(st.sampled_from([0, sizes.total_bytes])))
    if not plan.refusal:
        assert all(plan.place_bytes(budget.place) <= budget.have_bytes for budget in plan.budgets)
        return
    for remedy in plan.refusal.remedies:
        assert not follow(remedy, plan).refusal, (remedy, plan.refusal.problem)
        assert remedy.effect and bool(remedy.flags) != bool(remedy.action)
    assert plan.refusal.remedies, plan.refusal.problem


def test_the_longest_context_is_offered():
    plan = make_plan(K25["tq1_0"], machine(), Options(context_length=262_144))
    flags = next(flags for flags in remedies(plan) if flags.startswith("-c"))
    longest = parse_flags(flags)["context_length"]
    longer = make_plan(K25["tq1_0"], machine(), Options(context_length=longest + 1024))
    assert longer.refusal and "--device cpu" in remedies(longer)


@pytest.mark.parametrize(
    ("vram_gib", "context_length", "dense_type"),
    [(8, 2048, "q4_k"), (12, 8192, "q6_k"), (16, 8192, "q8_0"), (24, 8192, "q8_0")],
)
def test_small_gpus_get_their_dense_weights_in_fewer_bits(vram_gib, context_length, dense_type):
    """The finest type that fits, with what it costs; what the next coarser one would bring."""
    gpu = replace(GPU, vram_total_bytes=vram_gib * GIB, vram_free_bytes=int(0.97 * vram_gib * GIB))
    plan = make_plan(K25["tq1_0"], machine(256, gpu), Options(context_length=context_length, kv_dtype="q8"))
    assert plan.dense_type == dense_type and not plan.refusal
    bits, exact_bytes = {"q8_0": 8.5, "q6_k": 6.5625, "q4_k": 4.5}[dense_type], 0.665e9  # routers in F32
    assert plan.part_bytes("VRAM", "dense weights") == pytest.approx(exact_bytes + 10.38e9 * bits / 8, rel=0.02)
    text = " ".join(" ".join(plan_lines(plan)).split())
    assert (f"encoded as {dense_type.upper()} while loading" in text) == (dense_type != "q8_0")
    assert bool(plan.finer) == (dense_type != "q8_0") and (plan.finer is None or not plan.finer.fits_in("VRAM"))
    if dense_type == "q8_0":
        coarser = make_plan(K25["tq1_0"], machine(256, gpu), replace(plan.limits, dense_type="q6_k"))
        gain = coarser.decode.expected_tok_s / plan.decode.expected_tok_s - 1
        assert (f"--dense q6_k: {gain:.0%} more tokens/s expected" in text) == (gain >= 0.05)
    finest = make_plan(K25["tq1_0"], machine(256, gpu), replace(plan.limits, dense_type="q8_0"))
    assert bool(finest.refusal) == (dense_type != "q8_0")
    assert not finest.refusal or {"--dense auto", "--device cpu"} <= set(remedies(finest))


def test_types_of_fewer_bits_stay_as_they_are():
    """A file whose dense weights are of two bits takes no more VRAM for them than on the disk."""
    config = KNOWN["kimi-k2.5"].config

    def layout(name: str, shape: tuple[int, ...]) -> Layout:
        is_exact = len(shape) == 1 or "ffn_gate_inp" in name
        return BY_NAME["F32" if is_exact else "IQ4_NL" if shape[-1] % 256 else "IQ2_XXS"]

    shapes = tensor_shapes(config, ()).items()
    sizes = sizes_of(config, ((name, shape, layout(name, shape)) for name, shape in shapes))
    plan = make_plan(sizes, machine())
    assert plan.dense_type == "q8_0" and plan.part_bytes("VRAM", "dense weights") == sizes.dense_bytes < 3.4 * GIB
    assert plan.num_vram_slots > 1200 and "in IQ2_XXS + F32" in "\n".join(plan_lines(plan))


def test_a_gpu_that_draws_the_desktop_keeps_a_gibibyte_for_it():
    plain, drawing = (make_plan(K25["tq1_0"], machine(gpu=replace(GPU, has_display=shown))) for shown in (False, True))
    kept = drawing.part_bytes("VRAM", MARGIN) - plain.part_bytes("VRAM", MARGIN)
    assert kept == GIB and drawing.num_vram_slots < plain.num_vram_slots
    assert plain.part_bytes("VRAM", MARGIN) > CUDA_BYTES + 0.02 * GPU.vram_total_bytes


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 600), st.sampled_from(["tq1_0", "q4_0"]), st.sampled_from(["f16", "q8", "f32"]))
def test_pinned_memory_is_counted_in_the_blocks_that_torch_takes(ram_gib, recipe, kv_dtype):
    """Powers of two; the pages behind the cache come in blocks that are not rounded up."""
    plan = make_plan(K25[recipe], machine(ram_gib), Options(kv_dtype=kv_dtype))
    page_bytes = plan.part_bytes("VRAM", KV) // plan.num_cache_pages
    block_bytes = plan.part_bytes("RAM", SPILL)
    assert block_bytes == host_bytes(plan.num_spill_pages, page_bytes)
    assert pinned_block_bytes(5 << 20) == 8 << 20 and pinned_block_bytes(1 << 20) == 1 << 20
    assert plan.part_bytes("RAM", PINNED) >= RING_BYTES


def test_limits_of_the_user_are_named_when_they_are_what_lacks():
    plan = make_plan(K25["tq1_0"], machine(), Options(vram_bytes=9 * GIB))
    assert "--vram allows 9.0 GiB" in plan.refusal.problem
    assert "without --vram" in remedies(plan) and "--device cpu" in remedies(plan)


def test_too_long_a_context_and_a_missing_gpu():
    refused = make_plan(MOONLIGHT, machine(), Options(context_length=10_000))
    assert "made for 8,192" in refused.refusal.problem and "-c 8K" in remedies(refused)
    refused = make_plan(MOONLIGHT, machine(gpu=None), Options(device="cuda"))
    assert "no GPU" in refused.refusal.problem and "--device cpu" in remedies(refused)


def test_a_file_that_finds_no_place_on_the_disk_is_refused():
    """And nothing is offered that does not help there: a shorter context saves no disk."""
    sizes = K25["tq1_0"]
    here = machine(disk=Disk(Path("/models"), 63 * GIB))
    plan = make_plan(sizes, here, file_bytes=sizes.total_bytes)
    assert "of disk; 63.0 GiB are free at /models" in plan.refusal.problem
    assert set(remedies(plan)) == {"a folder on a larger disk", "a machine with more memory"} - (
        set() if "a machine with more memory" in remedies(plan) else {"a machine with more memory"}
    )
    assert not make_plan(sizes, here).refusal, "a file that is there needs no more"


def test_experts_that_do_not_fit_come_from_disk():
    plan = make_plan(K25["iq2_xxs"], machine(250))
    assert plan.verdict == "from disk" and "of experts fit, the rest comes from disk" in plan.bottleneck
    assert plan.part_bytes("disk", EXPERTS) == plan.disk_expert_bytes > 0
    on_cpu = make_plan(K25["iq2_xxs"], machine(250), Options(device="cpu"))
    ram_share = on_cpu.ram_expert_bytes / on_cpu.sizes.expert_bytes
    assert ram_share <= on_cpu.decode.hit_share <= on_cpu.decode.best_hit_share <= 1
    assert 0 < plan.decode.hit_share < 0.5, "of the experts cached in VRAM"


def test_experts_in_vram_need_no_copy_where_ram_does_not_hold_all():
    """243.6 GiB of experts on 256 GiB of RAM and a GPU: together they hold what RAM alone does not."""
    plan = make_plan(K25["iq2_xxs"], machine())
    assert plan.has_ram_slots and plan.ram_budget_bytes == plan.ram_expert_bytes < plan.sizes.expert_bytes
    assert plan.verdict in ("fits", "tight") and not plan.disk_expert_bytes and plan.split.ram_share == 1
    assert "without those cached in VRAM" in "\n".join(plan_lines(plan))
    without = make_plan(K25["iq2_xxs"], machine(), Options(num_gpu_experts=0))
    assert without.verdict == "from disk" and without.decode.expected_tok_s < plan.decode.expected_tok_s


def test_everything_on_the_gpu_needs_no_memory_for_experts():
    plan = make_plan(MOONLIGHT, machine(16))
    assert plan.num_vram_slots == MOONLIGHT.num_experts and not plan.ram_expert_bytes and not plan.disk_expert_bytes
    assert plan.decode.bottleneck == "VRAM bandwidth"


def test_eight_bits_halve_the_cache_and_vision_counts():
    full, half = (make_plan(K25["tq1_0"], machine(), Options(kv_dtype=kv_dtype)) for kv_dtype in ("f16", "q8"))
    assert half.part_bytes("VRAM", KV) == pytest.approx(full.part_bytes("VRAM", KV) * 0.53, rel=0.01)
    known = KNOWN["kimi-k2.5"]
    seeing = replace(K25["tq1_0"], vision_bytes=known.vision_bytes, tower=known.tower)
    in_ram, on_gpu = (make_plan(seeing, machine(), Options(vision=place)) for place in ("ram", "gpu"))
    assert on_gpu.num_vram_slots < in_ram.num_vram_slots < full.num_vram_slots
    assert in_ram.part_bytes("RAM", "vision") == 942_287_840 and not on_gpu.part_bytes("RAM", "vision")
    work_bytes = vision_work_bytes(known.tower, is_on_gpu=True)
    assert on_gpu.part_bytes("VRAM", "vision") == 942_287_840 + work_bytes
    assert 0 < in_ram.part_bytes("VRAM", "vision") - work_bytes < 80_000_000, "two layers on their way"
    without = make_plan(seeing, machine(gpu=None), Options())
    assert without.part_bytes("RAM", "vision") == 942_287_840 + vision_work_bytes(known.tower, is_on_gpu=False)


def test_flags_of_the_gpu_are_kept():
    sizes = K25["tq1_0"]
    plain, few = make_plan(sizes, machine()), make_plan(sizes, machine(), Options(num_gpu_experts=100))
    assert few.num_vram_slots == 100 < plain.num_vram_slots and few.place_bytes("VRAM") < plain.place_bytes("VRAM")
    assert not make_plan(sizes, machine(), Options(num_gpu_experts=0)).num_vram_slots
    too_many = make_plan(sizes, machine(), Options(num_gpu_experts=5000))
    assert "cached experts" in too_many.refusal.problem
    assert f"--gpu-experts {plain.num_vram_slots}" in remedies(too_many)
    wide = make_plan(
        sizes,
        machine(gpu=replace(GPU, vram_total_bytes=48 * GIB, vram_free_bytes=47 * GIB)),
        Options(dense_type="bf16"),
    )
    assert wide.part_bytes("VRAM", "dense weights") == pytest.approx(21e9, rel=0.05)  # 10.55 G weights
    narrow = make_plan(sizes, wide.hardware, Options(num_gpu_experts=wide.num_vram_slots))
    assert wide.decode.limit_tok_s < narrow.decode.limit_tok_s
    as_file = sizes.with_dense_type("file")
    assert as_file.gpu_dense_bytes == sizes.dense_bytes


def test_json_holds_what_the_tables_show():
    document = json.loads(json.dumps(make_plan(K25["tq1_0"], machine(), Options(context_length=0)).to_json()))
    assert document["verdict"] == "refused" and document["refusal"]["remedies"]
    assert document["context_length"] == 262_144 and document["rates"]["ram"]["origin"] == "assumed"
    assert sum(row["num_bytes"] for row in document["rows"] if row["place"] == "RAM") > 199 * GIB
