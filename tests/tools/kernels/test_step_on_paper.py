"""A decode step on paper: how many launches the captured step has, and what times are made of."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.arch.known import K2_5
from kimi_lite.tools.kernels.step_on_paper import (
    Inputs,
    Node,
    Step,
    bound_us,
    expert_bytes,
    layer_time,
    token_us,
)

_ROOT = Path(__file__).parents[3]
STEP = Step(
    once=[Node("copy_.default", 0), Node("matvec_kernel", 1_000_000_000)],
    dense=[Node("matvec_kernel", 100_000_000)],
    routed=[
        Node("matvec_kernel", 118_000_000),
        Node("route_kernel", 0),
        Node("matvec_kernel", 47_000_000),
        Node("await_answer_kernel", 0),
        Node("join_kernel", 0),
    ],
)


def run_tool(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "kimi_lite.tools.kernels.step_on_paper", *arguments]
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton exists on Linux alone")
def test_few_launches():
    """Counted in the captured step itself: one graph, a wait for the CPU a layer and no copy in between."""
    result = run_tool()
    assert result.returncode == 0, result.stderr[-3000:]
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["layer_nodes"] <= 22 and told["nodes"] <= 1_339, result.stdout  # two of them quantize
    assert "1 await_answer_kernel, 1 join_kernel" in result.stdout and "copy" not in result.stdout, result.stdout
    assert told["tok_s"] < told["bound_tok_s"] < 15.4
    assert 120 < told["layer_us"]["attention_bytes"] < 135, "as the review counted: 107 + 11 MB at 0.92 TB/s"
    assert run_tool("--experts", "q9").returncode == 2


def test_bytes_of_an_expert():
    assert expert_bytes("TQ1_0") == 44_040_192 // 256 * 54


@given(st.floats(1, 2000), st.floats(1, 500), st.floats(0.5, 1), st.floats(0, 1))
def test_no_time_is_below_the_bound(vram, ram, cpu_share, hits):
    inputs = Inputs(vram_gb_s=vram, ram_gb_s=ram, cpu_share=cpu_share, hit_share=hits)
    token, bound = token_us(STEP, "TQ1_0", inputs), bound_us(STEP, "TQ1_0", inputs)
    assert token > bound > 0
    free = Inputs(vram, ram, 1e9, 1.0, hits, 0, 0, 0, 0, 0, 0, 0, 0)
    assert token_us(STEP, "TQ1_0", free) == pytest.approx(bound_us(STEP, "TQ1_0", free))


def test_where_the_time_goes():
    """The CPU's experts set a layer's time without hits, the GPU's with all of them."""
    cold, hot = (layer_time(STEP, "TQ1_0", Inputs(hit_share=share)) for share in (0.0, 1.0))
    assert cold.cpu > 1000 > cold.gpu and hot.gpu > hot.cpu
    faster = layer_time(STEP, "TQ1_0", replace(Inputs(), ram_gb_s=160.0))
    assert faster.total < cold.total and faster.attention_bytes == cold.attention_bytes
    assert STEP.num_nodes() == 2 + K2_5.num_dense_layers + 5 * K2_5.num_moe_layers
