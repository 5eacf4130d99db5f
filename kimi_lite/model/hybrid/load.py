"""Builds the hybrid path from a model file: the cache on the device first, then the dense weights, then experts in what
is left.
"""

from collections.abc import Callable

import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import store_sizes
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.heat import heat_path
from kimi_lite.experts.options import TierOptions
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.pages import KVCache, bytes_per_token
from kimi_lite.model.hybrid.experts import HybridOptions
from kimi_lite.model.hybrid.kernels import TritonKernels
from kimi_lite.model.hybrid.transformer import HybridTransformer
from kimi_lite.native.latent_rows import PAGE_TOKENS, row_length
from kimi_lite.options import Options
from kimi_lite.units import gib_apart

KV_STORAGE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8": torch.uint8}
_WORK_BYTES = 1024**3  # the least that a prompt and libraries need beside weights and cache


def load_hybrid(
    store: GGUFStore,
    config: ModelConfig,
    options: Options,
    context_length: int,
    device: str,
    report: Callable[[str, int, int], None],
    tier: TierOptions | None = None,
    recorder: RoutingRecorder | None = None,
) -> tuple[HybridTransformer, KVCache]:
    """Raises KimiLiteError, with need and have, where weights and cache do not fit into the VRAM that is free or
    allowed."""
    streams = GpuStreams(device, options.vram_bytes)
    kv = make_device_cache(store, config, context_length, options.kv_dtype, streams)
    chosen = HybridOptions(
        num_threads=options.num_threads,
        num_gpu_experts=options.num_gpu_experts,
        dense_type=options.dense_type,
        heat_file=heat_path(store.path),
        cache_bias=options.cache_bias,
        tier=tier,
    )
    try:
        return HybridTransformer(store, config, kv, streams, TritonKernels(), chosen, report, recorder), kv
    except torch.OutOfMemoryError as error:
        problem = f"The GPU ran out of memory while the model was loaded: {str(error).splitlines()[0]}"
        raise KimiLiteError(
            problem, "Close what else uses the GPU, or try a shorter context (-c) or --device cpu."
        ) from error


def make_device_cache(
    store: GGUFStore, config: ModelConfig, context_length: int, kv_dtype: str, streams: GpuStreams
) -> KVCache:
    """Pages for one sequence of the whole context, in VRAM."""
    if kv_dtype not in KV_STORAGE:
        raise KimiLiteError(f"There is no cache type {kv_dtype!r}.", f"Try one of {', '.join(KV_STORAGE)}.")
    num_pages = -(-context_length // PAGE_TOKENS)
    token_bytes, dense_bytes = bytes_per_token(config, kv_dtype), store_sizes(store, config).gpu_dense_bytes
    need_bytes, have_bytes = dense_bytes + num_pages * PAGE_TOKENS * token_bytes + _WORK_BYTES, streams.free_bytes()
    if have_bytes is not None and need_bytes > have_bytes:
        need, have = gib_apart(need_bytes, have_bytes)
        fitting = int((have_bytes - dense_bytes - _WORK_BYTES) / token_bytes) // 1024
        hint = f"Try -c {fitting}K, --kv-dtype q8 or --device cpu." if fitting > 0 else "Try --device cpu."
        raise KimiLiteError(
            f"Weights and a context of {context_length:,} tokens need {need} of VRAM; {have} is free.", hint
        )
    shape = (config.num_layers, num_pages, PAGE_TOKENS, row_length(kv_dtype, config.kv_latent_size))
    storage = streams.zeros(shape, KV_STORAGE[kv_dtype])
    return KVCache(config.num_layers, config.kv_latent_size, num_pages, kv_dtype, storage=storage)
