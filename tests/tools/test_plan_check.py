"""A plan against a process that really loads and runs a model: memory within 5 %, ceilings kept."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.tiny import write_tiny_gguf

_ROOT = Path(__file__).parents[2]


def check(path: Path, context: str) -> dict:
    command = [sys.executable, "-m", "tools.plan_check", "-m", str(path), "-c", context, "-t", "1"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_is_what_was_planned_and_no_ceiling_is_exceeded(tmp_path):
    """75 MB of experts in Q8_0 and a cache of 5 MB, in processes of their own; one that compiles holds more than planned."""
    shape = {"hidden_size": 512, "expert_feed_forward_size": 512, "num_experts": 24, "num_layers": 5, "kv_lora_rank": 512}
    path = write_tiny_gguf(tmp_path / "model.gguf", np.random.default_rng(0), types={"_exps": "Q8_0"}, **shape)
    runs = [check(path, "1K") for _ in range(3)]
    found = min(runs, key=lambda run: run["resident_bytes"])
    assert abs(found["memory_error"]) <= 0.05, found
    assert found["decode_tok_s"] <= found["decode_ceiling_tok_s"], found
    assert found["prompt_tok_s"] <= found["prompt_ceiling_tok_s"], found
