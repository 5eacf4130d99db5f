"""Features in place of token embeddings: what a batch makes of the embeddings of other tokens is what it makes of those
tokens, on every path."""

import numpy as np
import pytest

from kimi_lite.model.batch import Batch, Features, SequenceSlice
from kimi_lite.native.cpu.matrix import dequantize
from tests.model.cpu.test_tiers import slot_bytes
from tests.model.hybrid.runner import HybridRunner
from tests.model.runner import Runner, relative_error
from tests.tiny import write_tiny_gguf

PATHS = {
    "cpu": lambda path: Runner(path),
    "experts from the disk": lambda path: Runner(path, ram_expert_bytes=6 * slot_bytes(path)),
    "hybrid": lambda path: HybridRunner(path),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("features") / "tiny.gguf", np.random.default_rng(0))


@pytest.mark.parametrize("way", PATHS)
@pytest.mark.parametrize("num_tokens", [3, 8, 40])
def test_features_are_read_as_embeddings(way, num_tokens, path):
    rng = np.random.default_rng(num_tokens)
    ids = rng.integers(0, 290, num_tokens).astype(np.int32)
    replaced = np.sort(rng.choice(num_tokens, num_tokens // 2, replace=False))
    padding = ids.copy()
    padding[replaced] = 7
    with PATHS[way](path) as runner:
        embeddings = runner.store.tensor("token_embd.weight")
        values = dequantize(embeddings.data[ids[replaced]], embeddings.layout.name)

        def forward(ids: np.ndarray, features: Features | None) -> np.ndarray:
            whole = (SequenceSlice(0, num_tokens, runner.pages),)
            positions = np.arange(num_tokens, dtype=np.int32)
            wants = np.ones(num_tokens, bool)
            return runner.transformer.forward(Batch(ids, positions, wants, whole, features)).copy()

        want = forward(ids, None)
        assert relative_error(forward(padding, Features(replaced, values)), want) < 1e-5  # hybrid: sums in any order
        assert relative_error(forward(padding, None), want) > 0.1  # and a later batch has none of them
