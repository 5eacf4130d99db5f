"""Runs a GGUF file on the hybrid path: with a CPU device standing in as the GPU, or on a CUDA device."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import store_sizes
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.machine import Hardware
from kimi_lite.model.hybrid.kernels import Kernels, TritonKernels
from kimi_lite.model.hybrid.load import make_device_cache
from kimi_lite.model.hybrid.parts import HybridParts
from kimi_lite.model.hybrid.transformer import HybridTransformer
from kimi_lite.options import Options
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.types import GpuPart, Plan
from tests.model import runner
from tests.model.hybrid.lazy_device import LazyDevice, LazyKernels
from tests.model.hybrid.stand_in import GPU, StandInKernels
from tests.model.runner import NUM_PAGES, Runner

DEVICE = os.environ.get("KIMI_LITE_TEST_DEVICE", "cpu")
CHUNK_TOKENS = 1024


def plan_for(store: GGUFStore, config: ModelConfig, options: Options, **numbers: int) -> Plan:
    """The plan for a large machine, with other numbers where the test says so."""
    hardware = Hardware("a CPU", 8, "avx2", 256 << 30, 250 << 30, gpu=GPU)
    return replace(make_plan(store_sizes(store, config), hardware, options).require(), **numbers)


def shared(plan: Plan, gpu_layers: Sequence[int]) -> Plan:
    """The same plan with so many layers on each of several GPUs, and slots by their number."""
    config, stops = plan.sizes.config, np.cumsum(gpu_layers).tolist()
    assert stops[-1] == config.num_layers, (gpu_layers, config.num_layers)
    num_routed = [max(0, stop - config.num_dense_layers) for stop in stops]
    counts = np.diff([plan.num_vram_slots * count // num_routed[-1] for count in num_routed], prepend=0).tolist()
    layers = [range(stop - count, stop) for stop, count in zip(stops, gpu_layers, strict=True)]
    return replace(plan, gpu_parts=tuple(GpuPart(*part) for part in zip(layers, counts, strict=True)))


class HybridRunner(Runner):
    """As `tests.model.runner.Runner`, on the hybrid path."""

    def __init__(
        self,
        path: Path,
        kv_dtype: str = "f32",
        kernels: Kernels | None = None,
        streams: GpuStreams | None = None,
        dense_type: str = "file",
        recorder: RoutingRecorder | None = None,
        heat_file: Path | None = None,
        num_gpu_experts: int = 0,
        ram_expert_bytes: int | None = None,
        group_size: int = 8,
        gpu_layers: Sequence[int] = (),
        **options: object,
    ) -> None:
        """ram_expert_bytes: for experts, which do not all fit; None: they do. group_size: of a prompt's stream.
        gpu_layers: so many on each of several devices, which share the slots."""
        self.store = GGUFStore.open(path)
        self.config = ModelConfig.from_metadata(self.store.metadata)
        streams = streams or GpuStreams(DEVICE)
        chosen = {"num_threads": 1, "kv_dtype": kv_dtype, "dense_type": dense_type, "num_gpu_experts": num_gpu_experts}
        tier = {} if ram_expert_bytes is None else {"ram_expert_bytes": ram_expert_bytes, "disk_expert_bytes": 1}
        plan = plan_for(
            self.store,
            self.config,
            Options(**chosen | options),
            num_cache_pages=NUM_PAGES,
            num_spill_pages=0,
            prompt_chunk_tokens=CHUNK_TOKENS,
            **tier,
        )
        if gpu_layers:
            plan = shared(plan, gpu_layers)
        gpus = [streams, *(GpuStreams(DEVICE) for _ in gpu_layers[1:])]
        self.kv = make_device_cache(self.config, plan, gpus)
        make_kernels = StandInKernels if DEVICE == "cpu" else TritonKernels
        self.watched = None if recorder else runner.make_recorder(self.config)
        self.pages = np.array([3, 1, 0, 2, 5, 4, 7, 6, 11, 10, 9, 8], np.int32)
        with patch("kimi_lite.model.hybrid.experts.STREAM_EXPERTS", group_size):
            recorder = recorder or self.watched
            if gpu_layers:
                self.transformer = HybridParts.open(
                    self.store, self.config, self.kv, gpus, make_kernels, plan, heat_file, recorder=recorder
                )
                return
            kernels = kernels or make_kernels()
            self.transformer = HybridTransformer(
                self.store, self.config, self.kv, streams, kernels, plan, heat_file, recorder=recorder
            )


class LazyRunner(HybridRunner):
    """The same on a `LazyDevice` of this policy and seed.

    Tensors of the device can be made as long as the runner is open, and on its thread only.
    """

    def __init__(
        self, path: Path, policy: str = "late", seed: int = 0, device: LazyDevice | None = None, **options: object
    ) -> None:
        """device: one with faults to come, instead of a new one."""
        self.device = device or LazyDevice(policy, seed)
        with ExitStack() as stack:
            stack.enter_context(self.device)
            kernels = LazyKernels(self.device, StandInKernels())
            super().__init__(path, streams=self.device, kernels=kernels, **options)
            self._stack = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        with self._stack:
            super().__exit__()
            assert any(error) or self.device.failure or not self.device.pending, (
                "work goes on in memory that may be freed now"
            )
