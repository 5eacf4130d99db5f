"""The whole way of a front end on the hybrid path: the loader, the engine, its cache in a tensor, heat beside the
model."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kimi_lite.engine import device, loader
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.experts.heat import heat_path
from kimi_lite.model.hybrid import load
from kimi_lite.model.hybrid.transformer import HybridTransformer
from kimi_lite.native.gpu import support
from kimi_lite.options import Options
from tests.model.hybrid.runner import DEVICE, HybridRunner
from tests.model.hybrid.stand_in import GPU, StandInKernels
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="test_hybrid.py covers CUDA")


@pytest.fixture
def stand_in(monkeypatch):
    """A CPU device called by a name that is not the CPU path's."""
    monkeypatch.setattr(loader, "choose_device", lambda wanted: "cpu:0")
    monkeypatch.setattr(loader, "find_gpu", lambda device: None if device == "cpu" else GPU)
    monkeypatch.setattr(load, "TritonKernels", StandInKernels)


def answer(engine: Engine, prompt: tuple[int, ...], name: str) -> list[int]:
    request = Request(name, prompt, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    return [token.id for token in engine.generate([request]) if token.id is not None]


def test_engine_on_the_gpu_path(tmp_path, stand_in, monkeypatch):
    """The same tokens as on the CPU path; a second request finds the first one's pages; close saves the heat."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    options = Options(context_length=512, kv_dtype="f32", num_threads=1, num_gpu_experts=4, dense_type="file")
    prompt = tuple(np.random.default_rng(1).integers(0, 250, 90).tolist())
    stages = []
    with loader.load(path, options, lambda stage, done, total: stages.append(stage)) as engine:
        assert (
            isinstance(engine.model, HybridTransformer)
            and engine.scheduler.max_step_tokens == engine.model.max_batch_tokens
        )
        have = answer(engine, prompt, "a")
        again = answer(engine, (*prompt, *have, 7), "b")
        counters = engine.counters()
        assert counters["gpu_expert_slots"] == 4 and counters["decode_steps"] >= 10
    assert {"loading onto the GPU", "preparing kernels"} <= set(stages) and heat_path(path).exists()
    monkeypatch.setattr(loader, "choose_device", lambda wanted: "cpu")
    with loader.load(path, options) as engine:
        assert answer(engine, prompt, "a") == have
        assert answer(engine, (*prompt, *have, 7), "b") == again


def test_a_thread_names_its_gpu_before_it_runs_the_model(tmp_path):
    """CUDA's current device is a thread's own: a model that one thread loads and another runs would launch on GPU 0."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    with HybridRunner(path) as runner:
        threads = []
        runner.transformer._streams.enter_thread = lambda: threads.append(threading.get_ident())
        runner.decode(np.array([1, 2]))
        assert not threads, "the thread that loaded it has done so"
        with ThreadPoolExecutor(1) as pool:
            pool.submit(runner.decode, np.array([3, 4])).result()
            other = pool.submit(threading.get_ident).result()
        runner.decode(np.array([5]))
        assert threads == [other, threading.get_ident()], "once a change"


@pytest.mark.parametrize("of_user", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_blocks_of_vram_grow_unless_the_user_has_settings(of_user, monkeypatch):
    environment = {of_user: "max_split_size_mb:64"} if of_user else {}
    monkeypatch.setattr(os, "environ", dict(environment))
    monkeypatch.setattr(support, "why_unusable", lambda index: None)
    assert device.choose_device("cuda") == "cuda"
    assert os.environ == (environment or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
