"""The plan of a model that is being loaded, refused before a weight is read where it cannot be; and what of it decides
which options have an effect."""

from collections.abc import Sequence
from dataclasses import replace

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import store_sizes
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.machine import Gpu
from kimi_lite.hardware.probe import probe
from kimi_lite.options import Options, Situation
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.subject import vision_of
from kimi_lite.plan.types import Plan

WARM_SHARE = 0.9  # of the free memory that a model's files may fill before they are read there


def plan_load(store: GGUFStore, config: ModelConfig, options: Options, gpus: Sequence[Gpu | None] = (None,)) -> Plan:
    """`gpus`: those that will be used, the first layers' first; None for the CPU path. Raises KimiLiteError with need,
    have and what would do."""
    first, *others = gpus
    hardware = replace(probe(store.path), gpu=first, more_gpus=tuple(others))
    on_path = options if first else replace(options, device="cpu")
    seen, tower = (0, None) if options.vision == "off" else vision_of(store, config, options.mmproj)
    return make_plan(store_sizes(store, config, seen, tower), hardware, on_path).require()


def situation_of(plan: Plan, options: Options) -> Situation:
    """What of the plan decides which options have an effect; of a model that runs here."""
    num_experts, has_disk = plan.sizes.num_experts, plan.has_ram_slots
    return Situation(
        is_on_gpu=plan.is_on_gpu,
        has_experts=num_experts > 0,
        has_ram_experts=plan.ram_expert_bytes > 0,
        is_from_disk=has_disk,
        is_split=0 < plan.num_vram_slots < num_experts if plan.is_on_gpu else has_disk,
        is_ram_limited=any(budget.source == "--ram" for budget in plan.budgets),
        has_nodes=plan.hardware.has_nodes and plan.num_threads > 1,
        is_warmed=options.ram_bytes is None and plan.sizes.total_bytes <= WARM_SHARE * plan.hardware.ram_free_bytes,
    )
