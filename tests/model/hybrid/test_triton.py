"""The hybrid path on Triton's kernels themselves, in the interpreter: one step of the smallest model there can be."""

import importlib.util

import numpy as np
import pytest

from tests.model.hybrid.runner import DEVICE, HybridRunner
from tests.model.hybrid.stand_in import StandInKernels
from tests.model.runner import Runner, relative_error
from tests.tiny import write_tiny_gguf

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton exists on Linux alone"),
    pytest.mark.skipif(DEVICE != "cpu", reason="test_cuda.py does more on a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, which interprets the kernels, warns of infinities
]
SMALL = {
    **{"num_layers": 1, "num_dense_layers": 0, "hidden_size": 64, "num_heads": 1, "q_lora_rank": 0, "kv_lora_rank": 32},
    **{"num_experts": 4, "expert_feed_forward_size": 32, "feed_forward_size": 32},
}


def open_runner(path, **options) -> HybridRunner:
    from kimi_lite.model.hybrid.kernels import TritonKernels

    runner = HybridRunner(path, kernels=TritonKernels(), num_gpu_experts=2, **options)
    runner.transformer.head.kernels = StandInKernels()  # of the head alone, whose 300 rows would take most of the time
    slots = runner.transformer.experts.slots
    slots.count(0, np.array([[0, 1], [2, 3]], np.int32))
    slots.fill()
    return runner


@pytest.mark.parametrize(
    ("dense_type", "num_tokens", "limit"),
    [
        ("file", 1, 2e-5),
        pytest.param("q8_0", 3, 0.03, marks=pytest.mark.slow),
        pytest.param("file", 17, 0.02, marks=pytest.mark.slow),  # experts of many tokens are multiplied in bfloat16
        pytest.param("q8_0", 17, 0.04, marks=pytest.mark.slow),
    ],
)
def test_equals_the_cpu_path(dense_type, num_tokens, limit, tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), **SMALL)
    ids = np.random.default_rng(1).integers(0, 280, num_tokens)
    with Runner(path) as cpu:
        want = cpu.prefill(ids)
    with open_runner(path, dense_type=dense_type) as runner:
        have = runner.prefill(ids)
        assert relative_error(have, want) < limit
        counters = runner.transformer.counters()
        assert (
            counters["gpu_expert_hits"] + counters["gpu_expert_misses"] == 4 + 2 * num_tokens
        )  # the four of open_runner
