"""A model on several GPUs: each has the layers that the plan gives it, whole, as if it were the model.

A pass goes through the GPUs one after the other; between two of them rows of x cross the host's memory, 28 KiB a token
of Kimi K2.5. Dense weights, pages of the cache, slots for experts and a prompt's stream are each on the GPU of their
layer, so that two GPUs hold twice as much, and nothing is on both but what a step reads: positions and page tables.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch
from kimi_lite.model.hybrid.kernels import Kernels
from kimi_lite.model.hybrid.passes import Passes, ShouldStop
from kimi_lite.model.hybrid.transformer import HybridTransformer
from kimi_lite.plan.types import Plan

# Of the counters those that do not add up: the parts' mean, or the most of them.
_MEANS = ("promotion_cost_s", "promotion_gain_s", "stream_expert_s", "cpu_expert_s", "cpu_choice_s", "disk_is_direct")
_MOST = ("expert_threads", "decode_steps")


class HybridParts:
    """What `HybridTransformer` is to the engine, over several of them, the first layers first. `close` closes all."""

    def __init__(self, parts: Sequence[HybridTransformer], recorder: RoutingRecorder | None = None) -> None:
        assert parts[0].is_first and parts[-1].is_last, "a part is missing"
        self.parts, self._recorder = tuple(parts), recorder
        self.config, self.kv = parts[0].config, parts[0].kv
        self.max_batch_tokens = min(part.max_batch_tokens for part in parts)
        self._passes = Passes(self.max_batch_tokens, self._run, self._drop_steps)
        self._is_closed = False

    @classmethod
    def open(
        cls,
        store: GGUFStore,
        config: ModelConfig,
        kv: KVCache,
        gpus: Sequence[GpuStreams],
        make_kernels: Callable[[], Kernels],
        plan: Plan,
        heat_file: Path | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
        recorder: RoutingRecorder | None = None,
    ) -> "HybridParts":
        """One part for each of the plan's; the arguments as `HybridTransformer` has them. Raises KimiLiteError."""
        assert len(gpus) == len(plan.gpu_parts), (len(gpus), plan.gpu_parts)
        with ExitStack() as opened:
            parts = []
            for number, (streams, own) in enumerate(zip(gpus, plan.gpu_parts, strict=True)):
                with _forgotten(recorder):
                    part = HybridTransformer(
                        store,
                        config,
                        kv,
                        streams,
                        make_kernels(),
                        plan.of_gpu(number),
                        heat_file,
                        on_progress,
                        recorder,
                        own.layers,
                    )
                opened.callback(part.close)
                parts.append(part)
            opened.pop_all()
        return cls(parts, recorder)

    def forward(self, batch: Batch, should_stop: ShouldStop = None) -> np.ndarray:
        """As `HybridTransformer.forward`."""
        for part in self.parts:
            part.require_sound()
        return self._passes.forward(batch, should_stop)

    def _run(self, batch: Batch, should_stop: ShouldStop) -> np.ndarray:
        """One pass through all parts; one that ends half-way leaves nothing behind on any of them."""
        if self._recorder:
            for part in self.parts:  # what they have not said of the pass before
                part.count()
            self._recorder.begin(len(batch.token_ids))
        rows = None
        try:
            for part in self.parts:
                part.enter_thread()
                rows = part.run(batch, should_stop, rows)
        except BaseException:
            for part in self.parts:
                part.give_up()
            if self._recorder:
                self._recorder.drop()
            raise
        return rows

    def counters(self) -> dict[str, float]:
        """What happened since the model was loaded, by name, on all GPUs together."""
        return joined_counters([part.counters() for part in self.parts])

    def heat(self) -> np.ndarray | None:
        """float32 (layers, experts): each layer's is of the part that has it."""
        found = [heat for part in self.parts if (heat := part.heat()) is not None]
        return sum(found) if found else None

    def close(self) -> None:
        """Closes all parts, whatever fails. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        with ExitStack() as stack:
            if self._recorder:
                stack.callback(self._recorder.close)
            for part in self.parts:
                stack.callback(part.close)

    def _drop_steps(self) -> None:
        for part in self.parts:
            part.enter_thread()
            part.drop_steps()


def joined_counters(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of all parts; one that has no routed experts counts less than the others."""
    joined: dict[str, float] = {}
    for name in dict.fromkeys(name for counters in parts for name in counters):
        values = [counters[name] for counters in parts if name in counters]
        total = max(values) if name in _MOST else sum(values)
        joined[name] = total / len(values) if name in _MEANS else total
    return joined


@contextmanager
def _forgotten(recorder: RoutingRecorder | None) -> Iterator[None]:
    """Tokens that a part runs while it is loaded are not recorded."""
    if recorder is None:
        yield
        return
    recorder.begin(1)
    try:
        yield
    finally:
        recorder.drop()


class SplitPages:
    """The cache's storage over several GPUs: (layers, pages, 64, row), each layer on the GPU of its part.

    `storage[layer]` is that layer's pages on its GPU. All layers of some pages, `storage[:, page]` and
    `storage[:, page, :n]`, are read into RAM and written from there.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Of the same shape but for their layers, the first layers first."""
        self.tensors = tuple(tensors)
        self.shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
        self.dtype, self.device = tensors[0].dtype, tensors[0].device

    def __getitem__(self, at: Any) -> torch.Tensor:
        if isinstance(at, tuple):
            assert at[0] == slice(None), at
            return torch.cat([tensor[at].cpu() for tensor in self.tensors])
        for tensor in self.tensors:
            if at < len(tensor):
                return tensor[at]
            at -= len(tensor)
        raise IndexError(at)

    def __setitem__(self, at: Any, values: torch.Tensor) -> None:
        assert isinstance(at, tuple) and at[0] == slice(None), at
        pieces = values.split([len(tensor) for tensor in self.tensors])
        for tensor, piece in zip(self.tensors, pieces, strict=True):
            tensor[at] = piece.to(tensor.device)
