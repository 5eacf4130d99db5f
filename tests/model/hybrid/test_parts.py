"""The pieces of the hybrid path: dense weights on the device, what the plan gives, steps,
adaptation."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.engine import device
from kimi_lite.engine.device import choose_device
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.model.hybrid import attention as attention_module
from kimi_lite.model.hybrid.attention import heads_at_a_time, latent_values
from kimi_lite.model.hybrid.decode import Captured, pages_for, rows_for
from kimi_lite.model.hybrid.experts import thread_counts
from kimi_lite.model.hybrid.load import make_device_cache
from kimi_lite.model.hybrid.step import StepMaker
from kimi_lite.model.hybrid.transformer import HybridTransformer
from kimi_lite.model.hybrid.weights import DenseWeights
from kimi_lite.native.gpu import support
from kimi_lite.options import Options
from kimi_lite.plan.workspace import STREAM_EXPERTS, gpu_work_bytes
from tests.model.hybrid.runner import plan_for
from tests.model.hybrid.stand_in import StandInKernels
from tests.tiny import write_tiny_gguf


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    types = {"_exps": "TQ1_0", "ffn_down_exps": "Q4_K", "attn_output": "Q4_0"}
    path = tmp_path_factory.mktemp("parts") / "tiny.gguf"
    return GGUFStore.open(write_tiny_gguf(path, np.random.default_rng(0), types=types, expert_feed_forward_size=256))


@pytest.fixture(scope="module")
def config(store):
    return ModelConfig.from_metadata(store.metadata)


def test_a_router_is_never_rounded(store, tmp_path):
    """Float32 stays, unless bfloat16 says exactly the same."""
    streams, kernels = GpuStreams("cpu"), StandInKernels()
    matrix = DenseWeights(store, streams, kernels, "q8_0").exact_matrix("blk.1.ffn_gate_inp.weight")
    assert matrix.layout_name == "F32"
    path = write_tiny_gguf(tmp_path / "t.gguf", np.random.default_rng(2), types={"ffn_gate_inp": "BF16"})
    assert (
        DenseWeights(GGUFStore.open(path), streams, kernels, "q8_0")
        .exact_matrix("blk.1.ffn_gate_inp.weight")
        .layout_name
        == "BF16"
    )


def test_heads_at_a_time_bounds_memory(config):
    assert heads_at_a_time(config, 10, 2) == config.num_heads
    assert heads_at_a_time(config, 10**9, 2) == 1


def test_latents_in_eight_bits(monkeypatch):
    """Codes times the scale of their 32, the last group shorter."""
    rng = np.random.default_rng(3)
    codes, scales = rng.integers(-127, 128, (4, 80), np.int8), rng.random((4, 3)).astype(np.float16)
    rows = torch.from_numpy(np.concatenate([codes.view(np.uint8), scales.view(np.uint8)], axis=1))
    want = codes * np.repeat(scales.astype(np.float32), 32, axis=1)[:, :80]
    assert np.array_equal(latent_values(rows, 80, torch.float32).numpy(), want)
    monkeypatch.setattr(attention_module, "_LATENT_ROWS", 3)  # the last piece is shorter
    assert np.array_equal(latent_values(rows, 80, torch.float32).numpy(), want)


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "bf16", "q8"])
def test_cache_on_the_device(store, config, kv_dtype):
    """For as many sequences as the options say, with the plan's pages in RAM behind it."""
    plan = plan_for(store, config, Options(context_length=200, num_sequences=3, kv_dtype=kv_dtype))
    kv = make_device_cache(config, plan, [GpuStreams("cpu")])
    assert kv.num_pages == 3 * 4 and isinstance(kv.storage, torch.Tensor) and kv.host.num_pages == plan.num_spill_pages
    kv = make_device_cache(config, replace(plan, num_cache_pages=7, num_spill_pages=0), [GpuStreams("cpu")])
    assert kv.num_pages == 7 and kv.host is None


class SmallGpu(GpuStreams):
    """As if a GPU had this much memory."""

    def __init__(self, free_bytes: int) -> None:
        super().__init__("cpu")
        self._free_bytes = free_bytes

    def free_bytes(self) -> int:
        return self._free_bytes


def open_with(store, config, plan, streams):
    kv = make_device_cache(config, plan, [streams])
    return HybridTransformer(store, config, kv, streams, StandInKernels(), plan)


def test_no_more_threads_start_than_the_plan_says(store, config):
    """More than there are hardware threads would take turns at every barrier."""
    plan = plan_for(store, config, Options(context_length=128, num_threads=64))
    assert thread_counts(replace(plan, num_threads=3)) == [3]
    model = open_with(store, config, replace(plan, num_threads=2), GpuStreams("cpu"))
    assert (model.experts.num_threads, model.counters()["expert_threads"]) == (2, 2)
    model.close()


def test_what_is_allocated_is_what_the_plan_says(store, config):
    """Slots in VRAM, a prompt's chunk, slots in RAM: another plan, other allocations."""
    index = ExpertIndex.find(store, config)
    plan = plan_for(store, config, Options(context_length=128, num_threads=1))
    for num_slots, chunk, num_ram_slots in ((3, 512, 10), (9, 2048, 14)):
        numbers = {"num_vram_slots": num_slots, "prompt_chunk_tokens": chunk, "disk_expert_bytes": 1}
        ram_bytes = num_ram_slots * index.ram_bytes // (index.num_experts * len(index.layers))
        model = open_with(store, config, replace(plan, ram_expert_bytes=ram_bytes, **numbers), GpuStreams("cpu"))
        try:
            num_rows = num_slots + 2 * STREAM_EXPERTS  # those of a prompt's stream lie behind the cache's
            assert tuple(model.experts.slots.slots.shape) == (num_rows, index.vram_slot_bytes)
            assert (model.max_batch_tokens, model.experts.cpu.capacity) == (chunk, 512)
            counters = model.counters()
            assert (counters["gpu_expert_slots"], counters["expert_slots"]) == (num_slots, num_ram_slots)
        finally:
            model.close()
    model = open_with(store, config, plan, GpuStreams("cpu"))
    assert model.counters()["gpu_expert_slots"] == plan.num_vram_slots == 16 and model.experts.store.ram is None
    model.close()


def test_vram_that_others_took_since_the_plan_is_a_sentence(store, config):
    """The remedy is what fits now: it is tried."""
    plan = plan_for(store, config, Options(context_length=128, num_threads=1))
    index = ExpertIndex.find(store, config)
    work_bytes = gpu_work_bytes(plan.sizes, plan.prompt_chunk_tokens, plan.context_length)
    free = SmallGpu(work_bytes + 5 * index.vram_slot_bytes + 1)
    with pytest.raises(KimiLiteError, match=r"16 experts and a prompt's chunk of 8,192 tokens need") as caught:
        open_with(store, config, plan, free)
    assert "--gpu-experts 5." in caught.value.hint
    open_with(store, config, replace(plan, num_vram_slots=5), free).close()
    with pytest.raises(KimiLiteError) as caught:
        open_with(store, config, plan, SmallGpu(work_bytes // 2))
    assert "--device cpu" in caught.value.hint


def test_shapes_of_decode_steps():
    assert [rows_for(n) for n in (1, 2, 3, 5, 16)] == [1, 2, 4, 8, 16]
    assert [pages_for(n) for n in (1, 16, 17, 512)] == [16, 16, 32, 512]


class FakeGraphs(GpuStreams):
    """Captures as CUDA does: nothing runs until the replay."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.is_cuda = True
        self.num_captures = self.num_replays = 0

    def graph_memory(self) -> None:
        return None

    def capture(self, run: Callable[[], None], memory: None) -> "FakeGraphs":
        self.num_captures += 1
        self._run = run
        return self

    def replay(self) -> None:
        self.num_replays += 1
        self._run()


def test_work_runs_once_is_captured_once_and_replayed():
    ran, graphs = [], FakeGraphs()
    work = Captured(lambda: ran.append(1), graphs)
    is_steady = []
    for _ in range(4):
        work()
        is_steady.append(work.is_steady)
    assert (len(ran), graphs.num_captures, graphs.num_replays) == (4, 1, 3)
    assert is_steady == [False, False, True, True]
    plain = Captured(lambda: ran.append(1), GpuStreams("cpu"))
    plain()
    assert not plain.is_steady
    plain()
    assert plain.is_steady and len(ran) == 6


def test_steps_are_padded_with_rows_that_do_nothing(config):
    pages = np.array([4, 2], np.int32)
    batch = Batch(np.array([7], np.int32), np.array([70], np.int32), np.ones(1, bool), (SequenceSlice(0, 1, pages),))
    step = StepMaker(config, GpuStreams("cpu")).host_step(batch, num_rows=4, num_pages=16)
    assert step.cache_rows.tolist() == [2 * 64 + 6, -1, -1, -1] and step.lengths.tolist() == [71, 0, 0, 0]
    assert step.page_table.shape == (4, 16) and step.page_table[0, :2].tolist() == [4, 2]


def test_devices_that_cannot_be_had():
    assert choose_device("cpu") == "cpu"
    for name in ("tpu", "cuda:", "cuda:x", "cpu:0"):
        with pytest.raises(KimiLiteError, match=f"--device {name}: kimi-lite runs on"):
            choose_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(KimiLiteError, match="--device cuda"):
            GpuStreams("cuda")


def test_a_gpu_that_cannot_be_used(monkeypatch):
    """One warning and the CPU where no device was asked for, an error where one was."""
    asked, unusable = [], support.Unusable("There is no C compiler.", "sudo apt install gcc.")
    monkeypatch.setattr(device, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(support, "why_unusable", lambda index: asked.append(index) or unusable)
    with pytest.warns(RuntimeWarning, match=r"runs on the CPU: There is no C compiler. sudo apt") as warned:
        assert choose_device(None) == "cpu"
    assert len(warned) == 1
    with pytest.raises(KimiLiteError, match=r"(?s)--device cuda:1: There is no C compiler.*sudo apt.*--device cpu"):
        choose_device("cuda:1")
    assert asked == [0, 1]
    monkeypatch.setattr(support, "why_unusable", lambda index: None)
    assert (choose_device(None), choose_device("cuda:1")) == ("cuda", "cuda:1")
    monkeypatch.setattr(device, "has_nvidia_driver", lambda: False)
    assert choose_device(None) == "cpu"
