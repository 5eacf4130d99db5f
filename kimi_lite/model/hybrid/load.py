"""Builds the hybrid path from a model file as the plan has it: the cache on the device first, then the dense weights,
then the routed experts' slots."""

from collections.abc import Callable, Sequence

import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.gpu_failure import told
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.heat import heat_path
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.disk import PrefixStore
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.hybrid.kernels import TritonKernels
from kimi_lite.model.hybrid.parts import HybridParts, SplitPages
from kimi_lite.model.hybrid.transformer import HybridTransformer
from kimi_lite.native.latent_rows import PAGE_TOKENS, row_length
from kimi_lite.plan.types import Plan

KV_STORAGE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8": torch.uint8}


def load_hybrid(
    store: GGUFStore,
    config: ModelConfig,
    plan: Plan,
    device: str,
    report: Callable[[str, int, int], None],
    prefixes: PrefixStore | None = None,
    recorder: RoutingRecorder | None = None,
) -> tuple[HybridTransformer | HybridParts, KVCache]:
    """device: a torch device, or several with commas between, one for each of the plan's GPUs.

    Raises KimiLiteError where less VRAM is free than the plan was made for, or where the GPU fails."""
    heat_file = heat_path(store.path) if plan.limits.keeps_heat else None
    fewer = f", allow fewer experts there (--gpu-experts {plan.num_vram_slots * 3 // 4})" if plan.num_vram_slots else ""
    remedy = f"Close what else uses the GPU{fewer}, or try a shorter context (-c) or --device cpu."
    with told("while the model was loaded", remedy):
        names = device.split(",")[: len(plan.gpu_parts)]
        gpus = [GpuStreams(name, plan.limits.vram_limit(number)) for number, name in enumerate(names)]
        kv = make_device_cache(config, plan, gpus, prefixes)
        if len(gpus) > 1:
            parts = HybridParts.open(store, config, kv, gpus, TritonKernels, plan, heat_file, report, recorder)
            return parts, kv
        return HybridTransformer(store, config, kv, gpus[0], TritonKernels(), plan, heat_file, report, recorder), kv


def make_device_cache(
    config: ModelConfig, plan: Plan, gpus: Sequence[GpuStreams], prefixes: PrefixStore | None = None
) -> KVCache:
    """The plan's pages, on the GPU of their layer, and in RAM behind it."""
    kv_dtype, num_pages = plan.limits.kv_dtype, plan.num_cache_pages
    shape = (num_pages, PAGE_TOKENS, row_length(kv_dtype, config.kv_latent_size))
    tensors = [
        streams.zeros((len(part.layers), *shape), KV_STORAGE[kv_dtype])
        for streams, part in zip(gpus, plan.gpu_parts, strict=True)
    ]
    return KVCache(
        config.num_layers,
        config.kv_latent_size,
        num_pages,
        kv_dtype,
        storage=tensors[0] if len(tensors) == 1 else SplitPages(tensors),
        num_host_pages=plan.num_spill_pages,
        prefixes=prefixes,
    )
