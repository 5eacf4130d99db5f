"""The forward pass with a GPU: a batch of tokens in, logits out, like `kimi_lite.model.cpu.transformer.Transformer` on
the CPU.

Attention, routers, shared experts, norms and the head are on the device; routed experts are wherever `hybrid.routed`
finds them. Batches of up to 16 tokens go as one captured step (`hybrid.decode`), longer ones layer by layer.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.gpu_failure import GpuBroken, told
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.experts.vram import make_table
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, Cancelled, SequenceSlice
from kimi_lite.model.cpu.attention import mla_shape
from kimi_lite.model.cpu.kernels import Needs, compile_kernels
from kimi_lite.model.cpu.layers import check_deferral, check_sizes
from kimi_lite.model.cpu.weights import check_types
from kimi_lite.model.hybrid.adaptive import Adaptive
from kimi_lite.model.hybrid.decode import DecodeStep, pages_for, rows_for
from kimi_lite.model.hybrid.experts import open_experts, thread_counts
from kimi_lite.model.hybrid.head import Head
from kimi_lite.model.hybrid.kernels import MAX_DECODE_TOKENS, Kernels, Residents
from kimi_lite.model.hybrid.layer import Layer
from kimi_lite.model.hybrid.passes import Passes, ShouldStop
from kimi_lite.model.hybrid.step import StepMaker, choose_expanded, is_decoding, num_pages_seen
from kimi_lite.model.hybrid.weights import DenseWeights
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.plan.types import Plan
from kimi_lite.plan.workspace import DECODE_SHAPES
from kimi_lite.units import counted

MAX_LOGITS = 64  # rows of logits made at once


class HybridTransformer:
    """A loaded model, or those of its layers that one of several GPUs has (see `hybrid.parts`). `forward` and `run` are
    not reentrant: one batch at a time."""

    def __init__(
        self,
        store: GGUFStore,
        config: ModelConfig,
        kv: KVCache,
        streams: GpuStreams,
        kernels: Kernels,
        plan: Plan,
        heat_file: Path | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
        recorder: RoutingRecorder | None = None,
        among: range | None = None,
    ) -> None:
        """kv: its storage is a tensor of the device. plan: what experts and prompts get, and the options it is for.
        among: the layers of this GPU, one after the other, None: all; who runs the parts begins and ends the recorder's
        passes.

        heat_file: where the experts' heat outlives the process; None: nowhere. on_progress(what is being done, units
        done, units in all): loading takes seconds. recorder: of what tokens choose. Raises KimiLiteError for what the
        model lacks, and where less VRAM is free than the plan was made for.
        """
        report = on_progress or (lambda stage, done, total: None)
        check_types(store)
        check_sizes(config)
        check_deferral(config, plan.limits.num_deferred_experts)
        compile_kernels(
            Needs.of(store, config, cache=None), lambda done, total: report("preparing kernels", done, total)
        )
        streams.enter_thread()
        self.config, self.kv = config, kv
        self._streams, self._kernels = streams, kernels
        self._among = among or range(config.num_layers)
        self.is_first, self.is_last = self._among.start == 0, self._among.stop == config.num_layers
        self.max_batch_tokens = plan.prompt_chunk_tokens
        self._passes = Passes(self.max_batch_tokens, self.run, self.drop_steps)
        self._remedy = "allow fewer experts there: --gpu-experts" if plan.num_vram_slots else "a shorter context: -c"
        self._maker = StepMaker(config, streams)
        self._shape = mla_shape(config)
        width = config.vocab_size if self.is_last else config.hidden_size
        self._rows = streams.pinned((MAX_DECODE_TOKENS, width), torch.float32)  # that decode steps of all shapes return
        self._steps: OrderedDict[tuple[int, int], DecodeStep] = OrderedDict()
        self._recorder, self.experts = recorder if among is None else None, None
        self.num_decode_steps, self.decode_s, self._is_closed = 0, 0.0, False
        self._thread = threading.get_ident()  # CUDA's current device is a thread's own
        slot_table = make_table(streams, config.num_layers, max(1, config.num_experts))
        self._load_dense(store, plan, slot_table, report)
        self.experts = open_experts(
            store, config, streams, kernels, plan, slot_table, report, heat_file, recorder, among
        )
        self._adaptive = Adaptive(self.experts, thread_counts(plan))
        if streams.is_cuda:
            with self._closed_on_failure():
                self.warm_up(report)

    def _load_dense(
        self,
        store: GGUFStore,
        plan: Plan,
        slot_table: torch.Tensor,
        report: Callable[[str, int, int], None],
    ) -> None:
        c, options = self.config, plan.limits
        weights = DenseWeights(store, self._streams, self._kernels, plan.dense_type)
        self.layers = []
        for number in self._among:
            report("loading onto the GPU", number, c.num_layers)
            residents = Residents(slot_table[number], options.cache_bias)
            self.layers.append(Layer(store, weights, c, number, self.kv.storage[number], self._kernels, residents))
        self._token_embd = store.tensor("token_embd.weight")  # stays in the file: a step reads a row a token
        self.head = Head(store, weights, c, self._kernels) if self.is_last else None
        self.dense_bytes = weights.num_bytes

    @torch.inference_mode()
    def warm_up(self, report: Callable[[str, int, int], None]) -> None:
        """Before the first prompt: compile the GPU's kernels and capture a decode step's graphs. Page 0 holds nothing
        yet."""
        if self._recorder:
            self._recorder.begin(1)
        with self.experts.forgetting() if self.experts else nullcontext():
            self._run_once(report)
        if self._recorder:
            self._recorder.drop()

    def _run_once(self, report: Callable[[str, int, int], None]) -> None:
        page = np.zeros(1, np.int32)
        one = Batch(np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, bool), (SequenceSlice(0, 1, page),))
        for done in range(2):  # the first compiles, the second captures
            report("preparing the GPU's kernels", done, 3)
            self._forward_decode(one)
        report("preparing the GPU's kernels", 2, 3)
        positions = np.arange(PAGE_TOKENS, dtype=np.int32)
        pieces = (SequenceSlice(0, PAGE_TOKENS, page),)
        many = Batch(np.zeros(PAGE_TOKENS, np.int32), positions, np.ones(PAGE_TOKENS, bool), pieces)
        step, x = self._maker.make(many, list(pieces)), torch.from_numpy(self._embed(many)).to(self._streams.device)
        first_routed = self.config.num_dense_layers - self._among.start
        for layer in self.layers[: max(0, first_routed) + 1]:  # not the experts: they would stream
            layer.shared_expert(layer.attend(x, step))

    @torch.inference_mode()
    def forward(self, batch: Batch, should_stop: Callable[[], bool] | None = None) -> np.ndarray:
        """Runs the batch and fills its rows of the cache. Returns float32 (rows where wants_logits, vocabulary).

        Raises `Cancelled` between layers of a long batch when `should_stop()` becomes true, GpuMemoryEnded where less
        at a time did not fit either, GpuBroken where the GPU fails: then every later call does.
        """
        self.require_sound()
        if self._thread != threading.get_ident():
            self.enter_thread()
        return self._passes.forward(batch, should_stop)

    def require_sound(self) -> None:
        """Raises the GpuBroken that was met before."""
        self._streams.require_sound()

    def enter_thread(self) -> None:
        """From now on this thread runs the model, until it runs what another GPU has."""
        self._streams.enter_thread()
        self._thread = threading.get_ident()

    @torch.inference_mode()
    def run(self, batch: Batch, should_stop: ShouldStop, x: np.ndarray | None = None) -> np.ndarray:
        """One pass over these layers; one that ends half-way leaves nothing behind. x: float32 (T, D), what the part
        before returned; None: the first. Returns float32 (rows where wants_logits, vocabulary); a part that is not the
        last, (T, D)."""
        assert (x is None) == self.is_first, (x is None, self.is_first)
        num_tokens = len(batch.token_ids)
        is_short = num_tokens <= MAX_DECODE_TOKENS
        if self.experts and self.experts.num_deferred:  # never of a prompt, its last token included: the cache keeps it
            is_short = is_short and batch.num_generated == num_tokens
        try:
            with self._failures_told(f"in a pass over {counted(num_tokens, 'token')}"):
                self._adaptive.begin(num_tokens, is_short or is_decoding(batch))  # counts the step before
                if self._recorder:
                    self._recorder.begin(num_tokens)
                return self._forward_short(batch, x) if is_short else self._forward_long(batch, should_stop, x)
        except BaseException:
            self.give_up()
            raise

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _failures_told(self, doing: str) -> Iterator[None]:
        """What fails on the GPU becomes a sentence, and what breaks it is remembered."""
        try:
            with told(doing, f"Close what else uses the GPU, or {self._remedy}."):
                yield
        except GpuBroken as error:
            self._streams.failure = error
            raise

    def counters(self) -> dict[str, float]:
        """What happened since the model was loaded, by name."""
        own = {"dense_gpu_bytes": self.dense_bytes, "decode_steps": self.num_decode_steps, "decode_s": self.decode_s}
        return own | self._adaptive.counters() | (self.experts.counters() if self.experts else {})

    def heat(self) -> np.ndarray | None:
        """(layers, experts): how much each routed expert was used lately."""
        return self.experts.heat() if self.experts else None

    def close(self) -> None:
        """Saves the experts' heat and the record of routing, and ends the threads, whatever fails. A second call does
        nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        with ExitStack() as stack:
            stack.callback(self._end_work)
            if self._recorder:
                stack.callback(self._recorder.close)
            if self.experts:
                stack.callback(self.experts.close)  # first: it counts what the recorder does not know yet

    def _end_work(self) -> None:
        """Nothing is written any more to memory that will be another's."""
        if self._streams.failure is None:
            with suppress(GpuBroken, RuntimeError):  # who closes does not want to know
                self._streams.synchronize()
        self.drop_steps()

    def drop_steps(self) -> None:
        """The graphs and buffers of all shapes, and what torch holds unused, are free again."""
        while self._steps:
            self._steps.popitem()[1].close()
        with suppress(RuntimeError):  # what is broken is told where something is wanted of it
            self._streams.give_back()

    def _forward_short(self, batch: Batch, x: np.ndarray | None) -> np.ndarray:
        """A step that is measured: what it teaches changes the next ones."""
        start_s = time.perf_counter()
        decode, rows = self._forward_decode(batch, x)
        rows = rows[batch.wants_logits] if self.is_last else rows
        elapsed_s = time.perf_counter() - start_s
        self._adaptive.end(len(batch.token_ids), int(batch.positions.max()) + 1, elapsed_s, decode.is_steady)
        self.num_decode_steps += 1
        self.decode_s += elapsed_s
        return rows

    def _forward_decode(self, batch: Batch, x: np.ndarray | None = None) -> tuple[DecodeStep, np.ndarray]:
        """x (T, D), None: of the tokens -> what ran the step, and what `run` returns, of all rows."""
        num_tokens = len(batch.token_ids)
        shape = num_rows, num_pages = rows_for(num_tokens), pages_for(num_pages_seen(batch))
        if shape not in self._steps:
            if len(self._steps) == DECODE_SHAPES:
                self._steps.popitem(last=False)[1].close()
            self._steps[shape] = DecodeStep(
                self.layers, self.head, self.experts, self.config, self._streams, self._rows, num_rows, num_pages
            )
        self._steps.move_to_end(shape)
        decode = self._steps[shape]
        host_step = self._maker.host_step(batch, num_rows=num_rows, num_pages=num_pages)
        x = self._embed(batch, num_rows) if x is None else np.pad(x, ((0, num_rows - num_tokens), (0, 0)))
        decode.inputs.set(x, host_step)
        return decode, decode.forward(num_tokens)

    def _forward_long(self, batch: Batch, should_stop: ShouldStop, x_on_host: np.ndarray | None) -> np.ndarray:
        expanded = choose_expanded(batch.sequences, self._shape)
        x_on_host = self._embed(batch) if x_on_host is None else x_on_host
        step, x = self._maker.make(batch, expanded), torch.from_numpy(x_on_host).to(self._streams.device)
        if self.experts and not step.is_decoding:
            self.experts.begin_prompt(len(batch.token_ids))
        rows = torch.from_numpy(np.flatnonzero(batch.wants_logits)).to(x.device)  # now: it waits for what is running
        for layer in self.layers:
            if should_stop and should_stop():
                raise Cancelled
            layer.forward(x, step, self.experts)
        if not self.is_last:
            return self._to_host(x, len(x))
        parts = [self._logits(x[rows[i : i + MAX_LOGITS]], len(x)) for i in range(0, len(rows), MAX_LOGITS)]
        return np.concatenate(parts or [np.empty((0, self.config.vocab_size), np.float32)])

    def _logits(self, x: torch.Tensor, num_tokens: int) -> np.ndarray:
        """(T, D) at the end of a pass over `num_tokens` -> (T, vocabulary) on the host."""
        return self._to_host(self.head.forward(x), num_tokens)

    def _to_host(self, rows: torch.Tensor, num_tokens: int) -> np.ndarray:
        self._streams.finish(self._streams.event(), num_tokens)  # a copy would wait for a GPU that hangs, for ever
        return rows.cpu().numpy()

    def count(self) -> None:
        """What was chosen so far is in the recorder."""
        if self.experts:
            self.experts.count()

    def give_up(self) -> None:
        """A pass ended half-way: it leaves nothing behind that would change a later one."""
        if self.experts:
            self.experts.cancel()
        if self._recorder:
            self._recorder.drop()

    def _embed(self, batch: Batch, num_rows: int = 0) -> np.ndarray:
        """float32 (T, D), padded to at least `num_rows`: embeddings of tokens, features in their places."""
        token_ids = np.pad(batch.token_ids, (0, max(0, num_rows - len(batch.token_ids))))
        rows = dequantize(self._token_embd.data[token_ids], self._token_embd.layout.name)
        if batch.features:
            rows[batch.features.rows] = batch.features.values
        return rows
