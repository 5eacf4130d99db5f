"""Runs a GGUF file on the hybrid path: with a CPU device standing in as the GPU, or on a CUDA device."""

import os
from pathlib import Path

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.hybrid.experts import HybridOptions
from kimi_lite.model.hybrid.kernels import Kernels, TritonKernels
from kimi_lite.model.hybrid.load import KV_STORAGE
from kimi_lite.model.hybrid.transformer import HybridTransformer
from kimi_lite.native.latent_rows import PAGE_TOKENS, row_length
from tests.model.hybrid.stand_in import StandInKernels
from tests.model.runner import NUM_PAGES, Runner

DEVICE = os.environ.get("KIMI_LITE_TEST_DEVICE", "cpu")


class HybridRunner(Runner):
    """As `tests.model.runner.Runner`, on the hybrid path."""

    def __init__(
        self,
        path: Path,
        kv_dtype: str = "f32",
        kernels: Kernels | None = None,
        dense_type: str = "file",
        recorder: RoutingRecorder | None = None,
        **options: object,
    ) -> None:
        self.store = GGUFStore.open(path)
        self.config = ModelConfig.from_metadata(self.store.metadata)
        streams = GpuStreams(DEVICE)
        shape = (self.config.num_layers, NUM_PAGES, PAGE_TOKENS, row_length(kv_dtype, self.config.kv_latent_size))
        storage = streams.zeros(shape, KV_STORAGE[kv_dtype])
        self.kv = KVCache(self.config.num_layers, self.config.kv_latent_size, NUM_PAGES, kv_dtype, storage=storage)
        chosen = HybridOptions(**{"dense_type": dense_type, "num_threads": 1} | options)
        kernels = kernels or (StandInKernels() if DEVICE == "cpu" else TritonKernels())
        parts = (self.store, self.config, self.kv, streams, kernels)
        self.transformer = HybridTransformer(*parts, chosen, recorder=recorder)
        self.pages = np.array([3, 1, 0, 2, 5, 4, 7, 6, 11, 10, 9, 8], np.int32)
