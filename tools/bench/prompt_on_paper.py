"""A long prompt's pass on paper: the product's own stream (`experts.stream`) over a GPU, a bus and a RAM of given
speeds, in virtual time.

    python -m tools.bench.prompt_on_paper
    python -m tools.bench.prompt_on_paper --tokens 4096 --pcie 12 --ram 45

Kimi K2.5's layers with routed experts of TQ1_0. What a layer computes is arithmetic over speeds that are assumed
(`Machine`); when it happens is simulated: every copy, wait and product is asked of a device whose streams are clocks,
by the threads that ask for it on a real one. Nothing here was measured on a GPU.

    slots   of the stream: its own 16, and those that the decode cache lends
    bus     share of the pass in which the bus is busy
    RAM     GB/s that the pass takes of it: what the threads read, and where pieces do not fit into the processor's
            cache, what they write and the bus reads, too
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.costs import expected_expert_share
from kimi_lite.arch.known import K2_5
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.stream import COPY_THREADS, PromptStream
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.plan.workspace import STREAM_EXPERTS

_REQUEST_S = 20e-6  # of the host: a launch, an event
_STAGING_TRAFFIC = 4.0  # bytes of RAM a byte through a buffer that no cache holds: read, fetch, write, read by the bus


@dataclass(frozen=True, slots=True)
class Machine:
    """Speeds; those of arithmetic are what our kernels should reach, counted in useful operations (an RTX 4090:
    review of the GPU path, B7, with weights as the first factor, bfloat16 activations and flash attention)."""

    pcie_bytes_s: float = 23e9
    ram_bytes_s: float = 60e9  # two channels of DDR5
    thread_bytes_s: float = 10e9  # that one thread copies out of RAM
    dense_flops_s: float = 60e12
    expert_flops_s: float = 62e12
    attention_flops_s: float = 70e12
    num_threads: int = COPY_THREADS


class LayerTimes(NamedTuple):
    """Seconds of a layer of a prompt's first chunk, by part; `num_experts` of them stream."""

    dense_s: float
    attention_s: float
    experts_s: float
    stream_s: float
    num_experts: int
    expert_bytes: int


def layer_times(machine: Machine, num_tokens: int, resident_share: float, config: ModelConfig = K2_5) -> LayerTimes:
    """Without overlap: arithmetic over speed, bytes over speed."""
    c, layout = config, BY_NAME["TQ1_0"]
    wide, long = layout.row_bytes(c.hidden_size), layout.row_bytes(c.expert_feed_forward_size)
    expert_bytes = 2 * c.expert_feed_forward_size * wide + c.hidden_size * long
    wanted = c.num_experts * expected_expert_share(c, num_tokens)
    num_experts = round(wanted * (1 - resident_share))
    dense_weights = (c.active_parameters - c.vocab_size * c.hidden_size) / c.num_layers
    dense_weights -= c.num_experts_used * c.expert_parameters * c.num_moe_layers / c.num_layers
    pairs = num_tokens * (num_tokens + 1) / 2
    return LayerTimes(
        dense_s=2 * num_tokens * dense_weights / machine.dense_flops_s,
        attention_s=2 * pairs * c.num_heads * (c.qk_head_dim + c.v_head_dim) / machine.attention_flops_s,
        experts_s=2 * num_tokens * c.num_experts_used * c.expert_parameters / machine.expert_flops_s,
        stream_s=num_experts * expert_bytes / min(machine.pcie_bytes_s, machine.ram_bytes_s),
        num_experts=num_experts,
        expert_bytes=expert_bytes,
    )


@dataclass(slots=True, eq=False)
class _Clock:
    """Of a stream, or of a thread of the host."""

    now_s: float = 0.0


class _Moment(NamedTuple):
    """An event: when it happens."""

    at_s: float

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


class VirtualGpu(GpuStreams):
    """Streams are clocks, and so is every thread of the host. Copies move nothing and take `copy_s`."""

    def __init__(self, copy_s: float) -> None:
        super().__init__("cpu")
        self.compute, self.copies, self._copy_s = _Clock(), _Clock(), copy_s
        self.busy_s = 0.0  # of the bus
        self.read_at: dict[int, float] = {}  # by the address of a piece: when it has been read
        self.sent_at: dict[int, float] = {}  # when it has been sent
        self._local = threading.local()

    @property
    def host(self) -> _Clock:
        """This thread's."""
        return self._local.__dict__.setdefault("clock", _Clock())

    @property
    def _stream(self) -> _Clock:
        return self._local.__dict__.setdefault("stream", self.compute)

    @contextmanager
    def copying(self) -> Iterator[None]:
        before, self._local.stream = self._stream, self.copies
        try:
            yield
        finally:
            self._local.stream = before

    def event(self) -> _Moment:
        return _Moment(self._stream.now_s)

    def wait(self, event: _Moment) -> None:
        self._stream.now_s = max(self._stream.now_s, event.at_s)

    def finish(self, event: _Moment, num_tokens: int = 1, host_is_over: threading.Event | None = None) -> None:
        self.host.now_s = max(self.host.now_s, event.at_s)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        address = source.data_ptr()
        self.copies.now_s = max(self.copies.now_s, self.read_at[address] + _REQUEST_S) + self._copy_s
        self.sent_at[address] = self.copies.now_s
        self.busy_s += self._copy_s

    def run(self, seconds: float) -> None:
        """A kernel on the compute stream."""
        self.host.now_s += _REQUEST_S
        self.compute.now_s = max(self.compute.now_s, self.host.now_s) + seconds


class _VirtualStore:
    """Reads take time and nothing else, on so many threads. Three parts of a byte each stand for an expert's."""

    def __init__(self, gpu: VirtualGpu, read_s: float, num_threads: int, piece_bytes: int) -> None:
        matrices = [SimpleNamespace(offset=i, end=i + 1, num_bytes=1) for i in range(3)]
        layers = dict.fromkeys(range(K2_5.num_layers + 1), SimpleNamespace(matrices=matrices))
        self.index = SimpleNamespace(layers=layers, piece_bytes=piece_bytes)
        self.asked_at: dict[int, float] = {}  # by layer: when it was requested
        self._gpu, self._read_s, self._free_at = gpu, read_s, [0.0] * num_threads
        self._lock = threading.Lock()

    def read_part(self, layer: int, expert: int, part: int, place: np.ndarray) -> np.ndarray:
        address = place.ctypes.data
        with self._lock:
            start_s = max(heappop(self._free_at), self.asked_at[layer], self._gpu.sent_at.get(address, 0.0))
            self._gpu.read_at[address] = start_s + self._read_s
            heappush(self._free_at, start_s + self._read_s)
        return place[:1]


class Simulated(NamedTuple):
    layer_s: float
    bus_share: float
    ram_bytes_s: float


def simulate(
    machine: Machine,
    num_tokens: int,
    num_slots: int,
    resident_share: float = 0.04,
    is_ahead: bool = True,
    is_in_cache: bool = True,
    num_layers: int = 8,
) -> Simulated:
    """A pass over `num_layers` layers with a stream of `num_slots`. is_ahead: the next layer is requested while this
    one computes, as the product does. is_in_cache: pinned pieces never leave the processor's cache."""
    times = layer_times(machine, num_tokens, resident_share)
    traffic = 1.0 if is_in_cache else _STAGING_TRAFFIC
    part_bytes = times.expert_bytes / 3
    gpu = VirtualGpu(part_bytes / machine.pcie_bytes_s)
    thread_s = min(machine.thread_bytes_s, machine.ram_bytes_s / traffic / machine.num_threads)
    store = _VirtualStore(gpu, part_bytes / thread_s, machine.num_threads, int(part_bytes))
    memory = gpu.zeros((num_slots, 3), torch.uint8)
    stream = PromptStream(gpu, store, memory, range(num_slots), STREAM_EXPERTS, machine.num_threads)

    def request(layer: int) -> None:
        store.asked_at[layer] = gpu.host.now_s
        stream.request(layer, range(times.num_experts))

    try:
        request(1)
        for layer in range(1, num_layers + 1):
            gpu.run(times.dense_s + times.attention_s)
            gpu.finish(gpu.event())  # the router
            if is_ahead and layer < num_layers:
                request(layer + 1)
            elif not is_ahead and layer > 1:
                request(layer)
            gpu.run(times.experts_s * resident_share)
            for group in stream.groups(layer):
                gpu.run(times.experts_s * (1 - resident_share) * len(group.experts) / times.num_experts)
            gpu.finish(gpu.event())
    finally:
        stream.close()
    elapsed_s = gpu.compute.now_s
    moved_bytes = num_layers * times.num_experts * times.expert_bytes
    return Simulated(elapsed_s / num_layers, gpu.busy_s / elapsed_s, traffic * moved_bytes / elapsed_s)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    tokens: Annotated[int, typer.Option(help="Of the prompt's chunk.", min=64)] = 8192,
    pcie: Annotated[float, typer.Option(help="GB/s of the bus, pinned.", min=1)] = 23.0,
    ram: Annotated[float, typer.Option(help="GB/s that memory really delivers.", min=1)] = 60.0,
    resident: Annotated[float, typer.Option(help="Share of the experts that have a slot.", min=0, max=0.9)] = 0.04,
) -> None:
    """Print the time of a layer by part, and of a pass with streams of several lengths."""
    machine = Machine(pcie_bytes_s=pcie * 1e9, ram_bytes_s=ram * 1e9)
    times, console = layer_times(machine, tokens, resident), Console(width=100, highlight=False)
    console.print(f"K2.5, TQ1_0, {tokens} tokens, {pcie:g} GB/s of PCIe, {ram:g} GB/s of RAM; ms of a layer:")
    for name, seconds in (
        ("dense", times.dense_s),
        ("attention", times.attention_s),
        (f"stream of {times.num_experts} experts", times.stream_s),
        ("products of experts", times.experts_s),
    ):
        console.print(f"  {1e3 * seconds:6.1f}  {name}")
    own = 2 * STREAM_EXPERTS
    rows = [
        ("nothing ahead", simulate(machine, tokens, own, resident, is_ahead=False)),
        ("ahead, staging beyond the cache", simulate(machine, tokens, own, resident, is_in_cache=False)),
        *((f"ahead, {n} slots", simulate(machine, tokens, n, resident)) for n in (own, 64, 128, 192, 256, 384)),
    ]
    table = Table("", "ms a layer", "tokens/s", "bus", "RAM GB/s", box=None)
    for name, each in rows:
        speed = tokens / (each.layer_s * K2_5.num_moe_layers)
        table.add_row(
            name, f"{1e3 * each.layer_s:.0f}", f"{speed:.0f}", f"{each.bus_share:.0%}", f"{each.ram_bytes_s / 1e9:.0f}"
        )
    console.print(table)


if __name__ == "__main__":
    app()
