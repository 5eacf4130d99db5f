"""Routed experts of a prompt: the most wanted ones stream through the GPU while the CPU computes those that few tokens
want.

`divide` decides which is which; experts with a slot in VRAM need no copy. As with fewer tokens (`hybrid.routed`), every
choice's product has a row of its own and a token's rows are added in the order of its choices: no result depends on
where an expert was computed, when it came, or with which others. The rows lie in the order in which experts are
computed, so that those of a group are one piece: residents, then what streams, then the CPU's.

The bus works while attention does: before a layer's router has spoken, the experts that it will probably want are
requested, which is all of them for a long prompt. How far the stream gets ahead is how many slots it has. A long prompt
therefore borrows the coldest slots of the cache (`slots_worth_lending`), which get them back when it decodes.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kimi_lite.experts.costs import ExpertCosts, Trial
from kimi_lite.experts.gpu_streams import Event, GpuStreams
from kimi_lite.experts.index import ExpertIndex, RoutedLayer
from kimi_lite.experts.ram import RamSlots
from kimi_lite.experts.stream import PromptStream
from kimi_lite.experts.vram import VramSlots
from kimi_lite.model.hybrid.cpu_experts import CpuExperts, HostCopies
from kimi_lite.model.hybrid.kernels import Kernels
from kimi_lite.plan.workspace import SENT_ROWS
from kimi_lite.units import counted

_SMALL_SHARE = 0.1  # of the experts: fewer are streamed as well, since then the next layer's stream can begin early
_SURE_SHARE = 0.75  # of what a layer will probably stream is requested before its router has spoken
_FOR_THE_BUS = 1 << 20  # tokens that want an expert which the CPU shall not compute
_MOST_LENT = 0.5  # of the cache's slots
_REFILL = 2.0  # what a slot that was lent costs when it is filled again, in times of a streamed expert
_NEWS = 0.1  # of the experts: a prompt that divides them otherwise by so much is worth a line
_log = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """In which order a layer's experts are computed. Expert `experts[i]` is in slot `slots[i]`, and its choices' rows
    are starts[i] .. starts[i + 1]; the first `num_resident` are there already. Behind all of them, the CPU's rows."""

    experts: list[int]
    slots: list[int]
    starts: np.ndarray  # int64 (n + 1,)
    num_resident: int

    def tables(self, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 (E,) twice: of each expert its number in this order, n on the CPU; and its slot, -1 there."""
        number, slot = np.full(num_experts, len(self.experts), np.int32), np.full(num_experts, -1, np.int32)
        number[self.experts], slot[self.experts] = np.arange(len(self.experts)), self.slots
        return number, slot


class _Sorted(NamedTuple):
    """The choices in that order, and memory for their products, on the device."""

    tokens: torch.Tensor  # int32 (T * K,)
    slots: torch.Tensor  # int32 (T * K,)
    places: torch.Tensor  # int32 (T, K): where each choice went
    rows: torch.Tensor  # float32 (T * K, D)


class StreamedExperts:
    """Holds the stream; `close` ends its threads. `stream_s`, `cpu_s`: seconds since the start."""

    def __init__(
        self,
        streams: GpuStreams,
        kernels: Kernels,
        index: ExpertIndex,
        slots: VramSlots,
        cpu: CpuExperts,
        stream: PromptStream,
        costs: ExpertCosts,
        ram: RamSlots | None = None,
        is_reproducible: bool = False,
    ) -> None:
        """ram: where not all experts fit into it, those that do. is_reproducible: whether an expert gives the GPU's
        tokens the CPU's bits, in which case no division of a layer changes the result."""
        self._streams, self._kernels, self._index, self._ram = streams, kernels, index, ram
        self._is_exact = True if is_reproducible else None
        self._slots, self._cpu, self._stream, self._costs = slots, cpu, stream, costs
        self._launcher = ThreadPoolExecutor(1, "kimi-lite-launch", initializer=streams.enter_thread)
        self._numbers, self._cpu_rows = _Numbers(streams), _CpuRows(streams, cpu)
        self._shares: dict[int, np.ndarray] = {}  # by layer: of a pass's tokens that chose each expert, float64 (E,)
        self._sizes, self._mean_bytes = index.relative_sizes, index.mean_expert_bytes
        self._trials: dict[int, Trial | None] = {}  # by layer, decided when it was requested ahead
        self._pace, self._shown = _Pace(), _Shares()
        self._is_undecided = False  # whether this pass borrows slots
        self.stream_s = self.cpu_s = 0.0

    @property
    def num_streamed(self) -> int:
        return self._stream.num_streamed

    def begin(self, num_tokens: int) -> None:
        """A prompt's pass over so many tokens begins: its first layer's experts come while attention is computed."""
        self._pace.begin(num_tokens)
        self._shown.begin(num_tokens)
        self._is_undecided = True
        self._borrow(num_tokens)
        self._request_ahead(min(self._index.layers), num_tokens)

    def give_slots_back(self) -> None:
        """The cache gets back what a prompt borrowed, empty."""
        if self._stream.num_lent:
            self._slots.take_back(self._stream.take_back())

    def divide(self, layer: int, chosen: np.ndarray, num_windows: int) -> Division:
        """chosen: int32 (T, K). As `ExpertCosts` knows the two sides; what is on its way already is streamed in any
        case."""
        self._pace.router_spoke(layer)
        self._borrow(len(chosen))
        counts = np.bincount(chosen.reshape(-1), minlength=self._index.num_experts)
        self._shares[layer] = counts / len(chosen)
        is_resident = self._slots.residents(layer)
        resident = np.flatnonzero((counts > 0) & is_resident).tolist()
        absent = np.flatnonzero((counts > 0) & ~is_resident)
        is_bound = np.isin(absent, self._stream.begun(layer)) | self._comes_from_disk(layer, absent, num_windows)
        counts = np.where(is_bound, _FOR_THE_BUS, counts[absent])
        order = np.argsort(-counts, kind="stable")
        wanted = counts[order].tolist()
        trial = self._trials.pop(layer) if layer in self._trials else self._costs.trial(wanted, num_windows)
        num_streamed = max(int(is_bound.sum()), self._costs.split(wanted, num_windows, trial))
        if len(absent) - num_streamed < _SMALL_SHARE * len(absent):
            num_streamed = len(absent)
        self._costs.divided(num_streamed, len(absent) - num_streamed)
        self._shown.add(len(resident), num_streamed, len(absent) - num_streamed)
        if layer == max(self._index.layers):
            self._shown.tell()
        absent = absent[order]
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
        num_tokens = len(choice.normed)
        order = self._request(layer, division)
        is_alone = not division.streamed  # nothing comes meanwhile, so that the CPU's cost alone shows
        if not is_alone:
            self._request_ahead(layer + 1, num_tokens)
        on_cpu = np.where(np.isin(division.chosen, division.on_cpu), division.chosen, -1)
        tokens_on_cpu = np.flatnonzero((on_cpu >= 0).any(axis=1)).astype(np.int32)
        number, slot, needed = self._numbers.send(*order.tables(self._index.num_experts), tokens_on_cpu)
        if len(tokens_on_cpu):
            host.copy_x(choice.normed.index_select(0, needed))
        choices = _sort(choice, number, slot)
        ready = self._streams.event()
        launched = self._launcher.submit(self._multiply, layer, order, choice, choices)
        try:
            shared = shared_expert()
            if len(tokens_on_cpu):
                x, ids = host.x.numpy()[: len(tokens_on_cpu)], on_cpu[tokens_on_cpu]
                self._compute_on_cpu(layer, x, ids, ready, choices.rows[order.starts[-1] :], num_threads)
            if is_alone:
                self._request_ahead(layer + 1, num_tokens)
            self._finish(layer, launched)
        except BaseException:
            launched.exception()  # it takes from the stream until its layer ends; then the stream can be cancelled
            raise
        finally:
            self._cpu_rows.wait()  # before the memory of `rows` is used for something else
        return self._kernels.sum_at_places(choices.rows, choices.places, choice.weights, shared)

    def skip(self, layer: int) -> None:
        """Nothing of this layer streams after all: what was requested ahead is not waited for by anything."""
        self._stream.keep(layer, set())
        for _ in self._stream.groups(layer):
            continue

    def cancel(self) -> None:
        """A pass was given up: what was requested ahead is no longer wanted."""
        self._stream.cancel()

    def counters(self) -> dict[str, float]:
        own = {"stream_s": self.stream_s, "stream_cpu_s": self.cpu_s, "stream_slots_lent": self._stream.num_lent}
        return own | self._stream.counters()

    def close(self) -> None:
        """Ends the threads."""
        with ExitStack() as stack:
            stack.callback(self._stream.close)
            self._launcher.shutdown()

    def _compute_on_cpu(
        self, layer: int, x: np.ndarray, expert_ids: np.ndarray, ready: Event, rows: torch.Tensor, num_threads: int
    ) -> None:
        self._observe_stream()
        start_s = time.perf_counter()
        num_read = self._cpu_rows.compute(layer, x, expert_ids, ready, rows, num_threads)
        elapsed_s = time.perf_counter() - start_s
        self.cpu_s += elapsed_s
        size = self._sizes[layer]
        beside_s = self._observe_stream(is_beside=True)
        self._costs.observe_cpu(num_read * size, len(rows) * size, elapsed_s, beside_s)

    def _observe_stream(self, is_beside: bool = False) -> float:
        """What came since the last call; returns the seconds in which the stream was at work."""
        num_bytes, busy_s = self._stream.new_work()
        self._costs.observe_stream(num_bytes / self._mean_bytes, busy_s, is_beside)
        return busy_s

    def _comes_from_disk(self, layer: int, experts: np.ndarray, num_windows: int) -> np.ndarray:
        """bool (n,): those that are not in RAM, which a long prompt streams: it needs nearly every expert once, and
        reading them for the CPU would push out of RAM what is there."""
        if not self._is_from_disk or num_windows == 1:
            return np.zeros(len(experts), bool)
        return ~self._ram.residents(layer)[experts]

    def _expect(self, layer: int, num_tokens: int) -> np.ndarray:
        """Experts that a layer will probably stream for so many tokens: by what it chose in the pass before."""
        absent = np.flatnonzero(~self._slots.residents(layer))
        even = np.full(self._index.num_experts, len(self._cpu.rows) / self._cpu.capacity / self._index.num_experts)
        counts = num_tokens * self._shares.get(layer, even)[absent]
        order = np.argsort(-counts, kind="stable")
        wanted, num_windows = counts[order].tolist(), -(-num_tokens // self._cpu.capacity)
        trial = self._trials[layer] = self._costs.trial(wanted, num_windows) if layer in self._shares else None
        count = self._costs.split(wanted, num_windows, trial)
        if len(absent) - count < _SMALL_SHARE * len(absent):
            return absent
        return absent[order[: int(_SURE_SHARE * count)]] if layer in self._shares else absent[:0]

    def _request_ahead(self, layer: int, num_tokens: int) -> None:
        if layer in self._index.layers:
            self._stream.request(layer, self._in_turn(layer, self._expect(layer, num_tokens).tolist()))

    def _request(self, layer: int, division: Division) -> _Order:
        """What was requested ahead, now that it is known what is wanted: the rest goes, what lacks is requested."""
        self._stream.keep(layer, set(division.streamed))
        known = {expert for expert, _ in self._stream.requested(layer)}
        self._stream.request(layer, self._in_turn(layer, [e for e in division.streamed if e not in known]))
        slot_of = dict(self._stream.requested(layer))
        streamed = [expert for expert in slot_of if expert in set(division.streamed)]
        resident_slots = self._slots.slots_of(layer, np.array(division.resident, np.int64)).tolist()
        experts, slots = division.resident + streamed, resident_slots + [slot_of[expert] for expert in streamed]
        counts = np.bincount(division.chosen.reshape(-1), minlength=self._index.num_experts)[experts]
        return _Order(experts, slots, np.concatenate([[0], np.cumsum(counts)]), len(division.resident))

    def _in_turn(self, layer: int, experts: list[int]) -> list[int]:
        """Those of the disk among those of RAM, evenly: while some cross the bus, the disk brings the others."""
        if not self._is_from_disk:
            return experts
        is_in_ram = self._ram.residents(layer)
        sides = [[e for e in experts if is_in_ram[e] == side] for side in (False, True)]
        turns = [((i + 0.5) / len(side), expert) for side in sides for i, expert in enumerate(side)]
        return [expert for _, expert in sorted(turns)]

    def _borrow(self, num_tokens: int) -> None:
        """Once a pass, as soon as it is known how long a layer's attention takes. Not where RAM does not hold all
        experts: the disk sets the pace then, and from there the cache would have to be filled again."""
        attention_s = self._pace.attention_s(num_tokens)
        if not self._is_undecided or attention_s is None or self._is_from_disk:
            return
        self._is_undecided = False
        count = slots_worth_lending(
            num_layers=len(self._index.layers),
            num_streamed=self._index.num_experts * (1 - self._slots.policy.num_resident / self._num_experts),
            attention_s=attention_s,
            stream_s=self._costs.stream_s,
            miss_s=self._costs.cpu_s + self._costs.choice_s,
            num_own=self._stream.num_slots,
            most=int(_MOST_LENT * self._slots.capacity) - self._stream.num_lent,
        )
        if count:
            slots, freed = self._slots.lend(count)
            self._stream.lend(slots, freed)

    @property
    def _num_experts(self) -> int:
        return len(self._index.layers) * self._index.num_experts

    @property
    def _is_from_disk(self) -> bool:
        """Whether some experts are not in RAM."""
        return self._ram is not None and not self._ram.holds_all

    def _finish(self, layer: int, launched: Future[float]) -> None:
        self.stream_s += launched.result()
        self._pace.layer_ended(layer)
        self._observe_stream()

    def _multiply(self, layer: int, order: _Order, choice: ExpertChoice, choices: _Sorted) -> float:
        """The rows of resident and streamed experts; seconds until the device has them."""
        start_s = time.perf_counter()
        form = self._index.layers[layer]
        with torch.inference_mode():
            inputs = self._inputs(choice)
            self._products(form, order, 0, order.num_resident, inputs, choices)
            first, wanted = order.num_resident, set(order.experts[order.num_resident :])
            for group in self._stream.groups(layer):
                end = first + sum(expert in wanted for expert in group.experts)
                self._products(form, order, first, end, inputs, choices)
                first = end
            assert first == len(order.experts), (first, order.experts)
            self._streams.finish(self._streams.event(), len(choice.normed))
        return time.perf_counter() - start_s

    def _inputs(self, choice: ExpertChoice) -> tuple[torch.Tensor, torch.Tensor]:
        """What few choices read and what many do, which is rounded once and not by each group's kernels."""
        is_rounded = not self._is_exact and choice.ids.numel() >= self._kernels.grouped_choices
        return choice.normed, choice.normed.to(torch.bfloat16) if is_rounded else choice.normed

    def _products(
        self,
        form: RoutedLayer,
        order: _Order,
        first: int,
        end: int,
        inputs: tuple[torch.Tensor, torch.Tensor],
        choices: _Sorted,
    ) -> None:
        """Rows of the experts `first` .. `end` in the order."""
        if first == end:
            return
        lowest, highest = min(order.slots[first:end]), max(order.slots[first:end])  # kernels look at each slot
        piece = slice(order.starts[first], order.starts[end])
        is_many = order.starts[end] - order.starts[first] >= self._kernels.grouped_choices
        self._kernels.expert_choices(
            inputs[int(is_many)],
            self._slots.slots[lowest : highest + 1],
            form,
            choices.slots[piece] - lowest,
            choices.tokens[piece],
            choices.rows[piece],
            is_exact=self._is_exact,
        )


def slots_worth_lending(
    *,
    num_layers: int,
    num_streamed: float,
    attention_s: float,
    stream_s: float,
    miss_s: float,
    num_own: int,
    most: int,
) -> int:
    """How many slots of the cache a prompt's pass should borrow, 0 where it does not pay.

    With n slots the bus can bring n experts during a layer's attention, `attention_s`, at `stream_s` each, and never
    more than the layer streams. A slot that was lent is filled again afterwards, and until then a miss that it would
    have saved costs `miss_s` for each token; the coldest are lent, which save one in some tokens.
    """
    useful = min(attention_s / stream_s, num_streamed)
    count = min(most, int(np.ceil(useful)) - num_own)
    if count <= 0:
        return 0
    saved_s = num_layers * stream_s * (min(useful, num_own + count) - num_own)
    lost_s = count * (_REFILL * stream_s + miss_s)
    return count if saved_s > lost_s else 0


class _Shares:
    """Where the experts of a pass were computed: a line in the log when that has changed."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._counts = np.zeros(3)  # in VRAM already, streamed, by the CPU: experts of all layers so far
        self._told: np.ndarray | None = None  # the shares of the last line

    def begin(self, num_tokens: int) -> None:
        self._num_tokens, self._counts = num_tokens, np.zeros(3)

    def add(self, num_resident: int, num_streamed: int, num_on_cpu: int) -> None:
        self._counts += num_resident, num_streamed, num_on_cpu

    def tell(self) -> None:
        """Behind the last layer."""
        shares = self._counts / max(1, self._counts.sum())
        if self._told is not None and np.abs(shares - self._told).max() < _NEWS:
            return
        self._told = shares
        words = "experts of %s of a prompt: %.0f %% were in VRAM, %.0f %% streamed to it, %.0f %% computed by the CPU"
        _log.info(words, counted(self._num_tokens, "token"), *(100 * shares))


class _Pace:
    """How long attention takes between two layers' experts, by what was measured."""

    def __init__(self) -> None:
        self._token_s: float | None = None  # of a layer, a token
        self._num_tokens = 0
        self._ended: tuple[int, float] | None = None  # the last layer, and when its experts were done

    def begin(self, num_tokens: int) -> None:
        self._num_tokens, self._ended = num_tokens, None

    def router_spoke(self, layer: int) -> None:
        if self._ended is None or self._ended[0] != layer - 1 or not self._num_tokens:
            return
        token_s = (time.perf_counter() - self._ended[1]) / self._num_tokens
        self._token_s = token_s if self._token_s is None else self._token_s + 0.3 * (token_s - self._token_s)
        self._ended = None

    def layer_ended(self, layer: int) -> None:
        self._ended = layer, time.perf_counter()

    def attention_s(self, num_tokens: int) -> float | None:
        """Of a layer of so many tokens; None before anything was measured."""
        return None if self._token_s is None else self._token_s * num_tokens


class _Numbers:
    """Small int32 arrays on their way to the device, once a layer: one copy, for which the host does not wait. When the
    buffer's turn comes again, two routers that came behind the copy have been waited for."""

    def __init__(self, streams: GpuStreams) -> None:
        self._streams = streams
        self._buffers: deque[torch.Tensor] = deque()

    def send(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """The same on the device, once what the current stream was given before is done."""
        lengths = [len(array) for array in arrays]
        buffer = self._buffer(sum(lengths))
        buffer.numpy()[:] = np.concatenate(arrays)
        sent = buffer.to(self._streams.device, non_blocking=True)
        self._buffers.append(buffer)
        return list(sent.split(lengths))

    def _buffer(self, length: int) -> torch.Tensor:
        """int32 (length,), pinned, that no copy reads any more."""
        if len(self._buffers) == 2 and len(buffer := self._buffers.popleft()) == length:
            return buffer
        return self._streams.pinned((length,), torch.int32)


class _CpuRows:
    """Products of the CPU's share on their way to the device, a few at a time."""

    def __init__(self, streams: GpuStreams, cpu: CpuExperts) -> None:
        self._streams, self._cpu = streams, cpu
        shape = (SENT_ROWS, cpu.rows.shape[1])
        self._buffers: deque[tuple[torch.Tensor, Event | None]] = deque(
            (streams.pinned(shape, torch.float32), None) for _ in range(2)
        )

    def compute(
        self, layer: int, x: np.ndarray, expert_ids: np.ndarray, ready: Event, rows: torch.Tensor, num_threads: int
    ) -> int:
        """x float32 (t, D), expert_ids int32 (t, K), -1 for choices of others -> `rows` (n, D) on the device, in the
        order of tokens and choices, a window of tokens at a time. `ready`: x is there, and `rows` may be written.
        Returns how often an expert was read."""
        done = num_read = 0
        self._streams.finish(ready, len(x))
        for first in range(0, len(x), self._cpu.capacity):
            ids = expert_ids[first : first + self._cpu.capacity]
            self._cpu.compute(layer, x[first : first + len(ids)], ids, num_threads)
            num_read += len(np.setdiff1d(ids, [-1]))
            places = np.flatnonzero(ids.reshape(-1) >= 0)
            for at in range(0, len(places), SENT_ROWS):
                part = places[at : at + SENT_ROWS]
                self._send(part, rows[done : done + len(part)])
                done += len(part)
        assert done == len(rows), (done, rows.shape)
        return num_read

    def wait(self) -> None:
        """The current stream waits for all that was sent."""
        for _, sent in self._buffers:
            if sent is not None:
                self._streams.wait(sent)

    def _send(self, places: np.ndarray, target: torch.Tensor) -> None:
        """On the copy stream: the compute stream is busy with the GPU's share."""
        buffer, sent = self._buffers.popleft()
        try:
            if sent is not None:
                self._streams.finish(sent)
            np.take(self._cpu.rows.numpy(), places, axis=0, out=buffer.numpy()[: len(places)], mode="clip")
            with self._streams.copying():
                self._streams.copy(target, buffer[: len(places)])
                sent = self._streams.event()
        finally:
            self._buffers.append((buffer, sent))


def _sort(choice: ExpertChoice, number: torch.Tensor, slot: torch.Tensor) -> _Sorted:
    """number, slot: int32 (E,), the tables of an `_Order`."""
    ids = choice.ids.reshape(-1)
    order = torch.sort(number.index_select(0, ids), stable=True).indices
    places = torch.empty_like(ids)
    places[order] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
    rows = torch.empty((len(ids), choice.normed.shape[1]), dtype=torch.float32, device=ids.device)
    tokens = (order // choice.ids.shape[1]).to(torch.int32)
    return _Sorted(tokens, slot.index_select(0, ids.index_select(0, order)), places.view(choice.ids.shape), rows)
