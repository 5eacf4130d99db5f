"""Where logits come from in `tools.quality`: our forward pass, llama.cpp's, or a file that an earlier run wrote."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.engine.loader import load
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.options import Options
from kimi_lite.tools.quality.score import CHUNK_TOKENS, FIRST_SCORED, log_softmax

_FORMAT = "kimi-lite log-probabilities 1"
_HINT = "Make it again with --save."


class Source(Protocol):
    """Normalized log-probabilities of the rows of a chunk that are scored, float32 (255, vocabulary)."""

    name: str

    def scored_rows(self, index: int, chunk: np.ndarray) -> np.ndarray: ...

    def close(self) -> None: ...


class OurLogits:
    """A model through our forward pass, with a cache for one chunk."""

    def __init__(
        self, path: Path, num_threads: int | None = None, expert_share: float | None = None, cache_bias: float = 0.0
    ) -> None:
        """expert_share: of the routed experts that RAM holds, the others come through the disk tier. With a cache_bias
        tokens run one by one, because that is how it is meant: what is there changes from token to token."""
        self.store = GGUFStore.open(path)
        self.name = self.store.path.name
        self.config = ModelConfig.from_metadata(self.store.metadata, self.name)
        num_bytes = None
        if expert_share is not None:
            num_bytes = int(expert_share * ExpertIndex.find(self.store, self.config).routed_bytes)
        options = Options(
            context_length=CHUNK_TOKENS,
            num_threads=num_threads,
            device="cpu",
            cache_bias=cache_bias,
            ram_expert_bytes=num_bytes,
            keeps_heat=False,
        )
        self._engine = load(path, options)
        self.tokenizer = self._engine.tokenizer
        self._pages = np.arange(CHUNK_TOKENS // PAGE_TOKENS, dtype=np.int32)
        self._is_one_by_one = cache_bias > 0

    @property
    def num_threads(self) -> int:
        return self._engine.plan.num_threads

    @property
    def bos_id(self) -> int | None:
        """The token that every text begins with, where the file says so."""
        says_so = bool(self.store.metadata.get("tokenizer.ggml.add_bos_token", False))
        bos_id = self.store.metadata.get("tokenizer.ggml.bos_token_id")
        return int(bos_id) if says_so and bos_id is not None else None

    def close(self) -> None:
        self._engine.close()

    def logits(self, ids: np.ndarray, first: int = 0) -> np.ndarray:
        """float32 (T - first, vocabulary): rows `first ..` of one prompt of at most 512 tokens."""
        if not self._is_one_by_one:
            return self._forward(ids, 0, first)
        return np.concatenate([self._forward(ids[i : i + 1], i, first) for i in range(len(ids))])

    def _forward(self, ids: np.ndarray, start: int, first: int) -> np.ndarray:
        positions = np.arange(start, start + len(ids), dtype=np.int32)
        whole = (SequenceSlice(0, len(ids), self._pages),)
        return self._engine.model.forward(Batch(np.asarray(ids, np.int32), positions, positions >= first, whole))

    def expert_counters(self) -> dict[str, float]:
        """What the disk tier did; nothing without it."""
        return self._engine.model.counters()

    def scored_rows(self, index: int, chunk: np.ndarray) -> np.ndarray:
        return log_softmax(self.logits(chunk[:-1], FIRST_SCORED))


class LlamaLogits:
    """The same file through llama.cpp."""

    name = "llama.cpp"

    def __init__(self, path: Path, num_threads: int) -> None:
        from kimi_lite.tools.bench.llama import Llama

        self.llama = Llama(path, num_threads, CHUNK_TOKENS)

    def close(self) -> None:
        self.llama.close()

    def scored_rows(self, index: int, chunk: np.ndarray) -> np.ndarray:
        return log_softmax(self.llama.logits(chunk[:-1], FIRST_SCORED))


class StoredLogits:
    """Log-probabilities in a .safetensors file, float16: finest where tokens are likely, which is where they count."""

    def __init__(self, path: Path, num_chunks: int, ids_hash: str) -> None:
        """Raises KimiLiteError for another text or fewer chunks."""
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="numpy")
            metadata = self._file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise KimiLiteError(f"{path}: {error}.", _HINT) from error
        if metadata.get("format") != _FORMAT:
            raise KimiLiteError(f"{path} does not hold log-probabilities.", _HINT)
        if metadata["ids"] != ids_hash:
            raise KimiLiteError(f"{path} is of other tokens: another text, tokenizer, or number of chunks.", _HINT)
        self.name = f"{metadata['name']} ({path.name})"
        assert int(metadata["num_chunks"]) == num_chunks, metadata

    def close(self) -> None:
        del self._file

    def scored_rows(self, index: int, chunk: np.ndarray) -> np.ndarray:
        return log_softmax(self._file.get_tensor(f"chunk.{index}").astype(np.float32))


def save_rows(path: Path, rows: Sequence[np.ndarray], name: str, ids_hash: str) -> None:
    """For `StoredLogits`. rows: float16 (255, vocabulary) for each chunk."""
    from safetensors.numpy import save_file

    metadata = {"format": _FORMAT, "name": name, "ids": ids_hash, "num_chunks": str(len(rows))}
    partial = path.with_name(path.name + ".partial")
    save_file({f"chunk.{i}": each for i, each in enumerate(rows)}, partial, metadata)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def hash_ids(chunks: Sequence[np.ndarray]) -> str:
    return hashlib.sha256(json.dumps([chunk.tolist() for chunk in chunks]).encode()).hexdigest()
