"""The routed experts of a layer behind one call, wherever they are: VRAM, RAM, disk, or passing through the GPU for a
prompt.

Up to ROW_TOKENS tokens: experts with a slot are computed by the GPU, the others by the CPU at the same time, and every
choice's product has a row of its own, added up in the order of the choices, so that nothing depends on where an expert
was. Where it is cheaper (`experts.costs.ExpertCosts`), and always beyond ROW_TOKENS, a batch goes through
`hybrid.streamed`.

    y = experts.forward(layer, normed, ids, weights, shared_expert)

Decoding goes another way (`hybrid.decode`): one CUDA graph holds what runs on the GPU in a step, and `server` computes
what has no slot while it runs.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from kimi_lite.model.hybrid.deferral import Deferral
from kimi_lite.model.hybrid.kernels import MAX_DECODE_TOKENS, Kernels
from kimi_lite.model.hybrid.served import MissServer
from kimi_lite.model.hybrid.streamed import ExpertChoice, StreamedExperts
from kimi_lite.model.hybrid.turns import TakenTurn, Turn, TurnMemory
from kimi_lite.plan.workspace import ROW_TOKENS

MIN_STREAM_TOKENS = 32  # below, an upload is never worth it


class _LayerRun(NamedTuple):
    """A layer of a long batch: what was chosen, what of it the CPU computed, and in which time."""

    layer: int
    chosen: np.ndarray  # int32 (T, K)
    missing: np.ndarray | None = None  # int32 (T, K), -1 in the places of the others
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
        is_reproducible: bool = False,
        num_deferred: int = 0,
    ) -> None:
        """heat_file: where `close` saves how hot the experts are; None: nowhere. recorder: of what tokens choose; its
        passes begin and end elsewhere. is_reproducible: an expert gives the same bits on both sides to prompts, too.
        num_deferred: of a token's experts, added one layer later in decode steps."""
        self._streams, self._kernels, self.store = streams, kernels, store
        self.slots, self.cpu, self.streamed, self.costs = slots, cpu, streamed, costs
        self._sizes = store.index.relative_sizes
        self.num_threads = num_threads  # of the CPU's experts; may change between steps
        self._heat_file, self._recorder, self._is_reproducible = heat_file, recorder, is_reproducible
        self.cpu_s = self.wait_s = 0.0  # computing on the CPU, waiting for the GPU's routers
        self._host: HostCopies | None = None
        self._uncounted: list[_LayerRun] = []
        layers, top_k = store.index.layers, cpu.num_choices
        choices = torch.arange(len(cpu.rows), dtype=torch.int32, device=streams.device)
        self._token_of_choice = choices // top_k
        assert num_deferred == 0 or cpu.holds_all, "what comes from the disk is not deferred"
        self.num_deferred = num_deferred
        memory = TurnMemory.make(streams, len(layers), top_k, cpu.rows, num_deferred > 0)
        self.server = MissServer(layers, cpu, memory, self._count_turns, num_deferred)

    def begin_step(self, promotion_budget: int, num_tokens: int, least_gain: float) -> int:
        """Between steps: promotions arrive and begin, as `VramSlots.begin_step`. Returns how many began."""
        self.count()
        if num_tokens < MIN_STREAM_TOKENS:
            self.streamed.give_slots_back()
        if self.store.ram:
            self.store.ram.begin(num_tokens)
        return self.slots.begin_step(promotion_budget, num_tokens, least_gain)

    def begin_prompt(self, num_tokens: int) -> None:
        """A pass over so many tokens of a prompt begins: what streams may begin before the first router has spoken."""
        if num_tokens >= MIN_STREAM_TOKENS:
            self.streamed.begin(num_tokens)

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
        chosen = self._chosen(host, num_tokens, self._streams.event())
        if num_tokens > ROW_TOKENS or (may_stream and num_tokens >= MIN_STREAM_TOKENS):
            num_windows = -(-num_tokens // self.cpu.capacity)
            division = self.streamed.divide(layer, chosen, num_windows)
            if division.streamed or num_tokens > ROW_TOKENS:
                self._uncounted.append(_LayerRun(layer, chosen))
                choice = ExpertChoice(normed, ids, weights)
                return self.streamed.forward(layer, choice, host, division, shared_expert, self.num_threads)
            self.streamed.skip(layer)
        host.copy_x(normed)
        copied = self._streams.event()
        slot_of_choice = self.slots.table[layer].index_select(0, ids.reshape(-1))
        hit_rows = self.hit_rows(layer, normed, slot_of_choice)
        shared = shared_expert()
        self._streams.finish(copied, num_tokens)
        self._compute_misses(layer, host, chosen)
        miss_rows = self.cpu.rows[: len(hit_rows)].to(normed.device, non_blocking=True)
        rows = torch.where((slot_of_choice >= 0)[:, None], hit_rows, miss_rows)
        return self._kernels.weighted_sum(rows.view(*weights.shape, -1), weights, shared)

    def begin_turns(self, num_tokens: int, limit_s: float) -> int:
        """A decode step begins on the CPU's side: returns the number that its GPU must be told as the one before its
        first turn. limit_s: no turn may take the GPU longer."""
        first = self.server.next_number
        self.server.begin(num_tokens, self.num_threads, limit_s)
        return first

    def deferral(self) -> Deferral | None:
        """For a step; None where nothing is deferred."""
        last = max(self.store.index.layers)
        return Deferral(self._kernels, self.num_deferred, last) if self.num_deferred else None

    def turn(self, layer: int, first: torch.Tensor) -> Turn:
        """The layer's, in steps whose GPU finds the number before their first turn in `first`, int64 (1,)."""
        return self.server.turn(layer, first)

    def give_up_turns(self) -> None:
        """The GPU waits for none of this step's turns any more."""
        self.server.cancel()

    def finish_turns(self) -> None:
        """The GPU has done the step. Raises KimiLiteError for what kept one of the two sides from its part."""
        self.server.finish()

    def hit_rows(self, layer: int, normed: torch.Tensor, slot_of_choice: torch.Tensor) -> torch.Tensor:
        """(T, D), int32 (T * K,) -> (T * K, D): the products of the choices that have a slot; T <= ROW_TOKENS.

        Tokens that are decoded get the bits that the CPU would have given.
        """
        form, token_of_choice = self.store.index.layers[layer], self._token_of_choice[: len(slot_of_choice)]
        is_exact = True if len(normed) <= MAX_DECODE_TOKENS or self._is_reproducible else None
        return self._kernels.expert_choices(
            normed, self.slots.slots, form, slot_of_choice, token_of_choice, is_exact=is_exact
        )

    def count(self) -> None:
        """Heat, counts, costs and the record of the layers since the last call."""
        for run in self._uncounted:
            self._count(run.layer, run.chosen, run.missing, run.elapsed_s)
        self._uncounted.clear()

    def _count_turns(self, turns: list[TakenTurn]) -> None:
        """A decode step's, on the server's thread while the GPU makes the logits."""
        for turn in turns:
            self._count(turn.layer, turn.chosen, turn.missing, turn.elapsed_s)
            self.wait_s += turn.waited_s

    def _count(self, layer: int, chosen: np.ndarray, missing: np.ndarray | None, elapsed_s: float) -> None:
        self.slots.count(layer, chosen)
        if self._recorder:
            self._recorder.add(layer, chosen)
        if missing is not None and (absent := missing[missing >= 0].tolist()):
            self.cpu_s += elapsed_s
            size = self._sizes[layer]
            self.costs.observe_cpu(size * len(set(absent)), size * len(absent), elapsed_s)

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
        times = {"cpu_experts_s": self.cpu_s, "gpu_wait_s": self.wait_s}
        return self.store.counters() | self.slots.counters() | times | self.streamed.counters()

    def close(self) -> None:
        """Saves the heat and ends all threads, whatever fails; the store's last, as the others read from it."""
        with ExitStack() as stack:
            for part in (self.store, self.cpu, self.slots, self.streamed, self.server):
                stack.callback(part.close)
            self.count()
            if self._heat_file:
                layers = None if self.store.index.is_whole else list(self.store.index.layers)
                save_heat(self._heat_file, self.slots.policy.export_heat(), layers)

    def _chosen(self, host: HostCopies, num_tokens: int, copied: Event) -> np.ndarray:
        """int32 (T, K): what the router chose, once the copy is there."""
        self.count()
        start_s = time.perf_counter()
        self._streams.finish(copied, num_tokens)
        self.wait_s += time.perf_counter() - start_s
        return host.ids.numpy()[:num_tokens].copy()

    def _compute_misses(self, layer: int, host: HostCopies, chosen: np.ndarray) -> None:
        is_miss = self.slots.slots_of(layer, chosen) < 0
        missing, elapsed_s = np.where(is_miss, chosen, -1), 0.0
        if is_miss.any():
            start_s = time.perf_counter()
            self.cpu.compute(layer, host.x.numpy()[: len(chosen)], missing, self.num_threads)
            elapsed_s = time.perf_counter() - start_s
        self._uncounted.append(_LayerRun(layer, chosen, missing, elapsed_s))

    def _host_for(self, num_tokens: int, hidden_size: int, top_k: int) -> HostCopies:
        """Grows to the longest batch seen."""
        if self._host is None or len(self._host.x) < num_tokens:
            self._host = HostCopies(self._streams, num_tokens, hidden_size, top_k)
        return self._host
