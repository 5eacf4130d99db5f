"""Routed experts of a prompt: the most wanted ones stream through the GPU while the CPU computes those that few tokens
want.

`divide` decides which is which; experts with a slot in VRAM need no copy. On the GPU the choices are sorted by expert,
each group's products are computed at once and added expert by expert, so that the result does not depend on timing. The
CPU sums its share apart, and both sums meet at the end of the layer.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kimi_lite.experts.costs import ExpertCosts
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.index import ExpertIndex, RoutedLayer
from kimi_lite.experts.stream import PromptStream
from kimi_lite.experts.vram import VramSlots
from kimi_lite.model.hybrid.cpu_experts import CpuExperts, HostCopies
from kimi_lite.model.hybrid.kernels import Kernels

_SMALL_SHARE = 0.1  # of the experts: fewer are streamed as well, since then the next layer's stream can begin early


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """Which of a layer's experts are computed where; `chosen` int32 (T, K) on the host."""

    chosen: np.ndarray
    resident: list[int]
    streamed: list[int]
    on_cpu: list[int]


class ExpertChoice(NamedTuple):
    """What a layer's router says of T tokens, on the device."""

    normed: torch.Tensor  # (T, D), what the experts read
    ids: torch.Tensor  # int32 (T, K)
    weights: torch.Tensor  # (T, K)


class _Sorted(NamedTuple):
    """Choices in the order of their experts, on the device; expert e's are starts[e] .. starts[e + 1]."""

    tokens: torch.Tensor  # int32 (T * K,)
    weights: torch.Tensor  # (T * K,)
    starts: np.ndarray  # int64 (E + 1,)


class StreamedExperts:
    """Holds the stream; `close` ends its threads. `num_streamed`, `stream_s`: experts and seconds since the start."""

    def __init__(
        self,
        streams: GpuStreams,
        kernels: Kernels,
        index: ExpertIndex,
        slots: VramSlots,
        cpu: CpuExperts,
        stream: PromptStream,
        costs: ExpertCosts,
    ) -> None:
        self._streams, self._kernels, self._index = streams, kernels, index
        self._slots, self._cpu, self._stream, self._costs = slots, cpu, stream, costs
        self._launcher = ThreadPoolExecutor(1, "kimi-lite-launch", initializer=streams.enter_thread)
        self.stream_s = self.cpu_s = 0.0

    @property
    def num_streamed(self) -> int:
        return self._stream.num_streamed

    def divide(self, layer: int, chosen: np.ndarray, is_resident: np.ndarray, num_windows: int) -> Division:
        """Both sides should end together; what was requested ahead for this layer streams in any case."""
        counts = np.bincount(chosen.reshape(-1), minlength=self._index.num_experts)
        resident = np.flatnonzero((counts > 0) & is_resident).tolist()
        absent = np.flatnonzero((counts > 0) & ~is_resident)
        absent = absent[np.argsort(-counts[absent], kind="stable")]
        if self._stream.requested(layer):
            return Division(chosen, resident, sorted(absent.tolist()), [])
        num_streamed = self._costs.split(counts[absent].tolist(), num_windows)
        if not num_streamed:
            self._costs.doubt_stream()
        if len(absent) - num_streamed < _SMALL_SHARE * len(absent):
            num_streamed = len(absent)
        return Division(
            chosen, resident, sorted(absent[:num_streamed].tolist()), sorted(absent[num_streamed:].tolist())
        )

    def forward(
        self,
        layer: int,
        choice: ExpertChoice,
        host: HostCopies,
        division: Division,
        shared_expert: Callable[[], torch.Tensor | None],
        num_threads: int,
    ) -> torch.Tensor:
        """(T, D): weighted sum over the chosen experts, plus what `shared_expert` computes. `host` is for the copies
        that the CPU needs."""
        if not self._stream.requested(layer):
            self._stream.request(layer, division.streamed)
        if not division.on_cpu:
            self._request_ahead(layer + 1)
        host_weights = None
        if division.on_cpu:
            host.copy_x(choice.normed)
            host_weights = choice.weights.cpu().numpy()  # waits for both copies
        y = torch.zeros_like(choice.normed)
        launched = self._launcher.submit(self._add_on_device, layer, y, choice, division)
        try:
            shared = shared_expert()
            if host_weights is not None:
                y_cpu = self._sum_on_cpu(layer, host.x.numpy(), host_weights, division, num_threads)
        except BaseException:
            launched.exception()  # it takes from the stream until its layer ends; then the stream can be cancelled
            raise
        self._finish(launched, len(division.streamed))
        if host_weights is not None:
            y += torch.from_numpy(y_cpu).to(y.device)
        return y if shared is None else y + shared

    def cancel(self) -> None:
        """A pass was given up: what was requested ahead is no longer wanted."""
        self._stream.cancel()

    def close(self) -> None:
        """Ends the threads."""
        with ExitStack() as stack:
            stack.callback(self._stream.close)
            self._launcher.shutdown()

    def _request_ahead(self, layer: int) -> None:
        """Everything streams, so the next layer will want nearly every expert too: begin before its router has
        spoken."""
        if layer < self._index.num_layers:
            self._stream.request(layer, np.flatnonzero(~self._slots.residents(layer)).tolist())

    def _finish(self, launched: Future, num_streamed: int) -> None:
        elapsed_s = launched.result()
        self.stream_s += elapsed_s
        self._costs.observe_stream(num_streamed, elapsed_s)

    def _add_on_device(self, layer: int, y: torch.Tensor, choice: ExpertChoice, division: Division) -> float:
        """Adds resident and streamed experts to y; seconds until the device has done it."""
        start_s = time.perf_counter()
        with torch.inference_mode():
            normed = choice.normed
            choices = _sort(choice.ids, choice.weights, division.chosen, self._index.num_experts)
            form = self._index.layers[layer]
            if division.resident:
                slots = self._slots.slots_of(layer, np.array(division.resident))
                self._add_experts(y, normed, choices, form, division.resident, self._slots.slots, slots)
            wanted = set(division.streamed)
            for group in self._stream.groups(layer):
                present = [(s, e) for s, e in zip(group.slots, group.experts, strict=True) if e in wanted]
                if present:
                    rows, experts = zip(*present, strict=True)
                    self._add_experts(y, normed, choices, form, list(experts), self._stream.memory, np.array(rows))
            self._streams.finish(self._streams.event(), len(normed))
        return time.perf_counter() - start_s

    def _add_experts(
        self,
        y: torch.Tensor,
        normed: torch.Tensor,
        choices: _Sorted,
        form: RoutedLayer,
        experts: list[int],
        data: torch.Tensor,
        slots: np.ndarray,
    ) -> None:
        """y[t] += weight * expert(normed[t]) for all choices of these experts, which lie in `slots` of `data`."""
        starts, ends = choices.starts[experts], choices.starts[np.array(experts) + 1]
        places = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        index = torch.from_numpy(places).to(y.device)
        tokens, weights = choices.tokens[index], choices.weights[index]
        slot_of_choice = torch.from_numpy(np.repeat(slots.astype(np.int32), ends - starts)).to(y.device)
        rows = self._kernels.expert_choices(normed, data, form, slot_of_choice, tokens) * weights[:, None]
        first = 0
        for count in (ends - starts).tolist():  # a token chooses an expert once: no two rows of a call meet
            y.index_add_(0, tokens[first : first + count], rows[first : first + count])
            first += count

    def _sum_on_cpu(
        self, layer: int, host_x: np.ndarray, host_weights: np.ndarray, division: Division, num_threads: int
    ) -> np.ndarray:
        """float32 (T, D): the weighted sum over the CPU's experts, a window of tokens at a time."""
        start_s = time.perf_counter()
        chosen = np.where(np.isin(division.chosen, division.on_cpu), division.chosen, -1)
        total = np.empty((len(chosen), host_x.shape[1]), np.float32)
        num_read = 0
        for first in range(0, len(chosen), self._cpu.capacity):
            rows = slice(first, first + self._cpu.capacity)
            num_read += len(np.setdiff1d(chosen[rows], [-1]))
            self._cpu.sum_into(
                total[rows], layer, host_x[: len(chosen)][rows], chosen[rows], host_weights[rows], num_threads
            )
        elapsed_s = time.perf_counter() - start_s
        self.cpu_s += elapsed_s
        self._costs.observe_cpu(num_read, int((chosen >= 0).sum()), elapsed_s)
        return total


def _sort(ids: torch.Tensor, weights: torch.Tensor, chosen: np.ndarray, num_experts: int) -> _Sorted:
    order = torch.sort(ids.reshape(-1), stable=True).indices
    counts = np.bincount(chosen.reshape(-1), minlength=num_experts)
    tokens = (order // ids.shape[1]).to(torch.int32)
    return _Sorted(tokens, weights.reshape(-1)[order], np.concatenate([[0], np.cumsum(counts)]))
