"""The routed experts of a layer behind one call, wherever they are: VRAM, RAM, disk, or passing through the GPU for a
prompt.

Up to ROW_TOKENS tokens: experts with a slot are computed by the GPU, the others by the CPU at the same time, and every
choice's product has a row of its own, added up in the order of the choices, so that nothing depends on where an expert
was. Where it is cheaper (`experts.costs.ExpertCosts`), and always beyond ROW_TOKENS, a batch goes through
`hybrid.streamed`.

    y = experts.forward(layer, normed, ids, weights, shared_expert)

Decoding calls the parts of `forward` one by one, because CUDA graphs hold those that run on the GPU.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kimi_lite.experts.costs import ExpertCosts
from kimi_lite.experts.gpu_streams import Event, GpuStreams
from kimi_lite.experts.heat import save_heat
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.experts.store import ExpertStore
from kimi_lite.experts.vram import VramSlots
from kimi_lite.model.hybrid.cpu_experts import CpuExperts, HostCopies
from kimi_lite.model.hybrid.kernels import Kernels
from kimi_lite.model.hybrid.streamed import ExpertChoice, StreamedExperts

ROW_TOKENS = 512  # up to here every choice has a row: 117 MB for Kimi K2.5
MIN_STREAM_TOKENS = 32  # below, an upload is never worth it


class _LayerRun(NamedTuple):
    """A layer that ran: what was chosen, and how many experts and choices the CPU computed in which time."""

    layer: int
    chosen: np.ndarray  # int32 (T, K)
    num_missing: int = 0
    num_misses: int = 0
    elapsed_s: float = 0.0


class RoutedExperts:
    """All layers' routed experts. Not reentrant: one layer at a time. `close` saves their heat and ends all threads."""

    def __init__(
        self,
        streams: GpuStreams,
        kernels: Kernels,
        store: ExpertStore,
        slots: VramSlots,
        cpu: CpuExperts,
        streamed: StreamedExperts,
        costs: ExpertCosts,
        num_threads: int,
        heat_file: Path | None = None,
        recorder: RoutingRecorder | None = None,
    ) -> None:
        """heat_file: where `close` saves how hot the experts are; None: nowhere. recorder: of what tokens choose; its
        passes begin and end elsewhere."""
        self._streams, self._kernels, self.store = streams, kernels, store
        self.slots, self.cpu, self.streamed, self.costs = slots, cpu, streamed, costs
        self.num_threads = num_threads  # of the CPU's experts; may change between steps
        self._heat_file, self._recorder = heat_file, recorder
        self.cpu_s = self.wait_s = 0.0  # computing on the CPU, waiting for the GPU's routers
        self._host: HostCopies | None = None
        self._uncounted: list[_LayerRun] = []

    def begin_step(self, promotion_budget: int, num_tokens: int) -> int:
        """Between steps: promotions arrive and begin. Returns how many began."""
        self.count()
        if self.store.ram:
            self.store.ram.begin(num_tokens)
        return self.slots.begin_step(promotion_budget, num_tokens)

    def forward(
        self,
        layer: int,
        normed: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        shared_expert: Callable[[], torch.Tensor | None],
        may_stream: bool = True,
    ) -> torch.Tensor:
        """(T, D), int32 (T, K), (T, K) -> (T, D): the weighted sum over the chosen experts, plus what
        `shared_expert` computes on the GPU meanwhile.

        may_stream: not for decoding, which never waits for an upload however many sequences there are.
        """
        num_tokens = len(normed)
        host = self._host_for(num_tokens, normed.shape[1], ids.shape[1])
        host.copy_ids(ids)
        chosen = self._chosen(layer, host, num_tokens, self._streams.event())
        if num_tokens > ROW_TOKENS or (may_stream and num_tokens >= MIN_STREAM_TOKENS):
            num_windows = -(-num_tokens // self.cpu.capacity)
            division = self.streamed.divide(layer, chosen, self.slots.residents(layer), num_windows)
            if division.streamed or num_tokens > ROW_TOKENS:
                self._uncounted.append(_LayerRun(layer, chosen))
                choice = ExpertChoice(normed, ids, weights)
                return self.streamed.forward(layer, choice, host, division, shared_expert, self.num_threads)
        host.copy_x(normed)
        copied = self._streams.event()
        slot_of_choice, hit_rows = self.hits(layer, normed, ids)
        shared = shared_expert()
        self._streams.finish(copied, num_tokens)
        self._compute_misses(layer, host, chosen)
        miss_rows = self.cpu.rows[: len(hit_rows)].to(normed.device, non_blocking=True)
        return self.join(slot_of_choice, hit_rows, miss_rows, weights, shared)

    def hits(
        self, layer: int, normed: torch.Tensor, ids: torch.Tensor, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slot int32 (T * K,) of every choice, -1 for those on the CPU, and the rows (T * K, D) of those that have
        one."""
        flat = ids.reshape(-1)
        slot_of_choice = self.slots.table[layer].index_select(0, flat)
        token_of_choice = torch.arange(len(flat), device=flat.device, dtype=torch.int32) // ids.shape[1]
        form = self.store.index.layers[layer]
        rows = self._kernels.expert_choices(normed, self.slots.slots, form, slot_of_choice, token_of_choice, out)
        return slot_of_choice, rows

    def misses(self, layer: int, host: HostCopies, num_tokens: int, copied: Event) -> bool:
        """Wait for the router, then compute what has no slot into `cpu.rows`. False when every choice has one."""
        return self._compute_misses(layer, host, self._chosen(layer, host, num_tokens, copied))

    def join(
        self,
        slot_of_choice: torch.Tensor,
        hit_rows: torch.Tensor,
        miss_rows: torch.Tensor,
        weights: torch.Tensor,
        shared: torch.Tensor | None,
    ) -> torch.Tensor:
        """(T * K,), (T * K, D) twice, (T, K), (T, D) -> (T, D): in the order of the choices, wherever each was
        computed."""
        rows = torch.where((slot_of_choice >= 0)[:, None], hit_rows, miss_rows)
        return self._kernels.weighted_sum(rows.view(*weights.shape, -1), weights, shared)

    def count(self) -> None:
        """Heat, counts, costs and the record of the layers since the last call. Done while the GPU computes."""
        for run in self._uncounted:
            self.slots.count(run.layer, run.chosen)
            if self._recorder:
                self._recorder.add(run.layer, run.chosen)
            self.cpu_s += run.elapsed_s
            self.costs.observe_cpu(run.num_missing, run.num_misses, run.elapsed_s)
        self._uncounted.clear()

    def heat(self) -> np.ndarray:
        """float32 (layers, experts): how much each expert was used lately."""
        self.count()
        return self.slots.policy.export_heat().sum(axis=0)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """What happens inside is neither counted nor makes an expert hot."""
        heat = self.slots.policy.export_heat()
        yield
        self.count()
        self.slots.policy.import_heat(heat)
        self.slots.num_hits = self.slots.num_misses = 0
        self.cpu_s = self.wait_s = 0.0

    def cancel(self) -> None:
        """A pass was given up half-way."""
        self.count()
        self.streamed.cancel()

    def counters(self) -> dict[str, float]:
        self.count()
        times = {"cpu_experts_s": self.cpu_s, "gpu_wait_s": self.wait_s, "stream_s": self.streamed.stream_s}
        return self.store.counters() | self.slots.counters() | times | {"streamed_experts": self.streamed.num_streamed}

    def close(self) -> None:
        """Saves the heat and ends all threads, whatever fails; the store's last, as the others read from it."""
        with ExitStack() as stack:
            for part in (self.store, self.cpu, self.slots, self.streamed):
                stack.callback(part.close)
            self.count()
            if self._heat_file:
                save_heat(self._heat_file, self.slots.policy.export_heat())

    def _chosen(self, layer: int, host: HostCopies, num_tokens: int, copied: Event) -> np.ndarray:
        """int32 (T, K): what the router chose, once the copy is there. The CPU's threads stay awake meanwhile."""
        self.count()
        start_s = time.perf_counter()
        self._streams.finish(copied, num_tokens, partial(self.cpu.keep_awake, self.num_threads))
        self.wait_s += time.perf_counter() - start_s
        return host.ids.numpy()[:num_tokens].copy()

    def _compute_misses(self, layer: int, host: HostCopies, chosen: np.ndarray) -> bool:
        is_miss = self.slots.slots_of(layer, chosen) < 0
        missing, elapsed_s = chosen[is_miss], 0.0
        if len(missing):
            absent = np.where(is_miss, chosen, -1)
            start_s = time.perf_counter()
            self.cpu.compute(layer, host.x.numpy()[: len(chosen)], absent, self.num_threads)
            elapsed_s = time.perf_counter() - start_s
        self._uncounted.append(_LayerRun(layer, chosen, len(set(missing.tolist())), len(missing), elapsed_s))
        return len(missing) > 0

    def _host_for(self, num_tokens: int, hidden_size: int, top_k: int) -> HostCopies:
        """Grows to the longest batch seen."""
        if self._host is None or len(self._host.x) < num_tokens:
            self._host = HostCopies(self._streams, num_tokens, hidden_size, top_k)
        return self._host
