"""Runs a text through a model layer by layer and shows every matrix's inputs: for importance matrices and calibration.

    walk = LayerWalk(store, config)
    for layer in walk.layers(chunks, observe): ...   # observe(Inputs) is called for each matrix and chunk
    walk.run_layer(7, chunk, x)                      # or a layer at a time, over hidden states of one's own

The loop over layers is the outer one, and the hidden states of all chunks wait in memory: each layer's weights are read
once, so models larger than memory work. The operations are those of `transformer.Transformer`, run one at a time; they
say themselves which weights they read (`ops.Reads`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.model.cpu.layers import MAX_ABSORBED_TOKENS, MAX_BATCH_TOKENS, Layers
from kimi_lite.model.cpu.ops import Inputs, LayerOp, make_program
from kimi_lite.model.cpu.weights import vector
from kimi_lite.native.cpu.program import Program
from kimi_lite.native.cpu.threads import Team
from kimi_lite.native.latent_rows import PAGE_TOKENS

MAX_CHUNK_TOKENS = MAX_BATCH_TOKENS

Observe = Callable[[Inputs], None]


class Residency(Protocol):
    """Whose tensors have their bytes only while a layer runs; -1 is the embedding."""

    @property
    def largest_layer_bytes(self) -> int: ...

    def load(self, layer: int) -> None: ...

    def release(self, layer: int) -> None: ...


class LayerWalk:
    """A model whose layers run one after the other over many independent chunks of text."""

    def __init__(
        self,
        store: GGUFStore,
        config: ModelConfig,
        num_threads: int | None = None,
        on_compile: Callable[[int, int], None] | None = None,
        residency: Residency | None = None,
        team: Team | None = None,
    ) -> None:
        """`residency` is told which layer runs, where the store's tensors are not always there. `team`: the threads of
        another walk, which rests meanwhile and closes them. Raises KimiLiteError as `layers.Layers` does."""
        num_pages = MAX_CHUNK_TOKENS // PAGE_TOKENS
        kv = KVCache(config.num_layers, config.kv_latent_size, num_pages)
        self.config, self.store, self.metadata = config, store, store.metadata
        self._layers = Layers(store, config, kv, num_threads, on_compile, team=team)
        self._embedding = make_program(self._layers.embedding_ops())
        self._output_norm = vector(store, "output_norm.weight")
        self._pages = np.arange(num_pages, dtype=np.int32)
        self._names = frozenset(store.tensors)
        self._residency = residency
        self._steps: tuple[int, list[tuple[LayerOp, Program]]] | None = None  # of the layer that ran last

    def layers(self, chunks: Sequence[np.ndarray], observe: Observe) -> Iterator[int]:
        """Yields each layer's number when its inputs have been shown for all chunks, at last the number of layers for
        the output matrix. chunks: int32 token ids, each at most MAX_CHUNK_TOKENS, each a text of its own."""
        with self.resident(-1):
            hidden = [self.embed(chunk) for chunk in chunks]
        for layer in range(self.config.num_layers):
            with self.resident(layer):
                for chunk, x in zip(chunks, hidden, strict=True):
                    self.run_layer(layer, chunk, x, observe)
            yield layer
        for x in hidden:
            self.show_output(x, observe)
        yield self.config.num_layers

    @contextmanager
    def resident(self, layer: int) -> Iterator[None]:
        """Around what runs a layer: its weights are there. -1: the embedding."""
        if self._residency is None:
            yield
            return
        self._residency.load(layer)
        try:
            yield
        finally:
            self._residency.release(layer)

    def embed(self, chunk: np.ndarray) -> np.ndarray:
        """float32 (T, D): the hidden states in front of the first layer."""
        assert 0 < len(chunk) <= MAX_CHUNK_TOKENS, len(chunk)
        self._layers.run.set_tokens(np.asarray(chunk, np.int32))
        self._layers.team.run(self._embedding)
        return self._layers.buffers.x[: len(chunk)].copy()

    def run_layer(self, layer: int, chunk: np.ndarray, x: np.ndarray, observe: Observe | None = None) -> None:
        """x (T, D) float32: the chunk's hidden states, taken through one layer, in place. The last rows attend in the
        absorbed form, which shows attn_v_b's inputs."""
        if self._steps is None or self._steps[0] != layer:
            self._steps = (layer, [(op, make_program([op])) for op in self._layers.ops(layer)])
        buffers = self._layers.buffers
        batch = self._batch(chunk)
        self._layers.prepare(batch, expanded_until=max(0, len(chunk) - MAX_ABSORBED_TOKENS))
        buffers.x[: len(x)] = x
        for op, program in self._steps[1]:
            if observe:
                self._show(op, len(x), observe, is_after=False)
            self._layers.team.run(program)
            if observe:
                self._show(op, len(x), observe, is_after=True)
        x[:] = buffers.x[: len(x)]

    def show_output(self, x: np.ndarray, observe: Observe) -> None:
        """The inputs of the output matrix, from what the last layer left of a chunk."""
        observe(Inputs(("output.weight",), self.normed_output(x), num_tokens=len(x)))

    def normed_output(self, x: np.ndarray) -> np.ndarray:
        """float32 (T, D): hidden states behind the last layer (T, D) as the head takes them."""
        wide = x.astype(np.float64)
        scale = 1 / np.sqrt((wide**2).mean(axis=1, keepdims=True) + self.config.rms_norm_eps)
        return (wide * scale * self._output_norm).astype(np.float32)

    @property
    def resident_bytes(self) -> int:
        """Memory that the weights of a layer take while it runs, where they are not mapped from a file."""
        return self._residency.largest_layer_bytes if self._residency else 0

    @property
    def team(self) -> Team:
        return self._layers.team

    def close(self) -> None:
        """Ends the threads."""
        self._layers.close()

    def _show(self, op: LayerOp, num_tokens: int, observe: Observe, is_after: bool) -> None:
        for reads in op.reads:
            weights = tuple(name for name in reads.weights if name in self._names)
            if weights and reads.is_after == is_after:
                observe(reads.inputs(weights, num_tokens))

    def _batch(self, chunk: np.ndarray) -> Batch:
        num_tokens = len(chunk)
        positions = np.arange(num_tokens, dtype=np.int32)
        whole = (SequenceSlice(0, num_tokens, self._pages),)
        return Batch(np.asarray(chunk, np.int32), positions, np.zeros(num_tokens, bool), whole)
