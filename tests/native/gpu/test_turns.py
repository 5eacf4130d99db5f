"""The GPU's half of taking turns, in the interpreter and compiled: what the CPU finds in memory, and who waits how
long."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.native.gpu.arguments import Posting
from kimi_lite.native.gpu.router import route
from kimi_lite.native.gpu.turns import await_answer
from kimi_lite.native.turn_cells import ANSWERED, CHOICES_POSTED, GIVEN_UP, MAX_TOKENS, NUM_CELLS, X_POSTED

_ROOT = Path(__file__).parents[3]


def pinned(device: torch.device, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")


@settings(deadline=None, max_examples=8)
@given(st.integers(1, MAX_TOKENS), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_the_cpu_finds_what_was_chosen_and_what_is_missing(num_tokens, top_k, seed):
    device = torch.device(os.environ.get("KIMI_LITE_TEST_DEVICE", "cpu"))
    rng, turn, before = np.random.default_rng(seed), seed % 5 + 1, seed % 1000
    cells, first = pinned(device, NUM_CELLS), torch.full((1,), before, dtype=torch.int64, device=device)
    logits = torch.from_numpy(rng.standard_normal((num_tokens, 20), np.float32)).to(device)
    slot_of = torch.from_numpy(rng.integers(-3, 4, 20, np.int32).clip(-1)).to(device)
    chosen, missing = (pinned(device, MAX_TOKENS, top_k, dtype=torch.int32) for _ in range(2))
    want = route(logits, None, top_k, slot_of=slot_of)
    have = route(logits, None, top_k, slot_of=slot_of, posting=Posting(chosen, missing, cells, first, turn))
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(have, want, strict=True))
    ids, slots = have.ids.cpu(), have.slots.cpu()
    assert torch.equal(slots, slot_of.cpu()[ids.long()]) and torch.equal(chosen[:num_tokens], ids)
    assert torch.equal(missing[:num_tokens], torch.where(slots < 0, ids, -1))
    assert not chosen[num_tokens:].any() and not missing[num_tokens:].any(), "rows of other tokens"
    for cell in (X_POSTED, CHOICES_POSTED):
        posted = cells[cell : cell + MAX_TOKENS].tolist()
        assert posted == [before + turn] * num_tokens + [0] * (MAX_TOKENS - num_tokens)


def test_waits_until_the_cpu_has_answered(device):
    cells, first = pinned(device, NUM_CELLS), torch.full((1,), 40, dtype=torch.int64, device=device)
    given_up, answered_s = torch.zeros_like(first), []

    def answer() -> None:
        time.sleep(0.05)
        answered_s.append(time.monotonic())
        cells[ANSWERED] = 42

    thread = threading.Thread(target=answer)
    thread.start()
    await_answer(cells, given_up, first, 2)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert answered_s and time.monotonic() >= answered_s[0]
    thread.join()
    assert not given_up.any() and cells[GIVEN_UP] == 0
    await_answer(cells, given_up, first, 1, limit=0)  # an earlier turn, too
    assert not given_up.any()


def test_a_cpu_that_never_answers_stops_nothing_for_good(device):
    """One turn waits for as long as it may; the step's others not at all, the next step's again."""
    cells, first = pinned(device, NUM_CELLS), torch.full((1,), 7, dtype=torch.int64, device=device)
    given_up = torch.zeros_like(first)
    await_answer(cells, given_up, first, 3, limit=5)
    assert given_up.item() == cells[GIVEN_UP] == 10
    await_answer(cells, given_up, first, 4, limit=1 << 30)  # would take minutes
    assert given_up.item() == cells[GIVEN_UP] == 10, "the first turn is told"
    first += 10
    cells[ANSWERED] = 18
    await_answer(cells, given_up, first, 1, limit=5)
    assert given_up.item() == 10
    await_answer(cells, given_up, first, 2, limit=5)
    assert given_up.item() == cells[GIVEN_UP] == 19


def test_memory_order_in_machine_code(tmp_path):
    """For every GPU that we allow: flags are stored with release and loaded with acquire semantics, for the system."""
    triton = pytest.importorskip("triton")
    if not Path(triton.knobs.nvidia.ptxas.path).exists():
        pytest.skip("this triton has no ptxas")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "tests.native.gpu.compile_turns"]
    result = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert len(result.stdout.splitlines()) == 2 * 5, result.stdout
