"""Why a plan cannot be, and what would do instead: every remedy has been planned and fits."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from kimi_lite.arch.sizes import ModelSizes
from kimi_lite.hardware.probe import Hardware, free_of
from kimi_lite.options import Options
from kimi_lite.plan.types import EXPERTS, Place, Plan
from kimi_lite.units import GIB, gib, gib_apart

LayOut = Callable[[ModelSizes, Hardware, Options], Plan]
_LEAST_TOKENS_CACHED = 2  # tokens whose experts a cache of experts must hold, or it would never help
_LEAST_CONTEXT = 1024
_BOARDS_GIB = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # as memory is sold


def find_problem(plan: Plan) -> str:
    """Why the plan cannot be, with need and have; empty where it can."""
    asked, model = plan.context_length, plan.sizes.config.context_length
    if plan.limits.device not in (None, "cpu") and not plan.hardware.gpu:
        return f"--device {plan.limits.device} is asked for, and there is no GPU that can be used."
    if asked > model:
        return f"A context of {asked:,} tokens is wanted; the model is made for {model:,}."
    for budget in plan.budgets:
        lacking_bytes = _lacking_expert_bytes(plan, budget.place)
        need_bytes = plan.place_bytes(budget.place) + lacking_bytes
        if need_bytes > budget.have_bytes:
            need, have = gib_apart(need_bytes, budget.have_bytes)
            parts = [
                f"{row.part} {gib(row.num_bytes)}"
                for row in plan.rows
                if row.place == budget.place and row.part != EXPERTS
            ]
            if budget.place == "RAM" and (experts_bytes := plan.ram_expert_bytes + lacking_bytes):
                parts.append(f"{EXPERTS} {'at least ' if lacking_bytes else ''}{gib(experts_bytes)}")
            source = f"{have} are free" if budget.source == "free" else f"{budget.source} allows {have}"
            return f"At least {need} of {budget.place} are needed ({', '.join(parts)}); {source}."
    return ""


def find_remedies(plan: Plan, lay_out: LayOut) -> Iterator[tuple[str, str]]:
    """(flags or action, what it gives), each of which would run."""
    sizes, limits, hardware = plan.sizes, plan.limits, plan.hardware
    for flags, changed in _smaller_wishes(plan, lay_out):
        other = lay_out(sizes, hardware, changed)
        if changed != limits and not find_problem(other):
            yield flags, f"at most {other.decode.tok_s:.1f} tokens/s"
    if limits.num_gpu_experts:
        most = lay_out(sizes, hardware, replace(limits, num_gpu_experts=None))
        if not find_problem(most):
            yield f"--gpu-experts {most.num_vram_slots}", "as many as fit"
    for budget in plan.budgets:
        flag = {"VRAM": "vram_bytes", "RAM": "ram_bytes"}[budget.place]
        if budget.source != "free" and not find_problem(lay_out(sizes, hardware, replace(limits, **{flag: None}))):
            have = hardware.gpu.vram_free_bytes if budget.place == "VRAM" else hardware.ram_free_bytes
            yield f"without {budget.source}", f"{gib(have)} of {budget.place} are free"
    if board := _enough_ram(plan, lay_out):
        yield "a machine with more memory", f"{board} GiB of RAM would do"


def _smaller_wishes(plan: Plan, lay_out: LayOut) -> Iterator[tuple[str, Options]]:
    """The longest context that fits, an 8-bit cache (with less context where it must be), no GPU."""
    limits = plan.limits
    small = replace(limits, kv_dtype="q8")
    for flags, base in (("", limits), (" --kv-dtype q8", small)):
        if flags and not find_problem(lay_out(plan.sizes, plan.hardware, base)):
            yield flags.strip(), base
        elif length := _longest_context(plan, base, lay_out):
            yield f"-c {length // 1024}K{flags}", replace(base, context_length=length)
    if plan.is_on_gpu or plan.limits.device not in (None, "cpu"):
        yield "--device cpu", replace(limits, device="cpu")


def _longest_context(plan: Plan, limits: Options, lay_out: LayOut) -> int:
    """The longest context below the asked one that fits, in whole K; 0 where none does."""
    low, high = 0, min(plan.context_length - 1, plan.sizes.config.context_length) // _LEAST_CONTEXT
    while low < high:
        middle = (low + high + 1) // 2
        other = lay_out(plan.sizes, plan.hardware, replace(limits, context_length=middle * _LEAST_CONTEXT))
        low, high = (low, middle - 1) if find_problem(other) else (middle, high)
    return low * _LEAST_CONTEXT


def _enough_ram(plan: Plan, lay_out: LayOut) -> int:
    """GiB of the smallest usual board that would hold everything else as it is; 0 where memory is not what lacks."""
    for board in _BOARDS_GIB:
        total_bytes = board * GIB
        if total_bytes <= plan.hardware.ram_total_bytes:
            continue
        larger = replace(plan.hardware, ram_total_bytes=total_bytes, ram_free_bytes=free_of(total_bytes))
        if not find_problem(lay_out(plan.sizes, larger, replace(plan.limits, ram_bytes=None))):
            return board
    return 0


def _lacking_expert_bytes(plan: Plan, place: Place) -> int:
    """What a cache of experts in memory lacks to be of any use: room for the experts of two tokens."""
    if place != "RAM" or not plan.disk_expert_bytes:
        return 0
    config = plan.sizes.config
    least = _LEAST_TOKENS_CACHED * config.num_moe_layers * config.num_experts_used * plan.sizes.slot_bytes
    return max(0, min(least, plan.sizes.expert_bytes) - plan.ram_expert_bytes)
