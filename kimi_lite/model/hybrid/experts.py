"""Puts the tiers of the routed experts together: how much VRAM is left for slots and for prompts, and who computes
what.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import ModelSizes, store_sizes
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.costs import ExpertCosts
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.heat import load_heat
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.experts.options import TierOptions
from kimi_lite.experts.ram import RamSlots
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.experts.store import ExpertStore
from kimi_lite.experts.stream import PromptStream
from kimi_lite.experts.vram import VramSlots
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.host import usable_cores
from kimi_lite.model.cpu.experts import LayerExperts, layer_experts
from kimi_lite.model.hybrid.cpu_experts import CpuExperts
from kimi_lite.model.hybrid.kernels import Kernels
from kimi_lite.model.hybrid.routed import ROW_TOKENS, RoutedExperts
from kimi_lite.model.hybrid.streamed import StreamedExperts
from kimi_lite.model.hybrid.weights import DenseType
from kimi_lite.plan.workspace import PROMPT_CHUNKS, STREAM_EXPERTS, gpu_work_bytes
from kimi_lite.units import gib_apart

_RESERVE_BYTES = 512 * 1024**2  # graphs, libraries, what allocation leaves between pieces
_WORK_SHARE = 0.35  # of what is free, for a prompt's chunk; the rest becomes slots
_STAND_IN_CHUNK = 1024  # where no VRAM limits a chunk


@dataclass(frozen=True, slots=True)
class HybridOptions:
    """None: the program chooses."""

    dense_type: DenseType = "q8_0"
    num_threads: int | None = None  # of the CPU's experts; None: measured
    num_gpu_experts: int | None = None  # slots in VRAM
    chunk_tokens: int | None = None  # longest pass of a prompt
    heat_file: Path | None = None  # read at the start, written at the end
    tier: TierOptions | None = None  # how experts come from the disk; None: all are in RAM
    cache_bias: float = 0.0  # what an expert in VRAM gains in the router's choice
    group_size: int = STREAM_EXPERTS


@dataclass(frozen=True, slots=True)
class VramShares:
    """What becomes of the VRAM that dense weights and cache leave."""

    num_slots: int
    chunk_tokens: int


def divide_vram(sizes: ModelSizes, slot_bytes: int, free_bytes: int | None, options: HybridOptions) -> VramShares:
    """free_bytes: None where nothing limits it. Raises KimiLiteError where not even a short prompt has room."""
    if free_bytes is None:
        return VramShares(options.num_gpu_experts or 0, options.chunk_tokens or _STAND_IN_CHUNK)
    room = free_bytes - _RESERVE_BYTES
    chunks = (options.chunk_tokens,) if options.chunk_tokens else PROMPT_CHUNKS
    fitting = [chunk for chunk in chunks if gpu_work_bytes(sizes, chunk) <= room * _WORK_SHARE] or [chunks[-1]]
    work_bytes = gpu_work_bytes(sizes, fitting[0])
    if work_bytes > room:
        need, have = gib_apart(work_bytes + _RESERVE_BYTES, free_bytes)
        problem = (
            f"A prompt's chunk of {fitting[0]:,} tokens needs {need} of VRAM beside weights and cache; {have} is left"
        )
        raise KimiLiteError(f"{problem}.", "Try a shorter context (-c), --kv-dtype f16, or --device cpu.")
    most = min((room - work_bytes) // slot_bytes if slot_bytes else 0, sizes.num_experts)
    wanted = options.num_gpu_experts
    if wanted is not None and wanted > most:
        raise KimiLiteError(
            f"--gpu-experts {wanted:,}: there is room in VRAM for {most:,}.", f"Try --gpu-experts {most}."
        )
    return VramShares(most if wanted is None else wanted, fitting[0])


def open_experts(
    store: GGUFStore,
    config: ModelConfig,
    streams: GpuStreams,
    kernels: Kernels,
    options: HybridOptions,
    slot_table: torch.Tensor,
    report: Callable[[str, int, int], None],
    recorder: RoutingRecorder | None = None,
) -> tuple[RoutedExperts | None, int]:
    """The routed experts (None for a model without any) and the longest pass of a prompt in tokens. slot_table: int32
    (layers, experts) on the device, where routers look which experts have a slot in VRAM."""
    index = ExpertIndex.find(store, config)
    streams.give_back()  # loading left pieces; the slots want one
    shares = divide_vram(store_sizes(store, config), index.vram_slot_bytes, streams.free_bytes(), options)
    if not index.layers:
        return None, shares.chunk_tokens
    counts, tier = thread_counts(options.num_threads), options.tier
    layers = {layer: layer_experts(store, config, layer)[0] for layer in index.layers}
    ram = _open_ram(index, layers, config.num_experts_used, tier) if tier else None
    experts = ExpertStore(index, ram)
    cpu = CpuExperts(layers, config, streams, min(ROW_TOKENS, shares.chunk_tokens), counts, ram)
    slots = VramSlots(streams, experts, shares.num_slots, slot_table)
    stream = PromptStream(streams, experts, min(options.group_size, config.num_experts))
    costs = ExpertCosts()
    streamed = StreamedExperts(streams, kernels, index, slots, cpu, stream, costs)
    heat = load_heat(options.heat_file, slots.policy.export_heat().shape) if options.heat_file else None
    if ram:
        on_load = partial(report, "reading experts") if tier.is_loading_all else None
        ram.fill(heat, on_load, tier.is_locked)
    if heat is not None:
        slots.policy.import_heat(heat)
        slots.fill(partial(report, "bringing hot experts"))
    return RoutedExperts(
        streams, kernels, experts, slots, cpu, streamed, costs, counts[-1], options.heat_file, recorder
    ), shares.chunk_tokens


def _open_ram(index: ExpertIndex, layers: dict[int, LayerExperts], num_choices: int, tier: TierOptions) -> RamSlots:
    """The slots in RAM for experts that the disk brings."""
    tables = {layer: experts.table for layer, experts in layers.items()}
    return RamSlots(index, tables, tier.budget_bytes, num_choices, tier.num_readers, tier.is_direct)


def thread_counts(num_threads: int | None) -> list[int]:
    """Ascending: what the user said, or all cores and a few fewer, because the GPU's driver needs one now and then."""
    if num_threads is not None:
        return [num_threads]
    most = usable_cores().num_usable
    return sorted({max(1, count) for count in (most, most - 1, most - 2, most * 3 // 4)})
