"""Where logits come from in `tools.quality` but for our own forward pass (`engine.scoring`): llama.cpp, or a file that
an earlier run wrote."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kimi_lite.engine.scoring import CHUNK_TOKENS, FIRST_SCORED, log_softmax
from kimi_lite.errors import KimiLiteError

_FORMAT = "kimi-lite log-probabilities 1"
_HINT = "Make it again with --save."


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
        self.source, self.name = metadata["name"], f"{metadata['name']} ({path.name})"
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
