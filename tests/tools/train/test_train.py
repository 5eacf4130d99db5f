"""Runs: what is learnt, what QK-Clip bounds, and that kill -9 changes nothing."""

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.arch.checkpoint import read_checkpoint_config
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.source.tokenizer import tokenizer_metadata
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.tools.train.data import Corpus, train_pieces
from kimi_lite.tools.train.train import Run, Settings, read_metrics
from tests.tools.train.small import SMALL

ROOT = Path(__file__).parents[3]


def explosive(source: Path, text: Path, **changes) -> Settings:
    """A learning rate that makes attention logits grow without end."""
    wanted = Settings(
        model=str(source), texts=(str(text),), num_steps=40, batch_size=4, length=32, lr=0.2, warmup_steps=1,
        decay_share=0.0, weight_decay=0.0, tau=5.0, is_bf16=False, held_out_batches=1,
    )  # fmt: skip
    return replace(wanted, **changes)


def test_a_loss_falls(source, text, tmp_path):
    run = Run.open(tmp_path / "run", explosive(source, text, lr=0.02, tau=100.0, is_bf16=True, num_steps=30))
    before = run.held_out_loss()
    run.train()
    assert run.held_out_loss() < before - 1.0
    steps = list(read_metrics(tmp_path / "run"))
    assert [metrics.step for metrics in steps] == list(range(1, 31))
    assert all(sum(load) == 4 * 32 * SMALL.num_experts_used for metrics in steps for load in metrics.loads)


def test_logits_explode_without_qk_clip_and_not_with_it(source, text, tmp_path):
    """Between a clip and the next forward pass lies one update: a logit is at most one step above tau."""
    largest, clipped = {}, {}
    for name in ("muon", "muonclip"):
        Run.open(tmp_path / name, explosive(source, text, optimizer=name)).train()
        steps = list(read_metrics(tmp_path / name))
        largest[name] = [metrics.max_logit for metrics in steps]
        clipped[name] = sum(metrics.num_clipped for metrics in steps)
    assert largest["muon"][-1] > 3 * max(largest["muonclip"]) and clipped["muon"] == 0
    assert max(largest["muonclip"]) < 30 and clipped["muonclip"] > 20


def test_a_run_that_is_killed_ends_as_if_it_had_not_been(source, text, tmp_path):
    """SIGKILL after steps, inside a metrics line and inside a checkpoint, at random: weights and metrics are equal bit
    for bit, but for the seconds."""
    rng = random.Random(5)
    ways = [
        f"step {rng.randint(1, 4)}",
        f"save 2 {rng.random():.2f}",
        f"line {rng.randint(7, 9)}",
        "save 1 0.99",
        "end",
    ]
    named = {"whole": ["end"], "killed": ways}
    runs = [",".join(map(str, (source, text, tmp_path / name, *how))) for name, how in named.items()]
    subprocess.run([sys.executable, "-m", "tests.tools.train.killed", *runs], cwd=ROOT, check=True, timeout=250)
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    assert (whole / "model/model.safetensors").read_bytes() == (killed / "model/model.safetensors").read_bytes()
    first, second = (
        [asdict(replace(m, seconds=0.0, cpu_seconds=0.0)) for m in read_metrics(folder)] for folder in (whole, killed)
    )
    assert first == second and len(first) == 11
    assert sum(metrics["num_clipped"] for metrics in first) > 0


def test_a_run_goes_on_only_as_it_began(source, text, tmp_path):
    wanted = explosive(source, text, num_steps=1)
    Run.open(tmp_path / "run", wanted)
    said = tmp_path / "run/settings.json"
    said.write_text(json.dumps({k: v for k, v in json.loads(said.read_text()).items() if k != "token_clip"}))
    Run.open(tmp_path / "run", wanted)  # of a version without that setting
    with pytest.raises(KimiLiteError, match=r"lr 0\.2 and not 0\.1"):
        Run.open(tmp_path / "run", replace(wanted, lr=0.1))
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    with pytest.raises(KimiLiteError, match="more than 32 are needed"):
        Run.open(tmp_path / "other", replace(wanted, texts=(str(short),)))


def test_the_number_of_steps_may_change_before_the_rate_falls(source, text, tmp_path):
    """The stable phase may decay earlier, and what comes out is as if it had been said at first."""
    wanted = explosive(source, text, num_steps=10, decay_share=0.5, checkpoint_steps=2)
    Run.open(tmp_path / "changed", wanted).train(until=4)
    shorter = replace(wanted, num_steps=8, held_out_batches=2, checkpoint_steps=1)
    Run.open(tmp_path / "changed", shorter).train()
    Run.open(tmp_path / "straight", shorter).train()
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("changed", "straight")]
    assert weights[0] == weights[1]
    with pytest.raises(KimiLiteError, match="num_steps 8 and not 10"):
        Run.open(tmp_path / "changed", wanted)


@settings(deadline=None)
@given(steps=st.integers(1, 500), warmup=st.integers(0, 600), decay=st.floats(0, 1), lr=st.floats(1e-6, 1.0))
def test_the_learning_rate_rises_stays_and_falls(steps, warmup, decay, lr):
    wanted = Settings("m", ("t",), num_steps=steps, warmup_steps=warmup, decay_share=decay, lr=lr)
    rates = [wanted.learning_rate(step) for step in range(steps)]
    assert all(0 < rate <= lr * (1 + 1e-9) for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    if warmup <= steps * (1 - decay) - 1:
        assert max(rates) == pytest.approx(lr)
        assert all(
            later <= earlier * (1 + 1e-12) for earlier, later in zip(rates[peak:], rates[peak + 1 :], strict=False)
        )


@settings(deadline=None, max_examples=40)
@given(
    words=st.dictionaries(st.text("abcé ", min_size=1, max_size=8), st.integers(1, 50), max_size=12),
    count=st.integers(256, 290),
)
def test_pieces_are_the_most_frequent_pairs(words, count):
    """Against the algorithm as its authors write it: count all pairs anew for each merge."""
    pieces = train_pieces(Counter(words), count)
    split = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    want = [bytes([byte]) for byte in range(256)]
    while len(want) < count:
        totals = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                totals[pair] += words[word]
        if not totals:
            break
        left, right = min(totals, key=lambda pair: (-totals[pair], pair))
        if left + right not in want:
            want.append(left + right)
        for parts in split.values():
            i = 0
            while i < len(parts) - 1:
                if parts[i] == left and parts[i + 1] == right:
                    parts[i : i + 2] = [left + right]
                i += 1
    assert pieces == want


def test_the_tokenizer_reads_back_what_it_writes(source, text):
    fields = read_checkpoint_config(source).fields
    metadata = {key: value.value for key, value in tokenizer_metadata(source, fields).items()}
    kinds = "tokenizer.ggml.token_type"
    tokenizer = Tokenizer.from_metadata(metadata | {kinds: np.asarray(metadata[kinds])})
    sample = text.read_text()[:5000] + " Grüße, 世界 1234\n\n"
    ids = tokenizer.encode(sample)
    assert tokenizer.decode(ids) == sample and len(ids) < 0.6 * len(sample.encode()) and max(ids) < 344
    assert "<|im_end|>" in tokenizer.special


def test_batches_are_of_the_text_and_of_nothing_held_out(source, text):
    ids = np.arange(1000, dtype=np.uint32)
    corpus = Corpus(ids[:900], ids[900:])
    seen = torch.cat([corpus.batch(number, 4, 16, seed=3) for number in range(50)])
    assert seen.shape == (200, 17) and int(seen.max()) < 900
    assert torch.equal(seen, seen[:, :1] + torch.arange(17))
    assert torch.equal(corpus.batch(7, 4, 16, seed=3), seen[28:32])
    assert not torch.equal(corpus.batch(7, 4, 16, seed=4), seen[28:32])
    held_out = torch.cat(list(corpus.held_out_batches(3, 16, 99)))
    assert int(held_out.min()) == 900 and int(held_out.max()) == 999 and len(held_out) == 6


def test_settings_are_written_as_they_are(source, text, tmp_path):
    wanted = explosive(source, text, num_steps=1)
    Run.open(tmp_path / "run", wanted)
    assert json.loads((tmp_path / "run/settings.json").read_text())["texts"] == [str(text)]
