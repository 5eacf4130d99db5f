"""The plan of a model that is being loaded, refused before a weight is read where it cannot be; and the disk tier that
follows from it."""

from dataclasses import replace

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import store_sizes
from kimi_lite.experts.heat import heat_path
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.experts.options import TierOptions
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.probe import Gpu, probe
from kimi_lite.options import Options
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.types import Plan


def plan_load(store: GGUFStore, config: ModelConfig, options: Options, gpu: Gpu | None = None) -> Plan:
    """`gpu`: the one that will be used, None for the CPU path. Raises KimiLiteError with need, have and what would
    do."""
    hardware = replace(probe(store.path), gpu=gpu)
    on_path = options if gpu else replace(options, device="cpu")
    return make_plan(store_sizes(store, config), hardware, on_path).require()


def choose_tier(store: GGUFStore, config: ModelConfig, plan: Plan, options: Options) -> TierOptions | None:
    """How routed experts that do not fit into RAM come from the disk, or how all are loaded; None where they are
    mapped."""
    if options.maps_beyond_ram:
        return None
    if plan.disk_expert_bytes:
        num_bytes, is_loading_all = plan.ram_expert_bytes, False
    elif options.loading == "map" or plan.is_on_gpu or not config.num_moe_layers:
        return None
    else:
        num_bytes, is_loading_all = ExpertIndex.find(store, config).ram_bytes, True
    return TierOptions(
        num_bytes,
        cache_bias=0.0 if is_loading_all else options.cache_bias,
        num_readers=options.num_readers,
        is_direct=options.is_reading_direct,
        heat_path=heat_path(store.path) if options.keeps_heat and not is_loading_all else None,
        is_loading_all=is_loading_all,
        is_locked=options.loading == "lock",
    )
