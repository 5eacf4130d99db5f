"""What lies where, what comes first to its limit, and how fast it could be: pure arithmetic over (model, machine,
limits).

    plan = make_plan(sizes, hardware, Options(context_length=32_768))
    plan.require()  # KimiLiteError with need, have, remedy where it cannot run

No torch, no files. Flags of the user are constraints that every plan keeps; a plan that cannot be is still a plan, with
its `refusal`. Shown by `apps.plan_view` for `plan`, the start of a chat, `quantize --dry-run` and `bench`; the loader
takes `ram_expert_bytes`, `num_vram_slots` and `prompt_chunk_tokens` from it.
"""

from dataclasses import replace

from kimi_lite.arch.sizes import ModelSizes
from kimi_lite.hardware.probe import Hardware
from kimi_lite.kv.pages import bytes_per_token, value_bytes
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.options import Options
from kimi_lite.plan.refusal import find_problem, find_remedies
from kimi_lite.plan.speed import Split, decode_speed, expect, pass_s, prompt_speed, rates_of
from kimi_lite.plan.types import (
    DENSE,
    EMBEDDING,
    EXPERTS,
    KV,
    MARGIN,
    PINNED,
    PROGRAM,
    SLOTS,
    VISION,
    WORK,
    Budget,
    Place,
    Plan,
    Refusal,
    Row,
    Verdict,
)
from kimi_lite.plan.workspace import (
    STEP_TOKENS,
    choose_chunk,
    cpu_work_bytes,
    gpu_margin_bytes,
    gpu_work_bytes,
    pinned_bytes,
    program_bytes,
    ram_margin_bytes,
)
from kimi_lite.units import gib_apart

DEFAULT_CONTEXT = 32_768  # tokens, when the model can have more; 2.1 GiB of cache for Kimi K2.5
_TIGHT_SHARE = 0.03  # of the budget: less than this free is called tight


def make_plan(sizes: ModelSizes, hardware: Hardware, limits: Options | None = None) -> Plan:
    """The one plan for this model here. Uses the GPU where there is one and `limits` allow it."""
    limits = limits or Options()
    plan = lay_out(sizes, hardware, limits)
    if not (problem := find_problem(plan)):
        return plan
    return replace(plan, verdict="refused", refusal=Refusal(problem, tuple(find_remedies(plan, lay_out))))


def lay_out(sizes: ModelSizes, hardware: Hardware, limits: Options) -> Plan:
    """The plan, whether it can be or not."""
    sizes = sizes.with_dense_type(limits.dense_type)
    is_on_gpu = hardware.gpu is not None and limits.allows_gpu
    context_length = choose_context(sizes, limits.context_length)
    hardware_used = replace(hardware, num_cores=limits.num_threads or hardware.num_cores)
    budgets = find_budgets(hardware, limits, is_on_gpu)
    cache = limits.num_sequences * kv_bytes(sizes, context_length, limits.kv_dtype)
    on_gpu, chunk, num_slots = (
        _lay_out_gpu(sizes, hardware, limits, budgets, cache) if is_on_gpu else ([], STEP_TOKENS, 0)
    )
    in_ram = _ram_rows(sizes, hardware_used, cache, chunk if is_on_gpu else 0)
    have_bytes = next(budget.have_bytes for budget in budgets if budget.place == "RAM")
    left_bytes = max(0, have_bytes - sum(row.num_bytes for row in in_ram))
    if limits.ram_expert_bytes is not None:
        left_bytes = min(left_bytes, limits.ram_expert_bytes)
    wanted_bytes = 0 if num_slots and num_slots == sizes.num_experts else sizes.expert_bytes
    ram_bytes = min(wanted_bytes, left_bytes)
    rows = [*on_gpu, *in_ram, Row("RAM", EXPERTS, ram_bytes), Row("disk", EXPERTS, wanted_bytes - ram_bytes)]
    ram_share = ram_bytes / wanted_bytes if wanted_bytes else 1.0
    gpu_share = num_slots / sizes.num_experts if sizes.num_experts else 0.0
    split = Split(ram_share, gpu_share, is_on_gpu, value_bytes=value_bytes(sizes.config, limits.kv_dtype))
    rates = rates_of(hardware_used)
    decode = decode_speed(sizes, split, rates)
    return Plan(
        sizes=sizes,
        hardware=hardware,
        limits=limits,
        context_length=context_length,
        is_on_gpu=is_on_gpu,
        rows=tuple(row for row in rows if row.num_bytes),
        budgets=budgets,
        num_vram_slots=num_slots,
        ram_expert_bytes=ram_bytes,
        disk_expert_bytes=wanted_bytes - ram_bytes,
        prompt_chunk_tokens=chunk,
        num_threads=hardware_used.num_cores,
        split=split,
        rates=rates,
        decode=decode,
        decode_full=decode_speed(sizes, replace(split, depth=context_length), rates),
        prompt=prompt_speed(sizes, split, rates, chunk),
        expert_pass_s=pass_s(sizes, split, rates) if is_on_gpu else 0.0,
        expected=expect(sizes, split, rates),
        first_limit=_first_limit(decode.limit, wanted_bytes, ram_bytes),
        verdict=_judge(wanted_bytes - ram_bytes, left_bytes - ram_bytes, have_bytes),
    )


def kv_bytes(sizes: ModelSizes, num_tokens: int, kv_dtype: str) -> int:
    """The latent cache, in whole pages."""
    num_pages = -(-num_tokens // PAGE_TOKENS)
    return num_pages * PAGE_TOKENS * bytes_per_token(sizes.config, kv_dtype)


def choose_context(sizes: ModelSizes, asked: int | None) -> int:
    """Tokens: what is asked (0: all that the model was made for), or up to 32 K."""
    model = sizes.config.context_length
    return min(model, DEFAULT_CONTEXT) if asked is None else asked or model


def find_budgets(hardware: Hardware, limits: Options, is_on_gpu: bool) -> tuple[Budget, ...]:
    """Of each place whichever is less: what is free, or what the user allows."""
    found = [_budget("RAM", hardware.ram_free_bytes, limits.ram_bytes, "--ram")]
    if is_on_gpu:
        found.insert(0, _budget("VRAM", hardware.gpu.vram_free_bytes, limits.vram_bytes, "--vram"))
    return tuple(found)


def _budget(place: Place, free_bytes: int, limit_bytes: int | None, flag: str) -> Budget:
    is_limited = limit_bytes is not None and limit_bytes <= free_bytes
    return Budget(place, limit_bytes if is_limited else free_bytes, flag if is_limited else "free")


def _lay_out_gpu(
    sizes: ModelSizes, hardware: Hardware, limits: Options, budgets: tuple[Budget, ...], cache: int
) -> tuple[list[Row], int, int]:
    """Rows, tokens of a prompt's chunk, and expert slots, which get what is left."""
    fixed = [
        Row("VRAM", DENSE, sizes.gpu_dense_bytes),
        Row("VRAM", KV, cache),
        Row("VRAM", VISION, sizes.vision_bytes),
        Row("VRAM", MARGIN, gpu_margin_bytes(hardware.gpu.vram_total_bytes)),
    ]
    left_bytes = budgets[0].have_bytes - sum(row.num_bytes for row in fixed)
    chunk = choose_chunk(sizes, left_bytes)
    work_bytes = gpu_work_bytes(sizes, chunk)
    most = min(sizes.num_experts, max(0, left_bytes - work_bytes) // sizes.slot_bytes) if sizes.slot_bytes else 0
    num_slots = most if limits.num_gpu_experts is None else min(limits.num_gpu_experts, sizes.num_experts)
    rows = [*fixed, Row("VRAM", WORK, work_bytes), Row("VRAM", SLOTS, num_slots * sizes.slot_bytes)]
    return rows, chunk, num_slots


def _ram_rows(sizes: ModelSizes, hardware: Hardware, cache: int, gpu_chunk: int) -> list[Row]:
    """All but the experts; `gpu_chunk`: tokens that go through the GPU at a time, 0 where there is none."""
    always = [
        Row("RAM", EMBEDDING, sizes.embedding_bytes),
        Row("RAM", WORK, cpu_work_bytes(sizes.config, hardware.num_cores)),
        Row("RAM", PROGRAM, program_bytes(sizes)),
        Row("RAM", MARGIN, ram_margin_bytes(hardware.ram_total_bytes)),
    ]
    if gpu_chunk:
        return [Row("RAM", PINNED, pinned_bytes(sizes, gpu_chunk)), *always]
    weights = Row("RAM", DENSE, sizes.dense_bytes + sizes.converted_bytes)
    return [weights, Row("RAM", KV, cache), Row("RAM", VISION, sizes.vision_bytes), *always]


def _first_limit(slowest: str, wanted_bytes: int, ram_bytes: int) -> str:
    if ram_bytes < wanted_bytes:
        need, have = gib_apart(wanted_bytes, ram_bytes)
        return f"RAM: {have} of {need} of experts fit, the rest comes from disk"
    return slowest


def _judge(disk_bytes: int, spare_bytes: int, have_bytes: int) -> Verdict:
    if disk_bytes:
        return "from disk"
    return "tight" if spare_bytes < _TIGHT_SHARE * have_bytes else "fits"
