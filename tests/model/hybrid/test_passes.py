"""How many tokens go through the GPU at a time where its memory ends, and when more are tried again."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.experts.gpu_failure import GpuMemoryEnded
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.model.hybrid.kernels import MAX_DECODE_TOKENS
from kimi_lite.model.hybrid.passes import Passes

MOST = 512


@dataclass
class Gpu:
    """Memory for so many tokens of a pass."""

    fits: int
    num_ended: int = 0
    runs: list[int] = field(default_factory=list)

    def run(self, batch: Batch, should_stop) -> np.ndarray:
        if len(batch.token_ids) > self.fits:
            self.num_ended += 1
            raise GpuMemoryEnded("The GPU ran out of memory.")
        self.runs.append(len(batch.token_ids))
        return batch.token_ids[batch.wants_logits, None].astype(np.float32)


def prompt(num_tokens: int) -> Batch:
    ids = np.arange(num_tokens, dtype=np.int32)
    pages = np.arange(-(-num_tokens // 64), dtype=np.int32)
    return Batch(ids, ids, ids == num_tokens - 1, (SequenceSlice(0, num_tokens, pages),))


def passes_of(gpu: Gpu) -> Passes:
    return Passes(MOST, gpu.run, lambda: None)


def test_memory_that_comes_back_is_used_again():
    gpu = Gpu(fits=100)
    passes = passes_of(gpu)
    for _ in range(2):  # half is too much, too
        with pytest.raises(GpuMemoryEnded):
            passes.forward(prompt(MOST), None)
    passes.forward(prompt(MOST), None)
    assert passes.most_tokens == MOST // 8 and set(gpu.runs) == {MOST // 8}
    gpu.fits, num_ended = MOST, gpu.num_ended
    for _ in range(3 * 32 + 1):
        passes.forward(prompt(MOST), None)
    assert passes.most_tokens == MOST and gpu.runs[-1] == MOST
    assert gpu.num_ended == num_ended


def test_memory_that_does_not_come_back_is_asked_for_ever_more_seldom():
    gpu = Gpu(fits=300)
    passes = passes_of(gpu)
    ended = []
    for number in range(700):
        before = gpu.num_ended
        passes.forward(prompt(MOST), None)
        if gpu.num_ended > before:
            ended.append(number)
    gaps = np.diff(ended)
    assert len(ended) >= 5 and (gaps[1:] >= 2 * gaps[:-1] - 2).all(), ended


def test_short_prompts_are_no_reason_to_try_more():
    gpu = Gpu(fits=300)
    passes = passes_of(gpu)
    passes.forward(prompt(MOST), None)
    for _ in range(100):
        passes.forward(prompt(200), None)
    assert gpu.num_ended == 1 and passes.most_tokens == MOST // 2


@given(st.lists(st.tuples(st.integers(1, MOST), st.integers(40, MOST)), min_size=1, max_size=60))
def test_every_batch_is_done_whole_or_says_so(batches):
    """(tokens, what fits) of each batch: its rows come in their order, and the limit stays in its bounds."""
    gpu = Gpu(fits=MOST)
    passes = passes_of(gpu)
    for num_tokens, gpu.fits in batches:
        gpu.runs.clear()
        try:
            rows = passes.forward(prompt(num_tokens), None)
        except GpuMemoryEnded:
            assert gpu.fits < num_tokens
            continue
        assert rows.tolist() == [[num_tokens - 1]] and sum(gpu.runs) >= num_tokens
        assert MAX_DECODE_TOKENS <= passes.most_tokens <= MOST
