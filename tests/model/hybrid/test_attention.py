"""Attention of one layer: both forms give one answer, whatever the cache holds and however rows are cut."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.model.hybrid import attention as attention_module
from kimi_lite.model.hybrid.attention import Attention
from kimi_lite.model.hybrid.step import StepMaker, choose_expanded, expanded_is_cheaper
from kimi_lite.model.hybrid.weights import DenseWeights
from kimi_lite.native.latent_rows import MlaShape
from tests.model.hybrid.stand_in import StandInKernels
from tests.tiny import write_tiny_gguf

K2_5 = MlaShape(heads=64, nope=128, rope=64, kv_lora=512, value=128)


class OneLayer:
    """Layer 0 of a random model, with a cache of `num_pages` pages that hold random latents."""

    def __init__(self, path, cache: torch.dtype, num_pages: int = 2, **sizes) -> None:
        store = GGUFStore.open(write_tiny_gguf(path, np.random.default_rng(0), **sizes))
        self.config, streams = ModelConfig.from_metadata(store.metadata), GpuStreams("cpu")
        self.attention = Attention(
            DenseWeights(store, streams, StandInKernels(), "q8_0"), self.config, 0, StandInKernels()
        )
        rng = np.random.default_rng(1)
        latents = rng.standard_normal((num_pages, 64, self.config.kv_latent_size)).astype(np.float32)
        self._cache, self._maker = torch.from_numpy(latents).to(cache), StepMaker(self.config, streams)

    def run(self, pieces: list[tuple[int, int]], are_expanded: bool) -> torch.Tensor:
        """pieces: (first position, length) of sequences, each with a page of its own."""
        sequences, start = [], 0
        for page, (_, length) in enumerate(pieces):
            sequences.append(SequenceSlice(start, length, np.array([page], np.int32)))
            start += length
        positions = np.concatenate([np.arange(first, first + length) for first, length in pieces]).astype(np.int32)
        batch = Batch(np.zeros(start, np.int32), positions, np.ones(start, bool), tuple(sequences))
        step = self._maker.make(batch, sequences if are_expanded else [])
        rows = np.random.default_rng(2).standard_normal((start, self.config.hidden_size)).astype(np.float32)
        return self.attention.forward(torch.from_numpy(rows), self._cache.clone(), step)


def _error(have: torch.Tensor, want: torch.Tensor) -> float:
    return ((have - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("sizes", [{}, {"v_head_dim": 64}, {"q_lora_rank": 0}])
@pytest.mark.parametrize(("cache", "limit"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_both_forms_give_one_answer(cache, limit, sizes, tmp_path):
    """Values narrower than keys, as K2.5's, and wider; the expanded form loses no more bits than the cache has lost."""
    layer = OneLayer(tmp_path / "t.gguf", cache, **sizes)
    pieces = [(30, 9), (0, 5)]
    assert _error(layer.run(pieces, are_expanded=True), layer.run(pieces, are_expanded=False)) < limit


def test_a_prompt_of_bfloat16_is_near_the_exact_one(tmp_path, monkeypatch):
    """More than 16 tokens: activations are rounded, sums and the residual are not."""
    layer = OneLayer(tmp_path / "t.gguf", torch.float32)
    rounded = layer.run([(0, 40)], are_expanded=True)
    monkeypatch.setattr(layer.attention, "_activation_type", lambda num_tokens: torch.float32)
    error = _error(rounded, layer.run([(0, 40)], are_expanded=True))
    assert 1e-5 < error < 2e-2 and rounded.dtype == torch.float32


def test_rows_and_heads_at_a_time_change_nothing(tmp_path, monkeypatch):
    layer = OneLayer(tmp_path / "t.gguf", torch.float32, num_pages=9)
    decoding, mixed = [(3 * i, 1) for i in range(9)], [(5, 20), (9, 1)]
    whole = [layer.run(decoding, False), layer.run(mixed, True)]
    monkeypatch.setattr(attention_module, "_ABSORBED_ROWS", 4)
    monkeypatch.setattr(attention_module, "EXPANDED_BYTES", 1)
    assert _error(layer.run(decoding, False), whole[0]) < 1e-6 and _error(layer.run(mixed, True), whole[1]) < 1e-6


@given(st.lists(st.integers(1, 300) | st.just(1), min_size=1, max_size=200))
def test_which_slices_are_expanded(lengths):
    """Every slice that it saves work for, no slice of one token, and of the others few rows are left."""
    starts = np.cumsum([0, *lengths])
    pieces = [SequenceSlice(int(s), n, np.zeros(1, np.int32)) for s, n in zip(starts, lengths, strict=False)]
    expanded = choose_expanded(pieces, K2_5)
    lengths_expanded = [p.length for p in expanded]
    assert 1 not in lengths_expanded and all(p in expanded for p in pieces if expanded_is_cheaper(p.length, K2_5))
    assert sum(n for n in lengths if n > 1) - sum(lengths_expanded) <= 64
    assert [p.start for p in expanded] == sorted(p.start for p in expanded)
