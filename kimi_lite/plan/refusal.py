"""Why a plan cannot be, and what would do instead: every remedy has been planned for this very situation and runs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

from kimi_lite.hardware.machine import free_of
from kimi_lite.options import Options
from kimi_lite.plan.types import EXPERTS, Place, Plan, PlanInputs, Remedy
from kimi_lite.units import GIB, gib, gib_apart

LayOut = Callable[[PlanInputs], Plan]
_LEAST_TOKENS_CACHED = 2  # tokens whose experts a cache of experts must hold, or it would never help
_LEAST_CONTEXT = 1024
_BOARDS_GIB = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # as memory is sold
_MOST_FLAGS = 4  # remedies by flags, best first


def find_problem(plan: Plan) -> str:
    """Why the plan cannot be, with need and have; empty where it can."""
    asked, model, limits = plan.context_length, plan.sizes.config.context_length, plan.limits
    if limits.device not in (None, "cpu") and not plan.hardware.gpu:
        return f"--device {limits.device} is asked for, and there is no GPU that can be used."
    if asked > model:
        return f"A context of {asked:,} tokens is wanted; the model is made for {model:,}."
    for budget in plan.budgets:
        lacking_bytes = _lacking_expert_bytes(plan, budget.place)
        need_bytes = plan.budget_bytes(budget) + lacking_bytes
        if need_bytes > budget.have_bytes:
            need, have = gib_apart(need_bytes, budget.have_bytes)
            parts = [
                f"{row.part} {gib(row.num_bytes)}"
                for row in plan.rows
                if (row.place, row.gpu) == (budget.place, budget.gpu) and row.part != EXPERTS
            ]
            if budget.place == "RAM" and (experts_bytes := plan.ram_expert_bytes + lacking_bytes):
                parts.append(f"{EXPERTS} {'at least ' if lacking_bytes else ''}{gib(experts_bytes)}")
            source = f"{have} are free" if budget.source == "free" else f"{budget.source} allows {have}"
            place = plan.name_of(budget.place, budget.gpu)
            return f"At least {need} of {place} are needed ({', '.join(parts)}); {source}."
    if lacking_bytes := _lacking_disk_bytes(plan):
        disk = plan.hardware.disk
        need, have = gib_apart(disk.free_bytes + lacking_bytes, disk.free_bytes)
        return f"The file needs {need} of disk; {have} are free at {disk.path}."
    return ""


def find_remedies(plan: Plan, lay_out: LayOut) -> Iterator[Remedy]:
    """Flags first, the least change first; then what no flag can do."""
    tried = _Trial(plan, lay_out)
    here = [*islice(tried.by_flags(), _MOST_FLAGS), *tried.without_limits()]
    yield from here
    yield from tried.with_more_ram(is_last_hope=not here)
    yield from tried.with_more_disk()


class _Trial:
    """Plans other wishes and other machines in place of a plan that cannot be."""

    def __init__(self, plan: Plan, lay_out: LayOut) -> None:
        self._plan, self._lay_out, self._situation = plan, lay_out, plan.situation

    def by_flags(self) -> Iterator[Remedy]:
        """Fewer slots, an 8-bit cache, the CPU, and these together, each with the longest context that fits."""
        seen = set()
        for flags, limits in self._wishes():
            length = self._longest_context(limits)
            if length and length < self._plan.context_length:
                flags += f" -c {length // 1024}K" if length % 1024 == 0 else f" -c {length}"
                limits = replace(limits, context_length=length)
            if length and flags.strip() and flags not in seen:
                seen.add(flags)
                yield Remedy(flags.strip(), _effect(self._run(limits)))

    def without_limits(self) -> Iterator[Remedy]:
        """Leaving out --vram or --ram, or both, where that is what lacks."""
        fields = {"--vram": "vram_bytes", "--ram": "ram_bytes"}
        limiting = list(dict.fromkeys(budget.source for budget in self._plan.budgets if budget.source != "free"))
        if self._plan.limits.device is None and len(self._plan.gpu_parts) > 1:
            limiting = [flag for flag in limiting if flag != "--vram"]  # it says that there are several GPUs
        hardware = self._plan.hardware
        free = {"--vram": sum(gpu.vram_free_bytes for gpu in hardware.gpus), "--ram": hardware.ram_free_bytes}
        for flags in [*([flag] for flag in limiting), limiting]:
            if flags and self._run(replace(self._plan.limits, **dict.fromkeys((fields[flag] for flag in flags), None))):
                effect = " and ".join(f"{gib(free[flag])} of {flag[2:].upper()} are free" for flag in flags)
                yield Remedy("", effect, f"without {' and '.join(flags)}")
                return

    def with_more_ram(self, is_last_hope: bool) -> Iterator[Remedy]:
        """The smallest usual amount of RAM that would hold everything else as it is; where nothing else helps, also
        with flags."""
        limits = replace(self._plan.limits, ram_bytes=None)
        context = min(self._plan.context_length, self._plan.sizes.config.context_length)
        on_cpu = replace(limits, device="cpu", context_length=context)
        changes = [("", limits), (" and --device cpu", on_cpu)]
        changes.append((" and --device cpu --kv-dtype q8", replace(on_cpu, kv_dtype="q8")))
        for flags, changed in changes if is_last_hope else changes[:1]:
            if context < self._plan.context_length and flags:
                flags += f" -c {context}"
            if board := self._enough_ram(changed):
                yield Remedy("", f"{board} GiB of RAM would do", f"a machine with more memory{flags}")
                return

    def _enough_ram(self, limits: Options) -> int:
        """GiB as memory is sold; 0 where none is enough."""
        hardware = replace(self._plan.hardware, is_described=True)  # its disk is another, too
        for total_bytes in (board * GIB for board in _BOARDS_GIB if board * GIB > hardware.ram_total_bytes):
            larger = replace(hardware, ram_total_bytes=total_bytes, ram_free_bytes=free_of(total_bytes))
            if not find_problem(self._lay_out(replace(self._situation, hardware=larger, limits=limits))):
                return total_bytes // GIB
        return 0

    def with_more_disk(self) -> Iterator[Remedy]:
        """Where the disk is what lacks, and nothing else."""
        lacking_bytes = _lacking_disk_bytes(self._plan)
        if lacking_bytes and not find_problem(self._lay_out(replace(self._situation, file_bytes=0))):
            yield Remedy("", f"{gib(lacking_bytes)} more must be free for the file", "a folder on a larger disk")

    def _wishes(self) -> Iterator[tuple[str, Options]]:
        """Flags and what they make of the limits: the least change first."""
        limits = self._plan.limits
        most = self._lay_out(replace(self._situation, limits=replace(limits, num_gpu_experts=None))).num_vram_slots
        if limits.num_gpu_experts and most < limits.num_gpu_experts:
            yield f"--gpu-experts {most}", replace(limits, num_gpu_experts=most)
        if limits.dense_type != "auto" and self._plan.is_on_gpu:
            yield "--dense auto", replace(limits, dense_type="auto")
        caches = [("", limits.kv_dtype)] + [(" --kv-dtype q8", "q8")] * (limits.kv_dtype != "q8")
        devices = [("", limits.device)]
        if self._plan.is_on_gpu or limits.device not in (None, "cpu"):
            devices.append(("--device cpu", "cpu"))
        for device_flag, device in devices:
            for cache_flag, kv_dtype in caches:
                yield f"{device_flag}{cache_flag}", replace(limits, device=device, kv_dtype=kv_dtype)

    def _run(self, limits: Options) -> Plan | None:
        """The plan with these wishes, where it can be."""
        plan = self._lay_out(replace(self._situation, limits=limits))
        return None if find_problem(plan) else plan

    def _longest_context(self, limits: Options) -> int:
        """Tokens of the longest context, at most what was asked, that fits: in whole K, or all that the model can have;
        0 where none does."""
        model = self._plan.sizes.config.context_length
        most = min(self._plan.context_length, model)
        if self._run(replace(limits, context_length=most)):
            return most
        low, high = 0, (most - 1) // _LEAST_CONTEXT
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._run(replace(limits, context_length=middle * _LEAST_CONTEXT))
            low, high = (middle, high) if fits else (low, middle - 1)
        return low * _LEAST_CONTEXT


def _effect(plan: Plan) -> str:
    where = f", with {gib(plan.disk_expert_bytes)} of experts on disk" if plan.disk_expert_bytes else ""
    return f"{plan.decode.expected_tok_s:.1f} tokens/s expected{where}"


def _lacking_expert_bytes(plan: Plan, place: Place) -> int:
    """What a cache of experts in RAM lacks to be of any use: the experts of two tokens."""
    if place != "RAM" or not plan.disk_expert_bytes:
        return 0
    config = plan.sizes.config
    least = _LEAST_TOKENS_CACHED * config.num_moe_layers * config.num_experts_used * plan.sizes.slot_bytes
    return max(0, min(least, plan.ram_expert_bytes + plan.disk_expert_bytes) - plan.ram_expert_bytes)


def _lacking_disk_bytes(plan: Plan) -> int:
    """Of the disk where the file is still to be written; a described machine's disk is not known."""
    disk = plan.hardware.disk
    return max(0, plan.situation.file_bytes - disk.free_bytes) if disk and not plan.hardware.is_described else 0
