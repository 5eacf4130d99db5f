"""Runs a text through a model layer by layer and shows every matrix's inputs: for importance matrices and calibration.

    walk = LayerWalk(store, config)
    for layer in walk.layers(chunks, observe): ...   # observe(Inputs) is called for each matrix and chunk

The loop over layers is the outer one, and the hidden states of all chunks wait in memory: each layer's weights are read
once, so models larger than memory work. The operations are those of `Transformer`, run one at a time; its own path is
untouched.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.model.cpu.attention import Op
from kimi_lite.model.cpu.experts import LayerExperts
from kimi_lite.model.cpu.transformer import MAX_ABSORBED_TOKENS, MAX_BATCH_TOKENS, Transformer
from kimi_lite.native.cpu.threads import Program
from kimi_lite.native.latent_rows import PAGE_TOKENS

MAX_CHUNK_TOKENS = MAX_BATCH_TOKENS


class Inputs(NamedTuple):
    """What matrices are multiplied with, valid until the callback returns. `weights`: the GGUF names of tensors that
    take the same inputs. `values`: float32 (rows, k). Matrix m of the tensor (expert or head) takes
    values[rows[starts[m]:starts[m + 1]]]; without `starts` there is one matrix and it takes all. `num_tokens`: of the
    chunk, 0 where `starts` counts for each matrix."""

    weights: tuple[str, ...]
    values: np.ndarray
    starts: np.ndarray | None = None  # (matrices + 1,)
    rows: np.ndarray | None = None  # (starts[-1],); None: 0, 1, 2, ...
    num_tokens: int = 0


Observe = Callable[[Inputs], None]


class LayerWalk(Transformer):
    """A model whose layers run one after the other over many independent chunks of text."""

    def __init__(
        self,
        store: GGUFStore,
        config: ModelConfig,
        num_threads: int | None = None,
        on_compile: Callable[[int, int], None] | None = None,
    ) -> None:
        num_pages = MAX_CHUNK_TOKENS // PAGE_TOKENS
        super().__init__(
            store, config, KVCache(config.num_layers, config.kv_latent_size, num_pages), num_threads, on_compile
        )
        self._pages = np.arange(num_pages, dtype=np.int32)
        self._names = frozenset(store.tensors)
        self.metadata = store.metadata

    def layers(self, chunks: Sequence[np.ndarray], observe: Observe) -> Iterator[int]:
        """Yields each layer's number when its inputs have been shown for all chunks, at last the number of layers for
        the output matrix. chunks: int32 token ids, each at most MAX_CHUNK_TOKENS, each a text of its own."""
        assert all(0 < len(chunk) <= MAX_CHUNK_TOKENS for chunk in chunks), [len(chunk) for chunk in chunks]
        hidden = [self._embed(chunk) for chunk in chunks]
        for layer in range(self.config.num_layers):
            steps = self._steps(layer)
            for chunk, x in zip(chunks, hidden, strict=True):
                self._prepare(self._batch(chunk))
                self._buffers.x[: len(x)] = x
                for program, before, after in steps:
                    _show(before, len(x), observe)
                    self.team.run(program)
                    _show(after, len(x), observe)
                x[:] = self._buffers.x[: len(x)]
            yield layer
        for x in hidden:
            observe(Inputs(("output.weight",), self._normed_output(x), num_tokens=len(x)))
        yield self.config.num_layers

    def _batch(self, chunk: np.ndarray) -> Batch:
        """The chunk as two pieces of one sequence: the last rows attend in the absorbed form, which shows attn_v_b's
        inputs."""
        num_tokens, first = len(chunk), max(0, len(chunk) - MAX_ABSORBED_TOKENS)
        pieces = [(0, first), (first, num_tokens - first)]
        slices = tuple(SequenceSlice(start, length, self._pages) for start, length in pieces if length)
        positions = np.arange(num_tokens, dtype=np.int32)
        return Batch(np.asarray(chunk, np.int32), positions, np.zeros(num_tokens, bool), slices)

    def _choose_expanded(self, sequences: tuple[SequenceSlice, ...]) -> list[SequenceSlice]:
        return list(sequences[:-1])

    def _embed(self, chunk: np.ndarray) -> np.ndarray:
        self._run.set_tokens(np.asarray(chunk, np.int32))
        self.team.run(self._layer_programs[0])
        return self._buffers.x[: len(chunk)].copy()

    def _normed_output(self, x: np.ndarray) -> np.ndarray:
        wide = x.astype(np.float64)
        scale = 1 / np.sqrt((wide**2).mean(axis=1, keepdims=True) + self.config.rms_norm_eps)
        return (wide * scale * self._output_norm).astype(np.float32)

    def _steps(self, layer: int) -> list[tuple[Program, Callable | None, Callable | None]]:
        """Every operation of the layer as a program of its own, with what shows its inputs before and after it."""
        attention, feed_forward = self._layers[layer]
        run, buffers = self._run.address, self._buffers
        ops = attention.ops(run, buffers, self.kv.storage[layer].ctypes.data, self.kv.dtype)
        ops += feed_forward.ops(run, buffers)
        groups = iter(feed_forward.experts)
        return [(_single(op), *self._showing(op.stage, f"blk.{layer}.", groups)) for op in ops]

    def _showing(
        self, stage: str, block: str, groups: Iterator[LayerExperts]
    ) -> tuple[Callable[[int], Iterator[Inputs]] | None, Callable[[int], Iterator[Inputs]] | None]:
        """(before, after) of the operation of this stage: callables that take the number of tokens and yield Inputs."""
        b, normed = self._buffers, self._buffers.normed.values
        plain = {
            "attn_q, kv_a": (("attn_q", "attn_kv_a_mqa"), normed),
            "attn_q_a, kv_a": (("attn_q_a", "attn_kv_a_mqa"), normed),
            "attn_q_b": (("attn_q_b",), b.q_compressed.values if self.config.q_lora_rank else normed),
            "attn_output": (("attn_output",), b.heads.values),
            "ffn_gate_inp": (("ffn_gate_inp",), normed),
        }
        if stage in plain:
            names, values = plain[stage]
            weights = self._existing(block, *names)
            return (lambda n: iter([Inputs(weights, values[:n], num_tokens=n)])), None
        if stage == "attn_k_b":
            return (lambda n: self._show_queries(block, n)), None
        if stage == "attn_v_b":
            return None, (lambda n: self._show_contexts(block, n))
        if stage in ("experts", "shared expert", "dense ffn"):
            experts = next(groups)
            return (lambda n: self._show_ffn_inputs(block, experts, n)), (
                lambda n: self._show_hidden(block, experts, n)
            )
        return None, None

    def _existing(self, block: str, *names: str) -> tuple[str, ...]:
        return tuple(f"{block}{name}.weight" for name in names if f"{block}{name}.weight" in self._names)

    def _show_queries(self, block: str, num_tokens: int) -> Iterator[Inputs]:
        """attn_k_b's inputs: the part of each head's query that is not rotated."""
        heads, nope = self.config.num_heads, self.config.qk_nope_head_dim
        queries = self._buffers.q[:num_tokens].reshape(num_tokens, heads, -1)[:, :, :nope]
        yield from self._by_head(self._existing(block, "attn_k_b"), queries)

    def _show_contexts(self, block: str, num_tokens: int) -> Iterator[Inputs]:
        """attn_v_b's inputs: each head's mean latent, of the rows that attended in the absorbed form."""
        heads, num_rows = self.config.num_heads, min(num_tokens, MAX_ABSORBED_TOKENS)
        contexts = self._buffers.attention.context.values[: num_rows * heads].reshape(num_rows, heads, -1)
        yield from self._by_head(self._existing(block, "attn_v_b"), contexts)

    def _by_head(self, weights: tuple[str, ...], values: np.ndarray) -> Iterator[Inputs]:
        """values: (T, heads, k)"""
        num_tokens, heads, k = values.shape
        starts = np.arange(heads + 1) * num_tokens
        yield Inputs(weights, values.swapaxes(0, 1).reshape(-1, k), starts, num_tokens=num_tokens)

    def _show_ffn_inputs(self, block: str, experts: LayerExperts, num_tokens: int) -> Iterator[Inputs]:
        """Inputs of gate and up: of each routed expert those of the tokens that chose it."""
        values = self._buffers.normed.values[:num_tokens]
        if self._num_routed(experts):
            order, starts = self._slots(num_tokens)
            names = self._existing(block, "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps")
            yield Inputs(names, values, starts, order // self.config.num_experts_used)
        if experts.num_always:
            names = self._existing(block, "ffn_gate_shexp", "ffn_up_shexp", "ffn_gate", "ffn_up")
            yield Inputs(names, values, num_tokens=num_tokens)

    def _show_hidden(self, block: str, experts: LayerExperts, num_tokens: int) -> Iterator[Inputs]:
        """Inputs of down: the kernel's slots lie expert by expert, the experts that every token takes last."""
        hidden = self._buffers.hidden(experts.width).values
        num_slots = 0
        if self._num_routed(experts):
            _, starts = self._slots(num_tokens)
            num_slots = int(starts[-1])
            yield Inputs(self._existing(block, "ffn_down_exps"), hidden[:num_slots], starts)
        if experts.num_always:
            pieces = hidden[num_slots : num_slots + experts.num_always * num_tokens].reshape(
                experts.num_always, num_tokens, -1
            )
            whole = np.concatenate(list(pieces), axis=1)  # a wide shared expert runs as several narrow ones
            yield Inputs(self._existing(block, "ffn_down_shexp", "ffn_down"), whole, num_tokens=num_tokens)

    def _num_routed(self, experts: LayerExperts) -> int:
        return len(experts.matrices) - experts.num_always

    def _slots(self, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The kernel's order of (token, choice) pairs, by expert and then by token; where each expert's begin (experts
        + 1,)."""
        ids = self._buffers.expert_ids[:num_tokens].reshape(-1)
        counts = np.bincount(ids, minlength=self.config.num_experts)
        return np.argsort(ids, kind="stable"), np.concatenate([[0], np.cumsum(counts)])


def _single(op: Op) -> Program:
    return Program([(op.kernel, op.arguments)])


def _show(make: Callable[[int], Iterator[Inputs]] | None, num_tokens: int, observe: Observe) -> None:
    for inputs in make(num_tokens) if make else ():
        if inputs.weights:
            observe(inputs)
