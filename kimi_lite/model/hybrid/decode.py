"""Decoding in segments that CUDA graphs hold: what lies between two places where the host must act.

    router 0 | experts 0 | router 1 | experts 1 | ... | last
               CPU experts of layer 0 |       of layer 1

`router` adds the previous layer's experts, then attention and router, and ends with copies of what the CPU needs;
`experts` is the shared expert and the experts in VRAM, and runs while the CPU computes the others. A segment runs as
plain calls the first time (that compiles its kernels), is captured the second time, and is replayed from then on; on a
device without graphs it always runs as plain calls. All that changes from step to step lies in buffers that never move.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.gpu_streams import GpuStreams, Graph
from kimi_lite.model.hybrid.cpu_experts import HostCopies
from kimi_lite.model.hybrid.kernels import Angles
from kimi_lite.model.hybrid.layer import Layer
from kimi_lite.model.hybrid.routed import RoutedExperts
from kimi_lite.model.hybrid.step import Step


class Graphs:
    """What the segments of one shape share: graph memory, as they run one after the other."""

    def __init__(self, streams: GpuStreams) -> None:
        self._streams, self._memory = streams, streams.graph_memory()

    def capture(self, run: Callable[[], None]) -> Graph:
        """What `run` asks of the device; nothing is done yet."""
        return self._streams.capture(run, self._memory)


class StepSegment:
    """A piece of a step's work on the device."""

    def __init__(self, run: Callable[[], None], graphs: Graphs | None) -> None:
        """graphs: None where there are none."""
        self._run, self._graphs = run, graphs
        self._graph: Graph | None = None
        self._is_warm = False

    def __call__(self) -> None:
        if self._graph is None and self._graphs is not None and self._is_warm:
            self._graph = self._graphs.capture(self._run)
        if self._graph is None:
            self._run()
            self._is_warm = True
        else:
            self._graph.replay()

    def close(self) -> None:
        """Frees the graph and all that it holds, now and not when a collector comes by."""
        graph, self._graph, self._run = self._graph, None, None
        if graph is not None:
            graph.reset()


class DecodeSegments:
    """Segments and their buffers for steps of up to `num_rows` tokens that see up to `num_pages` pages."""

    def __init__(
        self,
        layers: Sequence[Layer],
        head: Callable[[torch.Tensor], torch.Tensor],
        experts: RoutedExperts | None,
        config: ModelConfig,
        streams: GpuStreams,
        num_rows: int,
        num_pages: int,
    ) -> None:
        """head: x (T, D) -> logits (T, vocabulary)."""
        c, self.num_rows, self.num_pages = config, num_rows, num_pages
        self._layers, self._head, self._experts, self._streams = layers, head, experts, streams
        num_choices, zeros = num_rows * max(1, c.num_experts_used), streams.zeros
        self.x = zeros((num_rows, c.hidden_size), torch.float32)
        angles = Angles(*(zeros((num_rows, c.qk_rope_head_dim // 2), torch.float32) for _ in range(2)))
        self._step = Step(
            angles=angles,
            cache_rows=zeros((num_rows,), torch.int64),
            page_table=zeros((num_rows, num_pages), torch.int32),
            lengths=zeros((num_rows,), torch.int32),
            absorbed=None,
        )
        self._normed = torch.zeros_like(self.x)
        self._ids = zeros((num_rows, max(1, c.num_experts_used)), torch.int32)
        self._weights = zeros(tuple(self._ids.shape), torch.float32)
        self._slots = zeros((num_choices,), torch.int32)
        self._hit_rows = zeros((num_choices if c.num_experts else 1, c.hidden_size), torch.float32)
        self._miss_rows = torch.zeros_like(self._hit_rows)
        self._shared = torch.zeros_like(self.x)
        self._logits = streams.pinned((num_rows, c.vocab_size), torch.float32)
        self._host = HostCopies(streams, num_rows, c.hidden_size, self._ids.shape[1])
        graphs = Graphs(streams) if streams.is_cuda else None
        self._routers = [StepSegment(lambda i=i: self._run_router(i), graphs) for i in range(len(layers))]
        self._on_gpu = [StepSegment(lambda i=i: self._run_experts(i), graphs) for i in range(len(layers))]
        self._last = StepSegment(self._run_last, graphs)
        self._num_unsteady = 1 if graphs is None else 2  # steps still to come in which kernels compile, graphs are made
        self.is_steady = False  # whether the last step was an ordinary one, whose time says what the next ones take

    def forward(self, x: torch.Tensor, step: Step, num_tokens: int) -> np.ndarray:
        """x (num_rows, D) of a step padded to this shape -> float32 (num_tokens, vocabulary) on the host."""
        self.is_steady = self._num_unsteady == 0
        self._num_unsteady = max(0, self._num_unsteady - 1)
        self._load(x, step)
        for layer, router, experts in zip(self._layers, self._routers, self._on_gpu, strict=True):
            router()
            if layer.is_dense:
                continue
            copied = self._streams.event()
            experts()
            if self._experts.misses(layer.number, self._host, num_tokens, copied):
                num_choices = num_tokens * self._ids.shape[1]
                self._miss_rows[:num_choices].copy_(self._experts.cpu.rows[:num_choices], non_blocking=True)
        self._last()
        self._streams.finish(self._streams.event())
        return self._logits[:num_tokens].numpy().copy()

    def close(self) -> None:
        """Frees the graphs; the buffers are free with the last reference to this."""
        for segment in (*self._routers, *self._on_gpu, self._last):
            segment.close()

    def _load(self, x: torch.Tensor, step: Step) -> None:
        self.x.copy_(x)
        own = self._step
        own.angles.cos.copy_(step.angles.cos)
        own.angles.sin.copy_(step.angles.sin)
        own.cache_rows.copy_(step.cache_rows)
        own.page_table.copy_(step.page_table)
        own.lengths.copy_(step.lengths)

    def _run_router(self, index: int) -> None:
        self._add_previous(index)
        layer = self._layers[index]
        normed = layer.attend(self.x, self._step)
        if layer.router is None:
            return
        ids, weights, _ = layer.router.forward(normed)
        self._normed.copy_(normed)
        self._ids.copy_(ids)
        self._weights.copy_(weights)
        self._host.copy_x(self._normed)
        self._host.copy_ids(self._ids)

    def _run_experts(self, index: int) -> None:
        layer = self._layers[index]
        slots, _ = self._experts.hits(layer.number, self._normed, self._ids, self._hit_rows)
        self._slots.copy_(slots)
        shared = layer.shared_expert(self._normed)
        if shared is not None:
            self._shared.copy_(shared)

    def _add_previous(self, index: int) -> None:
        """The routed and shared experts of the layer before this one."""
        if index == 0 or self._layers[index - 1].is_dense:
            return
        self.x += self._experts.join(self._slots, self._hit_rows, self._miss_rows, self._weights, self._shared)

    def _run_last(self) -> None:
        self._add_previous(len(self._layers))
        self._logits.copy_(self._head(self.x), non_blocking=True)


def rows_for(num_tokens: int) -> int:
    """1, 2, 4, 8 or 16: few shapes, so that few graphs are captured."""
    return 1 << max(0, num_tokens - 1).bit_length()


def pages_for(num_pages: int) -> int:
    """Powers of two from 16, 1,024 tokens: graphs are captured again when the context has doubled."""
    return max(16, 1 << max(0, num_pages - 1).bit_length())
