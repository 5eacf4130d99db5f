"""A transformer without weights: everything it answers it has read back from the cache through the batch's pages.

Row p of layer 0 holds the token id, row p of every later layer a digest of the layer below up to p. So a wrong page
table, a stale page, a page given out twice or a row computed from the wrong context changes the logits.
"""

from collections.abc import Callable
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np

from kimi_lite.engine.engine import Engine
from kimi_lite.engine.types import ModelInfo
from kimi_lite.engine.vision import Vision
from kimi_lite.kv.disk import PrefixStore
from kimi_lite.kv.pages import KVCache
from kimi_lite.media.features import FeatureStore
from kimi_lite.media.reader import MediaReader
from kimi_lite.model.batch import Batch, Cancelled
from kimi_lite.model.vision.patches import EncodingStopped, Patches
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.text.template import ChatTemplate
from kimi_lite.text.tokenizer import Tokenizer
from tests.tiny_tokenizer import tokenizer_metadata

VOCAB_SIZE = 300
NUM_LAYERS, LATENT_SIZE = 3, 2
NextLogits = Callable[[list[int]], np.ndarray]  # token ids of the context -> (vocab,) float32


def hashed_logits(context: list[int]) -> np.ndarray:
    """Random logits that depend on every token of the context and its place; control tokens are out of reach."""
    seed = blake2b(np.array(context, np.int32).tobytes(), digest_size=8).digest()
    logits = np.random.default_rng(int.from_bytes(seed, "little")).normal(scale=2.0, size=VOCAB_SIZE).astype(np.float32)
    logits[256:] = -100.0
    return logits


class FakeModel:
    """Stands in for `Transformer`. `before_layer(batch, layer)` lets a test cancel in the middle of a step."""

    def __init__(self, kv: KVCache, next_logits: NextLogits = hashed_logits) -> None:
        self.kv = kv
        self.next_logits = next_logits
        self.batches: list[Batch] = []
        self.before_layer: Callable[[Batch, int], None] = lambda batch, layer: None
        self.max_batch_tokens = 512
        self.num_closed = 0

    def counters(self) -> dict[str, float]:
        return {}

    def heat(self) -> None:
        return None

    def close(self) -> None:
        self.num_closed += 1

    def forward(self, batch: Batch, should_stop: Callable[[], bool] | None = None) -> np.ndarray:
        self.batches.append(batch)
        for layer in range(NUM_LAYERS):
            self.before_layer(batch, layer)
            if should_stop is not None and should_stop():
                raise Cancelled
            for piece in batch.sequences:
                self._write(batch, piece, layer)
        rows = [
            self._logits(batch, s, row) for s in batch.sequences for row in self._rows(s) if batch.wants_logits[row]
        ]
        return np.array(rows, np.float32).reshape(-1, VOCAB_SIZE)

    def _write(self, batch, piece, layer: int) -> None:
        for row in self._rows(piece):
            position = int(batch.positions[row])
            value = self._input(batch, row) if layer == 0 else digest(self._read(piece.pages, layer - 1, position + 1))
            self.kv.storage[layer, piece.pages[position // PAGE_TOKENS], position % PAGE_TOKENS] = value

    @staticmethod
    def _input(batch, row: int) -> float:
        """The token's id, or the first number of what is shown in its place."""
        if batch.features is not None and row in batch.features.rows:
            return batch.features.values[np.flatnonzero(batch.features.rows == row)[0], 0]
        return batch.token_ids[row]

    def _logits(self, batch, piece, row: int) -> np.ndarray:
        num_tokens = int(batch.positions[row]) + 1
        values = [self._read(piece.pages, layer, num_tokens) for layer in range(NUM_LAYERS)]
        for below, above in pairwise(values):
            assert above[-1] == digest(below), "a row was computed from another context than this"
            assert above[len(above) // 2] == digest(below[: len(above) // 2 + 1]), "an earlier row is stale"
        return self.next_logits(values[0].astype(int).tolist())

    def _read(self, pages: np.ndarray, layer: int, num_tokens: int) -> np.ndarray:
        """(num_tokens,) values of a layer through the page table."""
        rows = self.kv.storage[layer, pages[: -(-num_tokens // PAGE_TOKENS)]].reshape(-1, LATENT_SIZE)[:num_tokens]
        assert (rows[:, 0] == rows[:, 1]).all()
        return rows[:, 0]

    @staticmethod
    def _rows(piece) -> range:
        return range(piece.start, piece.start + piece.length)


def digest(values: np.ndarray) -> float:
    """24 bits of a hash: exact in float32."""
    return float(int.from_bytes(blake2b(values.tobytes(), digest_size=3).digest(), "little"))


def tiny_metadata() -> dict[str, object]:
    """The tokenizer and template of tests.tiny as the store would give them."""
    metadata = tokenizer_metadata(VOCAB_SIZE)
    return metadata | {"tokenizer.ggml.token_type": np.array(metadata["tokenizer.ggml.token_type"], np.int32)}


def fake_engine(
    next_logits: NextLogits = hashed_logits,
    context_length: int = 1024,
    num_pages: int | None = None,
    max_step_tokens: int | None = None,
    prefixes: PrefixStore | None = None,
    **more: object,
) -> Engine:
    """A real engine, cache, tokenizer and template around the fake model (`engine.model`)."""
    metadata = tiny_metadata()
    tokenizer = Tokenizer.from_metadata(metadata)
    template = ChatTemplate.from_metadata(metadata, tokenizer)
    kv = KVCache(NUM_LAYERS, LATENT_SIZE, num_pages or -(-context_length // PAGE_TOKENS), "f32", prefixes=prefixes)
    info = ModelInfo("fake", Path("fake.gguf"), 3_000_000, (("Q8_0", 2_000_000), ("F32", 1_000_000)))
    return Engine(FakeModel(kv, next_logits), kv, tokenizer, template, context_length, info, max_step_tokens, **more)


class FakeTower:
    """Sees the mean of an item's pixels: in every feature, as a number that is a token's id, too."""

    def __init__(self, width: int = 4) -> None:
        self.width, self.grids, self.num_closed = width, [], 0

    def encode(self, patches: Patches, on_progress=None, should_stop=None) -> np.ndarray:
        if on_progress is not None:
            on_progress("looking", 0, 1)
        if should_stop is not None and should_stop():
            raise EncodingStopped
        self.grids.append(patches.grid)
        return np.full((patches.grid.num_tokens(), self.width), round(patches.pixels.mean()), np.float32)

    def close(self) -> None:
        self.num_closed += 1


def fake_vision(folder: Path | None = None) -> Vision:
    """A real reader and store around the fake tower."""
    tower = FakeTower()
    return Vision(tower, "tower", MediaReader(), FeatureStore(tower.width, folder, "tower", 1 << 30))


def scripted_logits(tokenizer: Tokenizer, answer: Callable[[str], tuple[str, str]]) -> NextLogits:
    """Logits of a model that gives `answer(its prompt as text)`, reasoning if it is to think, content, the end."""
    assistant, end = tokenizer.special["<|im_assistant|>"], tokenizer.special["<|im_end|>"]
    think, think_end = tokenizer.special["<think>"], tokenizer.special["</think>"]

    def next_logits(context: list[int]) -> np.ndarray:
        turn = len(context) - 1 - context[::-1].index(assistant)
        start = context.index(think, turn) + 1
        reasoning, content = answer(tokenizer.decode(context[:turn]))
        said, ids = context[start:], [*tokenizer.encode(content), end]
        if said[:1] == [think_end]:  # instant: the prompt closed the reasoning
            said = said[1:]
        else:
            ids = [*tokenizer.encode(reasoning), think_end, *ids]
        logits = np.zeros(VOCAB_SIZE, np.float32)
        logits[ids[len(said)]] = 100.0
        return logits

    return next_logits
