"""The forward pass on the CPU: a batch of tokens in, logits out.

All layers are laid out once, when the model is loaded, as one program of native kernels that the thread team walks
through; a decode step is then a single call. Prompts run layer by layer so that they can be cancelled in between.
"""

from collections.abc import Callable

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.rope import rope_attention_factor, rope_inverse_frequencies
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.options import TierOptions
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.host import usable_cores
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, Cancelled, SequenceSlice
from kimi_lite.model.cpu.attention import Attention, Op
from kimi_lite.model.cpu.buffers import Buffers
from kimi_lite.model.cpu.moe import FeedForward
from kimi_lite.model.cpu.tiers import TieredLayers
from kimi_lite.model.cpu.weights import check_types, compile_kernels, matrix, vector
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.attention import num_splits
from kimi_lite.native.cpu.attention_prefill import expanded_is_cheaper, prefill_scratch_bytes
from kimi_lite.native.cpu.experts import experts_scratch_bytes
from kimi_lite.native.cpu.linear import embed_op, linear_op, rms_norm_op
from kimi_lite.native.cpu.run import RECORD_BYTES, RunTable
from kimi_lite.native.cpu.threads import Program, Team
from kimi_lite.native.latent_rows import PAGE_TOKENS

MAX_BATCH_TOKENS = 512  # rows of one forward pass; longer prompts come in chunks
MAX_ABSORBED_TOKENS = 64  # rows that attend in the absorbed form; longer slices are expanded
MAX_LOGITS = 64  # rows of logits made at once
_UNINTERRUPTED_TOKENS = 8  # batches up to here run as one program


class Transformer:
    """A loaded model. `forward` is not reentrant: one batch at a time."""

    def __init__(
        self,
        store: GGUFStore,
        config: ModelConfig,
        kv: KVCache,
        num_threads: int | None = None,
        on_compile: Callable[[int, int], None] | None = None,
        tier: TierOptions | None = None,
        recorder: RoutingRecorder | None = None,
        on_load: Callable[[int, int], None] | None = None,
    ) -> None:
        """Raises KimiLiteError for a missing tensor, a type without a kernel or sizes the kernels cannot take.

        num_threads: default, physical cores. on_compile(kernels done, kernels in all): the first run takes seconds.
        tier: where the routed experts do not fit into RAM, or are to be loaded; None: all are read in place. recorder:
        of what tokens choose. on_load(bytes done, bytes in all): where the tier loads everything at once.
        """
        check_types(store)
        check_sizes(config)
        compile_kernels(store, on_compile or (lambda done, total: None))
        self.config, self.kv = config, kv
        self.max_batch_tokens = MAX_BATCH_TOKENS
        self.team = Team(num_threads or usable_cores().num_usable)
        attention = [Attention(store, config, layer) for layer in range(config.num_layers)]
        feed_forward = [FeedForward(store, config, layer) for layer in range(config.num_layers)]
        self._shape = (
            *(config.num_heads, config.qk_nope_head_dim, config.qk_rope_head_dim),
            *(config.kv_lora_rank, config.v_head_dim),
        )
        width = max(experts.width for layer in feed_forward for experts in layer.experts)
        widest = max(width, config.hidden_size, config.num_heads * config.v_head_dim, config.q_lora_rank)
        scratch_bytes = max(
            prefill_scratch_bytes(MAX_BATCH_TOKENS, self._shape),
            experts_scratch_bytes(config.hidden_size, widest, MAX_BATCH_TOKENS),
        )
        num_slots = MAX_BATCH_TOKENS * (config.num_experts_used + max(1, config.num_shared_experts))
        self._run = RunTable(MAX_BATCH_TOKENS, self.team.num_threads, scratch_bytes, num_slots)
        self._inverse_frequencies = rope_inverse_frequencies(config)  # (rope / 2,)
        self._rope_factor = rope_attention_factor(config)
        kinds = _activation_kinds(config, attention, feed_forward)
        self._buffers = Buffers(config, MAX_BATCH_TOKENS, MAX_ABSORBED_TOKENS, kinds)
        self._layers = list(zip(attention, feed_forward, strict=True))  # keeps the weights mapped
        self._recorder, self._tiers = recorder, None
        try:
            self._lay_out(store, tier, on_load or (lambda done, total: None))
        except BaseException:
            self.team.close()
            raise

    def _lay_out(self, store: GGUFStore, tier: TierOptions | None, on_load: Callable[[int, int], None]) -> None:
        """Makes the programs: one per layer, one of all layers, and the head; or the tiers' own for the layers."""
        run, buffers, c = self._run.address, self._buffers, self.config
        self._token_embd = matrix(store, "token_embd.weight")
        layers: list[list[Op]] = [[Op("token_embd", *embed_op(run, self._token_embd.table, buffers.x))]]
        halves = []
        for layer, (attention, feed_forward) in enumerate(self._layers):
            storage = self.kv.storage[layer].ctypes.data
            halves.append((attention.ops(run, buffers, storage, self.kv.dtype), feed_forward))
            layers.append([*halves[-1][0], *feed_forward.ops(run, buffers)])
        if tier is not None:
            self._tiers = TieredLayers(store, c, tier, run, buffers, self.team, layers[0], halves, on_load)
        self._layer_programs = [_program(ops) for ops in layers]
        self._whole = _program([op for ops in layers for op in ops])
        self._output_norm, self._output = vector(store, "output_norm.weight"), matrix(store, "output.weight")
        self._head_x = np.zeros((MAX_LOGITS, c.hidden_size), np.float32)
        self._head_normed = Activations(MAX_LOGITS, c.hidden_size, {self._output.kind} - {0})
        self._logits = np.zeros((MAX_LOGITS, c.vocab_size), np.float32)
        scratch_bytes = experts_scratch_bytes(c.hidden_size, 0, MAX_LOGITS)
        self._head_run = RunTable(MAX_LOGITS, self.team.num_threads, scratch_bytes)
        head = self._head_run.address
        head_ops = [
            Op("output_norm", *rms_norm_op(head, self._head_x, self._output_norm, self._head_normed, c.rms_norm_eps)),
            Op("output", *linear_op(head, self._head_normed, [(self._output.table, self._logits, False)])),
        ]
        self._head = _program(head_ops)
        names = ["embedding", *(f"layer {layer}" for layer in range(c.num_layers))]
        stages = [[(name, op.stage) for op in ops] for name, ops in zip(names, layers, strict=True)]
        whole = [
            *zip(self._layer_programs, stages, strict=True),
            (self._whole, [stage for part in stages for stage in part]),
        ]
        self.programs = [
            *(self._tiers.programs if self._tiers and not self._tiers.holds_all else whole),
            (self._head, [("head", op.stage) for op in head_ops]),
        ]  # with (part, stage) of every operation, for those who measure

    def forward(self, batch: Batch, should_stop: Callable[[], bool] | None = None) -> np.ndarray:
        """Runs the batch and fills its cache slots. Returns float32 (rows where wants_logits, vocabulary).

        Raises `Cancelled` between layers when `should_stop()` becomes true.
        """
        num_tokens = len(batch.token_ids)
        assert num_tokens <= MAX_BATCH_TOKENS, num_tokens
        self._prepare(batch)
        if self._recorder:
            self._record_layers(num_tokens, should_stop)
        else:
            self._run_layers(num_tokens, should_stop, None)
        rows = np.flatnonzero(batch.wants_logits)
        return np.concatenate(
            [self._head_logits(rows[i : i + MAX_LOGITS]) for i in range(0, len(rows), MAX_LOGITS)]
            or [np.empty((0, self.config.vocab_size), np.float32)]
        )

    def counters(self) -> dict[str, float]:
        """What the tiers did since the model was loaded; nothing where there are none."""
        return self._tiers.counters() if self._tiers else {}

    def heat(self) -> np.ndarray | None:
        """(layers, experts): how much each routed expert was used lately; None where choices are not looked at."""
        return self._tiers.slots.export_heat().sum(axis=0) if self._tiers and not self._tiers.holds_all else None

    def close(self) -> None:
        """Ends the threads, writes the record of routing and the experts' heat."""
        self.team.close()
        if self._tiers:
            self._tiers.close()
        if self._recorder:
            self._recorder.close()

    def _run_layers(
        self,
        num_tokens: int,
        should_stop: Callable[[], bool] | None,
        on_choice: Callable[[int, np.ndarray], None] | None,
    ) -> None:
        """Embedding and all layers. on_choice(layer, expert ids (T, K)): after each layer that routes."""
        if self._tiers and not self._tiers.holds_all:
            self._tiers.run(num_tokens, should_stop, on_choice)
        elif num_tokens <= _UNINTERRUPTED_TOKENS and on_choice is None:
            self.team.run(self._whole)
        else:
            for layer, program in enumerate(self._layer_programs, start=-1):  # the embedding comes first
                if num_tokens > _UNINTERRUPTED_TOKENS and should_stop and should_stop():
                    raise Cancelled
                self.team.run(program)
                if on_choice and layer >= self.config.num_dense_layers:
                    on_choice(layer, self._buffers.expert_ids[:num_tokens])

    def _record_layers(self, num_tokens: int, should_stop: Callable[[], bool] | None) -> None:
        self._recorder.begin(num_tokens)
        try:
            self._run_layers(num_tokens, should_stop, self._recorder.add)
        except BaseException:
            self._recorder.drop()
            raise

    def _head_logits(self, rows: np.ndarray) -> np.ndarray:
        self._head_x[: len(rows)] = self._buffers.x[rows]
        self._head_run.set_tokens(rows.astype(np.int32))  # only their number matters here
        self.team.run(self._head)
        return self._logits[: len(rows)].copy()

    def _prepare(self, batch: Batch) -> None:
        """Tells the kernels about this batch: tokens, rotations, cache slots, and who attends in which form."""
        self._run.set_tokens(batch.token_ids)
        slots = np.empty(len(batch.token_ids), np.int64)
        for piece in batch.sequences:
            positions = batch.positions[piece.start : piece.start + piece.length]
            pages = piece.pages[positions // PAGE_TOKENS].astype(np.int64)
            slots[piece.start : piece.start + piece.length] = pages * PAGE_TOKENS + positions % PAGE_TOKENS
        angles = batch.positions[:, None] * self._inverse_frequencies  # (T, rope / 2)
        cos, sin = np.cos(angles) * self._rope_factor, np.sin(angles) * self._rope_factor
        self._run.set_positions(slots, cos.astype(np.float32), sin.astype(np.float32))
        expanded = self._choose_expanded(batch.sequences)
        absorbed = [piece for piece in batch.sequences if piece not in expanded]
        rows = [(piece.start + i, 1, piece) for piece in absorbed for i in range(piece.length)]
        longest = int(batch.positions.max()) + 1
        splits = num_splits(len(rows), longest, self.config.num_heads)
        self._run.set_attention(
            _records([(row, 1, batch.positions[row], piece.pages) for row, _, piece in rows]),
            _records([(p.start, p.length, batch.positions[p.start], p.pages) for p in expanded]),
            splits,
            [piece.pages for piece in batch.sequences],
        )

    def _choose_expanded(self, sequences: tuple[SequenceSlice, ...]) -> list[SequenceSlice]:
        """The slices that attend in the expanded form; `kimi_lite.model.cpu.walk` wants others."""
        return choose_expanded(sequences, self._shape)


def check_sizes(config: ModelConfig) -> None:
    """Raise KimiLiteError where a size does not divide into the kernels' vectors. All models of the family do."""
    multiples = {
        "embedding_length": (config.hidden_size, 32),
        "attention.q_lora_rank": (config.q_lora_rank, 32),
        "attention.kv_lora_rank": (config.kv_lora_rank, 32),
        "the part of a key without rotation": (config.qk_nope_head_dim, 32),
        "rope.dimension_count": (config.qk_rope_head_dim, 16),
        "attention.value_length_mla": (config.v_head_dim, 32),
        "feed_forward_length": (config.feed_forward_size if config.num_dense_layers else 0, 32),
        "expert_feed_forward_length": (config.expert_feed_forward_size if config.num_experts else 0, 32),
    }
    for name, (size, multiple) in multiples.items():
        if size % multiple:
            raise KimiLiteError(
                f"{name} is {size}; the kernels need a multiple of {multiple}.", "This model cannot run here."
            )


def _program(ops: list[Op]) -> Program:
    return Program([(op.kernel, op.arguments) for op in ops])


def choose_expanded(sequences: tuple[SequenceSlice, ...], shape: tuple[int, int, int, int, int]) -> list[SequenceSlice]:
    """The slices whose attention is expanded: those where it is cheaper, and the longest beyond what absorbed rows
    allow."""
    absorbed = sorted((p for p in sequences if not expanded_is_cheaper(p.length, shape)), key=lambda p: p.length)
    while sum(p.length for p in absorbed) > MAX_ABSORBED_TOKENS:
        absorbed.pop()
    kept = {id(p) for p in absorbed}
    return [p for p in sequences if id(p) not in kept]


def _records(rows: list[tuple[int, int, int, np.ndarray]]) -> np.ndarray:
    """int64 (n, 6): token, length, first position, address of the page table."""
    records = np.zeros((len(rows), RECORD_BYTES // 8), np.int64)
    for i, (token, length, position, pages) in enumerate(rows):
        assert pages.dtype == np.int32 and pages.flags.c_contiguous, (pages.dtype, pages.strides)
        records[i, :4] = token, length, position, pages.ctypes.data
    return records


def _activation_kinds(config: ModelConfig, attention: list[Attention], feed_forward: list[FeedForward]) -> dict:
    """Which int8 forms each shared buffer needs, over all layers."""
    kinds: dict = {
        "normed": set().union(*(a.input_kinds() for a in attention), *(f.input_kinds() for f in feed_forward)),
        "q_compressed": {a.attn_q_b.kind for a in attention} - {0} if config.q_lora_rank else set(),
        "k_b": {a.attn_k_b.kind for a in attention} - {0},
        "v_b": {a.attn_v_b.kind for a in attention} - {0},
        "heads": {a.attn_output.kind for a in attention} - {0},
    }
    for experts in (experts for layer in feed_forward for experts in layer.experts):
        kinds.setdefault(("hidden", experts.width), set()).update(experts.hidden_kinds)
    return kinds
