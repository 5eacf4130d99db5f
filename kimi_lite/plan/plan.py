"""What lies where, what comes first to its limit, and how fast it could be: pure arithmetic over (model, machine,
options).

    plan = make_plan(sizes, hardware, Options(context_length=32_768))
    plan.require()  # KimiLiteError with need, have, remedy where it cannot run

No torch, no files. What the user asks are constraints that every plan keeps; a plan that cannot be is still a plan,
with its `refusal`. Shown by `plan.view` for `plan`, the start of a chat, `quantize --dry-run` and `bench`; the engine
allocates the plan's numbers: cache pages, slots in VRAM, RAM for experts, a prompt's chunk.
"""

from dataclasses import replace

from kimi_lite.arch.sizes import ModelSizes
from kimi_lite.hardware.machine import Hardware
from kimi_lite.kv.host import host_bytes
from kimi_lite.kv.pages import bytes_per_token, value_bytes
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.options import FITTING, Options
from kimi_lite.plan.cliff import warn_of_cliff
from kimi_lite.plan.gpus import lay_out_gpus
from kimi_lite.plan.nodes import memory_use, node_bytes, warn_of_full_node
from kimi_lite.plan.refusal import find_problem, find_remedies
from kimi_lite.plan.speed import Split, forecast_decode, forecast_prompt, rates_of
from kimi_lite.plan.types import (
    DENSE,
    EMBEDDING,
    EXPERTS,
    KV,
    MARGIN,
    PINNED,
    PROGRAM,
    SLOTS,
    SPILL,
    VISION,
    WORK,
    Budget,
    MemoryRow,
    Place,
    Plan,
    PlanInputs,
    Refusal,
    Verdict,
)
from kimi_lite.plan.workspace import (
    STEP_TOKENS,
    cpu_work_bytes,
    num_spill_pages,
    pinned_bytes,
    program_bytes,
    ram_margin_bytes,
    ram_slot_bytes,
    vision_work_bytes,
)
from kimi_lite.units import gib_apart

DEFAULT_CONTEXT = 32_768  # tokens, when the model can have more; 2.1 GiB of cache for Kimi K2.5
_TIGHT_SHARE = 0.03  # of the budget: less than this free is called tight


def make_plan(
    sizes: ModelSizes,
    hardware: Hardware,
    limits: Options | None = None,
    *,
    file_bytes: int = 0,
) -> Plan:
    """The one plan for this model here. Uses the GPU where there is one and `limits` allow it. `file_bytes`:
    what must still be written to the disk."""
    situation = PlanInputs(sizes, hardware, limits or Options(), file_bytes)
    plan = lay_out(situation)
    if not (problem := find_problem(plan)):
        cliff = warn_of_cliff(plan, lay_out)
        return replace(plan, warnings=(*plan.warnings, cliff)) if cliff else plan
    return replace(plan, verdict="refused", refusal=Refusal(problem, tuple(find_remedies(plan, lay_out))))


def lay_out(situation: PlanInputs) -> Plan:
    """The plan, whether it can be or not. Where the type of the dense weights is the plan's choice it is the finest
    that VRAM holds with everything else; the next coarser one is kept to say what it would bring."""
    limits = situation.limits
    if limits.dense_type != "auto":
        return _lay_out(situation, limits.dense_type)
    kinds = FITTING if situation.is_on_gpu else FITTING[:1]
    plans = [_lay_out(situation, kind) for kind in kinds]
    best = next((at for at, plan in enumerate(plans) if plan.fits_in("VRAM")), len(plans) - 1)
    finer, coarser = plans[best - 1] if best else None, plans[best + 1] if best + 1 < len(plans) else None
    return replace(plans[best], finer=finer, coarser=coarser)


def _lay_out(situation: PlanInputs, dense_type: str) -> Plan:
    """With the dense weights in this type in VRAM."""
    hardware, limits = situation.hardware, situation.limits
    sizes = situation.sizes.with_dense_type(dense_type)
    is_on_gpu = situation.is_on_gpu
    context_length = choose_context(sizes, limits.context_length)
    num_threads, warning = _choose_threads(hardware, limits)
    budgets = find_budgets(hardware, limits, is_on_gpu)
    have_bytes = next(budget.have_bytes for budget in budgets if budget.place == "RAM")
    num_pages = situation.num_running * -(-context_length // PAGE_TOKENS)
    page_bytes = PAGE_TOKENS * bytes_per_token(sizes.config, limits.kv_dtype)
    on_gpu, chunk, parts, num_spilled = [], STEP_TOKENS, (), 0
    if is_on_gpu:
        on_gpu, chunk, parts = lay_out_gpus(situation, sizes, budgets, num_pages * page_bytes, context_length)
    num_slots = sum(part.num_slots for part in parts)
    in_ram = _ram_rows(sizes, hardware, num_threads, num_pages * page_bytes, chunk, len(parts))
    if not (is_on_gpu and limits.vision == "gpu"):
        work_bytes = vision_work_bytes(sizes.tower, False) if sizes.tower and not is_on_gpu else 0
        in_ram.append(MemoryRow("RAM", VISION, sizes.vision_bytes + work_bytes))
    left_bytes = max(0, have_bytes - sum(row.num_bytes for row in in_ram))
    num_away = sizes.num_experts - min(num_slots, sizes.num_experts)  # experts that have no slot in VRAM
    wanted_bytes = sizes.expert_bytes if num_away else 0
    if is_on_gpu:
        num_spilled = num_spill_pages(num_pages, page_bytes, left_bytes, wanted_bytes)
        spill_bytes = host_bytes(num_spilled, page_bytes)
        in_ram.append(MemoryRow("RAM", SPILL, spill_bytes))
        left_bytes -= spill_bytes
    if limits.ram_expert_bytes is not None:
        left_bytes = min(left_bytes, limits.ram_expert_bytes)
    num_in_ram, ram_bytes, disk_bytes = num_away, wanted_bytes, 0
    if left_bytes < wanted_bytes:
        num_in_ram = min(num_away, left_bytes // ram_slot_bytes(sizes))
        ram_bytes = num_in_ram * ram_slot_bytes(sizes)
        disk_bytes = (num_away - num_in_ram) * (sizes.expert_bytes // sizes.num_experts)
    rows = [
        *on_gpu,
        *in_ram,
        MemoryRow("RAM", EXPERTS, ram_bytes),
        MemoryRow("disk", EXPERTS, disk_bytes),
    ]
    split = Split(
        ram_share=num_in_ram / num_away if num_away else 1.0,
        gpu_share=num_slots / sizes.num_experts if sizes.num_experts else 0.0,
        is_on_gpu=is_on_gpu,
        value_bytes=value_bytes(sizes.config, limits.kv_dtype),
    )
    shares = [len(part.layers) / sizes.config.num_layers for part in parts]
    use, needs = memory_use(hardware, limits, num_threads), node_bytes(hardware, limits, num_threads, rows)
    rates = rates_of(hardware, num_threads, shares, use)
    decode = forecast_decode(sizes, split, rates)
    return Plan(
        situation=situation,
        is_on_gpu=is_on_gpu,
        dense_type=dense_type,
        rows=tuple(row for row in rows if row.num_bytes),
        budgets=budgets,
        context_length=context_length,
        num_cache_pages=num_pages,
        num_spill_pages=num_spilled,
        num_vram_slots=num_slots,
        prompt_chunk_tokens=chunk,
        ram_expert_bytes=ram_bytes,
        disk_expert_bytes=disk_bytes,
        memory_use=use,
        gpu_parts=parts,
        expert_capacity_bytes=max(left_bytes, _vram_left(budgets, on_gpu)),
        num_threads=num_threads,
        split=split,
        rates=rates,
        decode=decode,
        decode_full=forecast_decode(sizes, replace(split, depth=context_length), rates),
        prompt=forecast_prompt(sizes, split, rates, chunk),
        bottleneck=_bottleneck(decode.bottleneck, ram_bytes, disk_bytes),
        verdict=_judge(disk_bytes, left_bytes - ram_bytes, have_bytes),
        node_bytes=needs,
        warnings=tuple(each for each in (warning, warn_of_full_node(needs)) if each),
    )


def choose_context(sizes: ModelSizes, asked: int | None) -> int:
    """Tokens: what is asked (0: all that the model was made for), or up to 32 K."""
    model = sizes.config.context_length
    return min(model, DEFAULT_CONTEXT) if asked is None else asked or model


def find_budgets(hardware: Hardware, limits: Options, is_on_gpu: bool) -> tuple[Budget, ...]:
    """Of each place whichever is less: what is free, or what the user allows."""
    found = [_budget("RAM", hardware.ram_free_bytes, limits.ram_bytes, "--ram")]
    if is_on_gpu:
        gpus = enumerate(hardware.gpus)
        found[:0] = [_budget("VRAM", gpu.vram_free_bytes, limits.vram_limit(n), "--vram", n) for n, gpu in gpus]
    return tuple(found)


def _budget(place: Place, free_bytes: int, limit_bytes: int | None, flag: str, gpu: int = 0) -> Budget:
    is_limited = limit_bytes is not None and limit_bytes <= free_bytes
    return Budget(place, limit_bytes if is_limited else free_bytes, flag if is_limited else "free", gpu)


def _choose_threads(hardware: Hardware, limits: Options) -> tuple[int, str]:
    """How many threads start, and the warning where they are fewer than asked for."""
    if hardware.cores:
        return hardware.cores.choose_threads(limits.num_threads)
    return limits.num_threads or hardware.num_cores, ""


def _vram_left(budgets: tuple[Budget, ...], rows: list[MemoryRow]) -> int:
    """Bytes of VRAM for experts; 0 without a GPU."""
    have_bytes = sum(budget.have_bytes for budget in budgets if budget.place == "VRAM")
    return have_bytes - sum(row.num_bytes for row in rows if row.part != SLOTS) if rows else 0


def _ram_rows(
    sizes: ModelSizes, hardware: Hardware, num_threads: int, cache_bytes: int, gpu_chunk: int, num_gpus: int
) -> list[MemoryRow]:
    """All but the experts; `gpu_chunk`: tokens that go through a GPU at a time."""
    always = [
        MemoryRow("RAM", EMBEDDING, sizes.embedding_bytes),
        MemoryRow("RAM", WORK, cpu_work_bytes(sizes.config, num_threads)),
        MemoryRow("RAM", PROGRAM, program_bytes(sizes)),
        MemoryRow("RAM", MARGIN, ram_margin_bytes(hardware.ram_total_bytes)),
    ]
    if num_gpus:
        crossing_bytes = 2 * 4 * gpu_chunk * sizes.config.hidden_size if num_gpus > 1 else 0  # x, from GPU to GPU
        return [MemoryRow("RAM", PINNED, num_gpus * pinned_bytes(sizes, gpu_chunk) + crossing_bytes), *always]
    weights = MemoryRow("RAM", DENSE, sizes.dense_bytes + sizes.converted_bytes)
    return [weights, MemoryRow("RAM", KV, cache_bytes), *always]


def _bottleneck(slowest: str, ram_bytes: int, disk_bytes: int) -> str:
    if disk_bytes:
        need, have = gib_apart(ram_bytes + disk_bytes, ram_bytes)
        return f"RAM: {have} of {need} of experts fit, the rest comes from disk"
    return slowest


def _judge(disk_bytes: int, spare_bytes: int, have_bytes: int) -> Verdict:
    if disk_bytes:
        return "from disk"
    return "tight" if spare_bytes < _TIGHT_SHARE * have_bytes else "fits"
