"""Puts the routed experts of the hybrid path together, as the plan divides VRAM and RAM among them."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.costs import ExpertCosts
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.heat import load_heat
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.experts.nodes import placed_groups
from kimi_lite.experts.ram import heat_shape, open_ram
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.experts.store import ExpertStore
from kimi_lite.experts.stream import COPY_THREADS, PromptStream
from kimi_lite.experts.vram import VramSlots
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.host import usable_cores
from kimi_lite.model.cpu.experts import layer_experts
from kimi_lite.model.hybrid.cpu_experts import CpuExperts
from kimi_lite.model.hybrid.kernels import Kernels
from kimi_lite.model.hybrid.routed import RoutedExperts
from kimi_lite.model.hybrid.streamed import StreamedExperts
from kimi_lite.native.cpu.placement import place_threads
from kimi_lite.plan.types import Plan
from kimi_lite.plan.workspace import ROW_TOKENS, STREAM_EXPERTS, gpu_work_bytes
from kimi_lite.units import gib_apart


def open_experts(
    store: GGUFStore,
    config: ModelConfig,
    streams: GpuStreams,
    kernels: Kernels,
    plan: Plan,
    slot_table: torch.Tensor,
    report: Callable[[str, int, int], None],
    heat_file: Path | None = None,
    recorder: RoutingRecorder | None = None,
    among: range | None = None,
) -> RoutedExperts | None:
    """The routed experts with the slots, the chunk and the RAM that `plan` gives them; None for a model without any.
    among: those of these layers only.

    slot_table: int32 (layers, experts) on the device, where routers look which experts have a slot in VRAM. heat_file:
    read now, written at the end. Raises KimiLiteError where less VRAM is free than the plan was made for.
    """
    index, options = ExpertIndex.find(store, config, among), plan.limits
    streams.give_back()  # loading left pieces; the slots want one
    _require_vram(index, streams, plan)
    if not index.layers:
        return None
    layers = {layer: layer_experts(store, config, layer)[0] for layer in index.layers}
    heat = load_heat(heat_file, heat_shape(index)) if heat_file else None
    if heat is not None:
        heat[:, [layer for layer in range(index.num_layers) if layer not in index.layers]] = 0  # another GPU's
    tables = {layer: experts.table for layer, experts in layers.items()}
    counts, group_size, num_slots = (
        thread_counts(plan),
        min(STREAM_EXPERTS, config.num_experts),
        plan.num_vram_slots,
    )
    with ExitStack() as opened:  # what has threads ends them where what comes next fails
        ram = None
        if plan.ram_expert_bytes or plan.disk_expert_bytes:  # else VRAM has a slot for each
            on_load = partial(report, "reading experts")
            groups = placed_groups(place_threads(counts[-1]) if options.numa != "off" else ())
            ram = open_ram(
                index, tables, config.num_experts_used, options, plan.ram_budget_bytes, heat, on_load, groups
            )
        experts, costs = ExpertStore(index, ram), ExpertCosts()
        opened.callback(experts.close)
        num_rows, is_divided = min(ROW_TOKENS, plan.prompt_chunk_tokens), options.numa != "off"
        cpu = CpuExperts(layers, config, streams, num_rows, counts, ram, is_divided)
        opened.callback(cpu.close)
        slots = VramSlots(streams, experts, num_slots, slot_table, num_stream_slots=2 * group_size)
        opened.callback(slots.close)
        num_readers = options.num_readers if plan.has_ram_slots else COPY_THREADS
        own_slots = range(num_slots, num_slots + 2 * group_size)
        stream = PromptStream(streams, experts, slots.slots, own_slots, group_size, num_readers)
        opened.callback(stream.close)
        streamed = StreamedExperts(
            streams, kernels, index, slots, cpu, stream, costs, ram, is_reproducible=options.is_reproducible
        )
        if heat is not None:
            slots.policy.import_heat(heat)
        slots.fill(partial(report, "bringing experts into VRAM"))
        is_helped = cpu.holds_all and not slots.holds_all  # by the CPU, with experts that it need not wait for
        num_deferred = options.num_deferred_experts if is_helped else 0
        opened.pop_all()  # from now on the routed experts' own `close` does it
    return RoutedExperts(
        streams,
        kernels,
        experts,
        slots,
        cpu,
        streamed,
        costs,
        counts[-1],
        heat_file,
        recorder,
        is_reproducible=options.is_reproducible,
        num_deferred=num_deferred,
    )


def _require_vram(index: ExpertIndex, streams: GpuStreams, plan: Plan) -> None:
    """The plan was made before the weights were loaded; other programs may have taken VRAM since."""
    have_bytes = streams.free_bytes()
    work_bytes = gpu_work_bytes(plan.sizes, plan.prompt_chunk_tokens, plan.context_length)
    need_bytes = work_bytes + plan.num_vram_slots * index.vram_slot_bytes
    if have_bytes is None or need_bytes <= have_bytes:
        return
    need, have = gib_apart(need_bytes, have_bytes)
    fitting = (have_bytes - work_bytes) // index.vram_slot_bytes if index.layers else -1
    raise KimiLiteError(
        f"{plan.num_vram_slots:,} experts and a prompt's chunk of {plan.prompt_chunk_tokens:,} tokens need {need} of "
        f"VRAM; behind weights and cache {have} are free.",
        f"Close what else uses the GPU, or try {f'--gpu-experts {fitting}' if fitting >= 0 else '--device cpu'}.",
    )


def thread_counts(plan: Plan) -> list[int]:
    """Ascending: what the user said, as far as there are hardware threads, or all cores and a few fewer,
    because the GPU's driver needs one now and then."""
    if plan.limits.num_threads is not None:
        return [plan.num_threads]
    most = usable_cores().num_usable
    return sorted({max(1, count) for count in (most, most - 1, most - 2, most * 3 // 4)})
