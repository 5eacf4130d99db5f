"""A weight's path and a token's path together, as typed: `kimi-lite quantize`, then `kimi-lite run`, against
transformers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from kimi_lite.engine.loader import load
from kimi_lite.hardware.host import usable_cores
from kimi_lite.options import Options
from tests.checkpoints import make_checkpoint
from tests.tiny import write_tiny_gguf

ROOT = Path(__file__).parents[2]


def kimi_lite(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kimi_lite", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


def test_quantize_then_run_says_what_transformers_would(tmp_path: Path) -> None:
    """Greedy and in float32: every token is the best of the reference's logits, or ties with it in all but rounding."""
    import torch

    reference = make_checkpoint(tmp_path / "hf", "kimi_int4")
    path = tmp_path / "model.gguf"
    converted = kimi_lite("quantize", tmp_path / "hf", path, "--type", "f32")
    assert converted.returncode == 0, converted.stderr
    done = kimi_lite("run", "-m", path, "hello there", "--temp", "0", "-n", "16", "--no-think", "--json")
    assert done.returncode == 0, done.stderr
    ids = json.loads(done.stdout)["ids"]
    engine = load(path, Options(context_length=128))
    prompt = engine.template.encode([{"role": "user", "content": "hello there"}], thinking=False).ids
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].numpy()  # (tokens, vocab)
    lost = logits.max(axis=1) - logits[range(len(ids)), ids]
    assert ids
    assert lost.max() < 1e-3, lost


def test_quantize_reports_mistakes_like_every_command(tmp_path: Path) -> None:
    done = kimi_lite("quantize", tmp_path / "nothing", tmp_path / "out.gguf")
    assert done.returncode == 2
    assert "kimi-lite: " in done.stderr
    assert "Traceback" not in done.stderr


def test_more_threads_than_the_process_can_use_are_said_and_not_started(tmp_path: Path) -> None:
    """They would only wait for each other: 64 on two cores cost a factor of 300."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    most = usable_cores().most_threads
    engine = load(path, Options(context_length=128, num_threads=most + 60))
    try:
        assert engine.model.team.num_threads == engine.plan.num_threads == most
    finally:
        engine.close()
    done = kimi_lite("run", "-m", path, "hello there", "-n", "1", "-t", most + 60)
    assert done.returncode == 0, done.stderr
    assert f"-t {most + 60} starts {most}: this process can use {most} hardware thread" in done.stderr
