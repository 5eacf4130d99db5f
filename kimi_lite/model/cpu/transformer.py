"""The forward pass on the CPU: a batch of tokens in, logits out.

All layers are laid out once, when the model is loaded, as one program of native kernels that the thread team walks
through; a decode step is then a single call. Prompts run layer by layer so that they can be cancelled in between.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.tensors import head_name
from kimi_lite.experts.heat import load_heat, save_heat
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.experts.nodes import placed_groups
from kimi_lite.experts.ram import RamSlots, heat_shape, open_ram
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, Cancelled
from kimi_lite.model.cpu.layers import MAX_BATCH_TOKENS, Layers
from kimi_lite.model.cpu.ops import LayerOp, make_program
from kimi_lite.model.cpu.tiers import TieredLayers
from kimi_lite.model.cpu.weights import matrix, vector
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.experts import experts_scratch_bytes
from kimi_lite.native.cpu.linear import Product, linear_op, rms_norm_op
from kimi_lite.native.cpu.program import Program
from kimi_lite.native.cpu.run import RunTable
from kimi_lite.options import Options

MAX_LOGITS = 64  # rows of logits made at once
_UNINTERRUPTED_TOKENS = 8  # batches up to here run as one program


class Head:
    """The output norm and the logits of up to MAX_LOGITS rows."""

    def __init__(self, store: GGUFStore, config: ModelConfig, num_threads: int) -> None:
        c = config
        norm, output = vector(store, "output_norm.weight"), matrix(store, head_name(store.tensors))
        self.x = np.zeros((MAX_LOGITS, c.hidden_size), np.float32)
        self.run = RunTable(MAX_LOGITS, num_threads, experts_scratch_bytes(c.hidden_size, 0, MAX_LOGITS))
        self.logits = np.zeros((MAX_LOGITS, c.vocab_size), np.float32)
        normed = Activations(MAX_LOGITS, c.hidden_size, {output.kind} - {0})
        self.ops = [
            LayerOp("output_norm", rms_norm_op(self.run, self.x, norm, normed, c.rms_norm_eps)),
            LayerOp("output", linear_op(self.run, normed, Product(output, self.logits))),
        ]
        self.program = make_program(self.ops)


class Transformer:
    """A loaded model. `forward` is not reentrant: one batch at a time."""

    def __init__(
        self,
        store: GGUFStore,
        config: ModelConfig,
        kv: KVCache,
        options: Options | None = None,
        ram_expert_bytes: int | None = None,
        heat_file: Path | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
        recorder: RoutingRecorder | None = None,
    ) -> None:
        """Raises KimiLiteError for a missing tensor, a type without a kernel or sizes the kernels cannot take.

        ram_expert_bytes: what the plan gives the routed experts, which do not all fit into RAM; None: they do, and
        `options.loading` says whether they are read in place. heat_file: where the experts' heat outlives the process,
        where they do not all fit; None: nowhere. on_progress(what is being done, units done, units in all): the first
        run compiles for seconds. recorder: of what tokens choose.
        """
        options, report = options or Options(), on_progress or (lambda stage, done, total: None)
        self.config, self.kv = config, kv
        self.max_batch_tokens = MAX_BATCH_TOKENS
        num_deferred = options.num_deferred_experts if options.defers_on_cpu and ram_expert_bytes is None else 0
        on_compile = partial(report, "preparing kernels")
        is_divided = options.numa != "off"
        self._layers = Layers(store, config, kv, options.num_threads, on_compile, num_deferred, is_divided=is_divided)
        self.team, self._buffers = self._layers.team, self._layers.buffers
        self._recorder, self._heat_file, self._is_closed = recorder, heat_file, False
        self._ram: RamSlots | None = None
        try:
            index, heat = ExpertIndex.find(store, config), None
            if index.layers:
                heat = load_heat(heat_file, heat_shape(index)) if heat_file and ram_expert_bytes is not None else None
                tables = {layer: self._layers.feed_forward[layer].experts[0].table for layer in index.layers}
                on_load = partial(report, "reading experts")
                num_choices = config.num_experts_used
                self._ram = open_ram(
                    index,
                    tables,
                    num_choices,
                    options,
                    ram_expert_bytes,
                    heat,
                    on_load,
                    placed_groups(self.team.groups),
                )
            self._lay_out(store, options.cache_bias)
        except BaseException:
            self._end_threads()
            raise

    def _lay_out(self, store: GGUFStore, cache_bias: float) -> None:
        """Makes the programs: one per layer, one of all layers, and the head; or the steps of layers whose experts come
        from the disk."""
        layers, num_layers = self._layers, self.config.num_layers
        self._tiers: TieredLayers | None = None
        if self._ram and not self._ram.holds_all:
            self._tiers = TieredLayers(self._ram, self.config, layers, cache_bias)
        parts = [layers.embedding_ops(), *(layers.ops(layer) for layer in range(num_layers))]
        self._layer_programs = [make_program(ops) for ops in parts]
        self._whole = make_program([op for ops in parts for op in ops])
        self._head = Head(store, self.config, self.team.num_threads)
        names = ["embedding", *(f"layer {layer}" for layer in range(num_layers))]
        stages = [[(name, op.stage) for op in ops] for name, ops in zip(names, parts, strict=True)]
        whole = [
            *zip(self._layer_programs, stages, strict=True),
            (self._whole, [stage for part in stages for stage in part]),
        ]
        self.programs: list[tuple[Program, list[tuple[str, str]]]] = [
            *(self._tiers.programs if self._tiers else whole),
            (self._head.program, [("head", op.stage) for op in self._head.ops]),
        ]  # with (part, stage) of every operation, for those who measure

    def forward(self, batch: Batch, should_stop: Callable[[], bool] | None = None) -> np.ndarray:
        """Runs the batch and fills its rows of the cache. Returns float32 (rows where wants_logits, vocabulary).

        Raises `Cancelled` between layers when `should_stop()` becomes true.
        """
        num_tokens = len(batch.token_ids)
        assert num_tokens <= MAX_BATCH_TOKENS, num_tokens
        self._layers.prepare(batch)
        if self._recorder:
            self._record_layers(batch, should_stop)
        else:
            self._run_layers(batch, should_stop, None)
        rows, num_generated = np.flatnonzero(batch.wants_logits), batch.num_generated
        return np.concatenate(
            [self._head_logits(rows[i : i + MAX_LOGITS], num_generated) for i in range(0, len(rows), MAX_LOGITS)]
            or [np.empty((0, self.config.vocab_size), np.float32)]
        )

    def counters(self) -> dict[str, float]:
        """What slots in RAM did since the model was loaded; nothing where all experts are mapped."""
        return self._ram.counters() if self._ram else {}

    def heat(self) -> np.ndarray | None:
        """(layers, experts): how much each routed expert was used lately; None where choices are not looked at."""
        return self._tiers.slots.export_heat().sum(axis=0) if self._tiers else None

    def close(self) -> None:
        """Ends the threads, writes the experts' heat and the record of routing. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._end_threads()
        if self._tiers and self._heat_file:
            save_heat(self._heat_file, self._tiers.slots.export_heat())
        if self._recorder:
            self._recorder.close()

    def _end_threads(self) -> None:
        self.team.close()
        if self._ram:
            self._ram.close()

    def _run_layers(
        self,
        batch: Batch,
        should_stop: Callable[[], bool] | None,
        on_choice: Callable[[int, np.ndarray], None] | None,
    ) -> None:
        """Embedding and all layers. on_choice(layer, expert ids (T, K)): after each layer that routes."""
        num_tokens = len(batch.token_ids)
        if self._tiers:
            self._tiers.run(num_tokens, should_stop, on_choice)
        elif num_tokens <= _UNINTERRUPTED_TOKENS and on_choice is None and batch.features is None:
            self.team.run(self._whole)
        else:
            for layer, program in enumerate(self._layer_programs, start=-1):  # the embedding comes first
                if num_tokens > _UNINTERRUPTED_TOKENS and should_stop and should_stop():
                    raise Cancelled
                self.team.run(program)
                if layer < 0:
                    self._layers.place_features()
                if on_choice and layer >= self.config.num_dense_layers:
                    on_choice(layer, self._layers.chosen(layer, num_tokens))

    def _record_layers(self, batch: Batch, should_stop: Callable[[], bool] | None) -> None:
        self._recorder.begin(len(batch.token_ids))
        try:
            self._run_layers(batch, should_stop, self._recorder.add)
        except BaseException:
            self._recorder.drop()
            raise

    def _head_logits(self, rows: np.ndarray, num_generated: int) -> np.ndarray:
        """rows: int64 (n,) of the batch, whose first `num_generated` were generated -> float32 (n, vocabulary)."""
        head = self._head
        head.x[: len(rows)] = self._buffers.x[rows]
        head.run.set_tokens(rows.astype(np.int32), int((rows < num_generated).sum()))  # only how many they are matters
        self.team.run(head.program)
        return head.logits[: len(rows)].copy()
