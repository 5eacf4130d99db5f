"""A decode step as one piece of work for the GPU, which a CUDA graph holds: no Python, no launch and no copy by the
host between its first layer and the logits.

    inputs | attention, router | posts x, choices | shared expert, experts in VRAM | waits | joins | attention ...
                                                CPU: experts that are missing there -> rows

In every layer with routed experts the two sides take a turn (`hybrid.turns`): kernels of the graph write to pinned
memory what the CPU needs and wait there for its rows, which `hybrid.served` computes meanwhile. A step of a new shape
runs as plain calls the first time (that compiles its kernels), is captured the second time, and is replayed from then
on; on a device without graphs it always runs as plain calls. All that changes from step to step comes in by one copy.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.gpu_streams import GpuStreams, Graph
from kimi_lite.model.hybrid.head import Head
from kimi_lite.model.hybrid.layer import Layer
from kimi_lite.model.hybrid.routed import RoutedExperts
from kimi_lite.model.hybrid.step import StepInputs

_TURN_LIMIT_S = 10.0  # that a replayed layer may take the GPU: then it hangs
_FIRST_LIMIT_S = 600.0  # where kernels are compiled in between


class Captured:
    """Work on the device that is the same each time."""

    def __init__(self, run: Callable[[], None], streams: GpuStreams) -> None:
        self._run, self._streams = run, streams
        self._graph: Graph | None = None
        self.is_warm = False  # kernels are compiled; without graphs there is no other state
        self.is_steady = False  # the last call was as all later ones will be

    def __call__(self) -> None:
        self.is_steady = self._graph is not None or (not self._streams.is_cuda and self.is_warm)
        if self._graph is None and self._streams.is_cuda and self.is_warm:
            self._graph = self._streams.capture(self._run, self._streams.graph_memory())
        if self._graph is None:
            self._run()
            self.is_warm = True
        else:
            self._graph.replay()

    def close(self) -> None:
        """Frees the graph and all that it holds, now and not when a collector comes by."""
        graph, self._graph, self._run = self._graph, None, None
        if graph is not None:
            graph.reset()


class DecodeStep:
    """Steps of up to `num_rows` tokens that see up to `num_pages` pages. `inputs`: what the next one reads."""

    def __init__(
        self,
        layers: Sequence[Layer],
        head: Head | None,
        experts: RoutedExperts | None,
        config: ModelConfig,
        streams: GpuStreams,
        rows: torch.Tensor,
        num_rows: int,
        num_pages: int,
    ) -> None:
        """head: None where another GPU has the layers that follow: then `forward` returns x in place of logits. rows:
        float32 (at least num_rows, vocabulary or D), pinned: what it returns; other steps may write it, too."""
        self._layers, self._head, self._experts, self._streams = layers, head, experts, streams
        self.inputs = StepInputs(config, streams, num_rows, num_pages)
        self._rows = rows[:num_rows]
        self._captured = Captured(self._run, streams)

    @property
    def is_steady(self) -> bool:
        """Whether the last step was an ordinary one, whose time says what the next ones take."""
        return self._captured.is_steady

    def forward(self, num_tokens: int) -> np.ndarray:
        """The first `num_tokens` rows of `inputs` -> float32 (num_tokens, vocabulary) on the host, or (num_tokens,
        D)."""
        try:
            if self._experts is not None:
                limit_s = _TURN_LIMIT_S if self._captured.is_warm else _FIRST_LIMIT_S
                self.inputs.set_first(self._experts.begin_turns(num_tokens, limit_s))
            self._captured()
            is_over = None if self._experts is None else self._experts.server.is_over
            self._streams.finish(self._streams.event(), num_tokens, is_over)
        except BaseException:
            self._give_up()
            raise
        if self._experts is not None:
            self._experts.finish_turns()
        return self._rows[:num_tokens].numpy().copy()

    def close(self) -> None:
        """Frees the graph; the buffers are free with the last reference to this."""
        self._captured.close()

    def _give_up(self) -> None:
        """Nothing of this step may still run when the next one writes its inputs and numbers its turns."""
        if self._experts is not None:
            self._experts.give_up_turns()
        with suppress(Exception):  # what ended the step may have been the device
            self._streams.synchronize()

    def _run(self) -> None:
        """All of it."""
        self.inputs.upload()
        x, step, first = self.inputs.x, self.inputs.step, self.inputs.first
        norms = [layer.attention.attn_norm for layer in self._layers]
        norms.append(norms[-1] if self._head is None else self._head.output_norm)  # without a head nothing reads it
        normed = self._layers[0].normed(x)
        deferral = self._experts.deferral() if self._experts is not None else None
        for layer, next_norm in zip(self._layers, norms[1:], strict=True):
            normed = layer.decode(x, normed, step, self._experts, first, next_norm, deferral)
        self._streams.copy(self._rows, x if self._head is None else self._head.logits(normed))


def rows_for(num_tokens: int) -> int:
    """1, 2, 4, 8 or 16: few shapes, so that few graphs are captured."""
    return 1 << max(0, num_tokens - 1).bit_length()


def pages_for(num_pages: int) -> int:
    """Powers of two from 16, 1,024 tokens: graphs are captured again when the context has doubled."""
    return max(16, 1 << max(0, num_pages - 1).bit_length())
