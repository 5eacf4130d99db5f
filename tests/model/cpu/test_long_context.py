"""A context of 262,144 tokens: positions, pages and scheduling at its end, with a cache that was filled and not
computed."""

from pathlib import Path

import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.rope import rope_inverse_frequencies
from kimi_lite.engine.loader import load
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.model.cpu.transformer import Transformer
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.native.reference import quantize_latents, rotate_pairs
from kimi_lite.options import Options
from tests.tiny import write_tiny_gguf

CONTEXT = 262_144
NUM_PAGES = CONTEXT // PAGE_TOKENS


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """YaRN as Kimi K2.5 has it: factor 64 from 4,096 tokens, base 50,000."""
    path = tmp_path_factory.mktemp("long") / "tiny.gguf"
    sizes = {"num_layers": 2, "kv_lora_rank": 32, "qk_rope_head_dim": 16}
    yarn = {"context_length": CONTEXT, "rope_original_context_length": 4096}
    return write_tiny_gguf(path, np.random.default_rng(0), **sizes, **yarn)


def test_keys_are_turned_by_their_position_up_to_the_last(model_path: Path) -> None:
    """In layer 0 a token's key depends on nothing else; what is stored at position P is that of position 0 turned by P
    angles."""
    store = GGUFStore.open(model_path)
    config = ModelConfig.from_metadata(store.metadata)
    kv = KVCache(config.num_layers, config.kv_latent_size, NUM_PAGES, "f32")
    transformer = Transformer(store, config, kv, Options(num_threads=1))
    pages = np.arange(NUM_PAGES, dtype=np.int32)[::-1].copy()
    rows = {}
    for position in (0, 1, 63, 64, 4095, 4096, 131_072, CONTEXT - 1):
        one = SequenceSlice(0, 1, pages[: position // PAGE_TOKENS + 1])
        token, at = np.array([65], np.int32), np.array([position], np.int32)
        assert np.isfinite(transformer.forward(Batch(token, at, np.ones(1, bool), (one,)))).all()
        rows[position] = kv.storage[0, pages[position // PAGE_TOKENS], position % PAGE_TOKENS].copy()
    transformer.close()
    latent, key = rows[0][:32], rows[0][32:].astype(np.float64)
    frequencies = rope_inverse_frequencies(config)
    assert frequencies[-1] == pytest.approx(50_000.0 ** (-14 / 16) / 64, rel=1e-12), "the slowest pair is interpolated"
    for position, row in rows.items():
        angles = position * frequencies
        assert np.array_equal(row[:32], latent)
        want = rotate_pairs(key, np.cos(angles), np.sin(angles))
        np.testing.assert_allclose(row[32:], want, atol=3e-7 * np.abs(key).max())


def fill(kv: KVCache, sequence, rng: np.random.Generator, ids: list[int]) -> None:
    """Random latents in the pages of a sequence, by position."""
    for layer in range(kv.num_layers):
        latents = rng.standard_normal((NUM_PAGES, PAGE_TOKENS, 48), dtype=np.float32)
        kv.storage[layer, sequence.pages] = latents if kv.dtype != "q8" else quantize_latents(latents)
    kv.advance(sequence, ids)


def last_tokens(path: Path, kv_dtype: str, is_shuffled: bool) -> tuple[list[int], list[np.ndarray]]:
    """The end of a context of which all but four tokens are cached: ids and logits."""
    ids = np.random.default_rng(7).integers(0, 256, CONTEXT - 4).tolist()
    with load(path, Options(context_length=CONTEXT, num_threads=2, kv_dtype=kv_dtype)) as engine:
        if is_shuffled:
            np.random.default_rng(8).shuffle(engine.kv._blank)
        sequence = engine.kv.open([])
        assert engine.kv.reserve(sequence, CONTEXT)
        fill(engine.kv, sequence, np.random.default_rng(9), ids)
        engine.kv.release(sequence)
        forward, logits = engine.model.forward, []
        engine.model.forward = lambda *args: logits.append(forward(*args)) or logits[-1]
        sampling = SamplingParams(temperature=0, ignore_eos=True)
        tokens = list(engine.generate([Request("a", tuple(ids), sampling)]))
    assert tokens[-1].stats.cached_tokens == CONTEXT - 5
    assert tokens[-1].finish_reason == "length"
    return [token.id for token in tokens if token.id is not None], logits


@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
def test_the_end_of_a_full_context(kv_dtype: str, model_path: Path) -> None:
    """Wherever the pages lie; after four tokens the context is full."""
    ids, logits = last_tokens(model_path, kv_dtype, is_shuffled=False)
    again, same_logits = last_tokens(model_path, kv_dtype, is_shuffled=True)
    assert len(ids) == 4
    assert ids == again
    assert all(np.array_equal(a, b) for a, b in zip(logits, same_logits, strict=True))
    assert np.isfinite(logits).all()
