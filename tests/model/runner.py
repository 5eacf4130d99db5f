"""Runs a GGUF file through the store, the configuration and the Transformer, without the engine."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.model.cpu.transformer import Transformer
from kimi_lite.options import Options

NUM_PAGES = 12


def no_recorder(config: ModelConfig) -> None:
    """Nobody wants to know which experts a row of logits came from."""


make_recorder = no_recorder  # of runners that have none; tests.model.hybrid.closeness has another


class Runner:
    """A loaded model whose cache pages are handed out by the test; pages are in no particular order on purpose."""

    def __init__(
        self,
        path: Path,
        kv_dtype: str = "f32",
        num_threads: int = 2,
        ram_expert_bytes: int | None = None,
        heat_file: Path | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
        recorder: RoutingRecorder | None = None,
        **options: object,
    ) -> None:
        self.store = GGUFStore.open(path)
        self.config = ModelConfig.from_metadata(self.store.metadata)
        self.kv = KVCache(self.config.num_layers, self.config.kv_latent_size, NUM_PAGES, kv_dtype)
        chosen = Options(num_threads=num_threads, **options)
        self.watched = None if recorder else make_recorder(self.config)
        self.transformer = Transformer(
            self.store,
            self.config,
            self.kv,
            chosen,
            ram_expert_bytes,
            heat_file,
            on_progress,
            recorder or self.watched,
        )
        self.pages = np.array([3, 1, 0, 2, 5, 4, 7, 6, 11, 10, 9, 8], np.int32)

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_) -> None:
        self.transformer.close()

    def forward(self, *parts: tuple[np.ndarray, int, np.ndarray], num_generated: int = 0) -> np.ndarray:
        """Each part is (token ids, first position, pages) of one sequence, the first `num_generated` parts of generated
        tokens; logits (all tokens, vocabulary)."""
        ids = np.concatenate([part[0] for part in parts]).astype(np.int32)
        positions = np.concatenate([np.arange(start, start + len(t)) for t, start, _ in parts]).astype(np.int32)
        starts = np.cumsum([0, *(len(part[0]) for part in parts)])
        slices = tuple(
            SequenceSlice(int(s), len(t), p, is_generated=i < num_generated)
            for i, (s, (t, _, p)) in enumerate(zip(starts, parts, strict=False))
        )
        logits = self.transformer.forward(Batch(ids, positions, np.ones(len(ids), bool), slices))
        if self.watched:
            self.transformer.counters()  # counts, and so records, the pass
            self.watched.keep(logits)
        return logits

    def prefill(self, ids: np.ndarray, start: int = 0) -> np.ndarray:
        return self.forward((ids, start, self.pages))

    def decode(self, ids: np.ndarray, start: int = 0) -> np.ndarray:
        """The same tokens, one at a time."""
        parts = [(ids[i : i + 1], start + i, self.pages) for i in range(len(ids))]
        return np.concatenate([self.forward(part, num_generated=1) for part in parts])


def relative_errors(have: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Relative distance of each row of logits (T, vocabulary) from what is wanted, (T,)."""
    return np.linalg.norm(have - want, axis=1) / np.linalg.norm(want, axis=1)


def relative_error(have: np.ndarray, want: np.ndarray) -> float:
    """The largest of `relative_errors`."""
    return float(relative_errors(have, want).max())


def mean_divergence(have: np.ndarray, want: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence D(want || have) in nats of next-token distributions from logits (T,
    vocabulary)."""
    p, q = _log_softmax(want), _log_softmax(have)
    return float((np.exp(p) * (p - q)).sum(1).mean())


def perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    """exp of the mean loss of ids[1:] under logits[:-1]."""
    rows = np.arange(len(ids) - 1)
    return float(np.exp(-_log_softmax(logits[:-1])[rows, ids[1:]].mean()))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(1, keepdims=True))
