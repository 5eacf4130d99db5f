"""A generated token of Kimi K2.5 on a CPU of one or several sockets, on paper: threads, the tasks that they take, and
the memory that they take them from, simulated.

    python -m tools.bench.predict report.txt --cores 64 --sockets 2 --bandwidth 400

Tasks are the rows of each product of a layer, handed out by the program's own code (`native.cpu.bands`: a band for each
thread, stealing from near threads first). A thread that has a task reads its bytes as fast as the slowest of these
allows, all that read at the time having equal parts:

    its core         cycles of the kernel; the lines that a core can wait for, over the latency of where they come from
    a socket's RAM   the share of the bandwidth that is its own
    a socket's link  what comes in from other sockets' RAM

where a task's bytes lie `by rows` on the socket of the threads whose band they are, `interleaved` over all sockets, or
on `one node`. A barrier costs arrivals at counters in turn, of a gate's threads and then of the gates
(`native.cpu.threads`), more where a counter's line comes from another socket. Left out: attention over the context,
what is computed between products (norms, router, choice), how long waiting threads take to see that all are there, and
other programs. Nothing of it has been measured on a machine with two sockets.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import K2_5
from kimi_lite.hardware.nodes import LINK_SHARE, MemoryUse
from kimi_lite.native.cpu.bands import Bands, enter_phase, take_tasks
from kimi_lite.native.cpu.compiler import function
from kimi_lite.native.cpu.linear import BAND_STEP, TASK_ROWS
from kimi_lite.native.cpu.threads import divide_gates

USES: tuple[MemoryUse, ...] = ("by rows", "interleaved", "one node")
_BARRIERS = 12  # of a layer, those between the products included
_HALF = 1 << 32


@dataclass(frozen=True, slots=True)
class Server:
    """What is assumed of a machine. Bandwidth is of all sockets together."""

    cores: int
    sockets: int
    clock_ghz: float
    bandwidth_gb_s: float
    link_share: float = LINK_SHARE  # of a socket's own bandwidth that can come in from the others
    core_gb_s: float = 12.0  # that one core can read of its own socket's RAM
    far_share: float = 0.6  # of that, from another socket's: the latency is 1.7 times as long
    arrival_ns: float = 40.0  # at a barrier's counter, after a thread of the same socket
    far_arrival_ns: float = 120.0  # after one of another
    slow_cores: int = 0  # that are at half speed, as another program has them

    @property
    def barrier_s(self) -> float:
        """The fullest gate's threads one after the other, then the gates, from the sockets in any order."""
        threads = [self.socket_of(thread) for thread in range(self.cores)]
        gates = divide_gates([threads.count(socket) for socket in range(self.sockets)])
        far = (self.sockets - 1) / self.sockets
        mixed_ns = far * self.far_arrival_ns + (1 - far) * self.arrival_ns
        num_arrivals = len(gates) if len(gates) > 1 else 0
        return 1e-9 * (max(gates) * self.arrival_ns + num_arrivals * mixed_ns) if self.cores > 1 else 0.0

    def socket_of(self, thread: int) -> int:
        return thread * self.sockets // self.cores


@dataclass(frozen=True, slots=True)
class Weights:
    """What a weight of a type costs, as `tools.bench.predict.Kernel`."""

    bytes_per_weight: float
    cycles_per_weight: float


@dataclass(frozen=True, slots=True)
class Product:
    """Between two barriers: steps of `BAND_STEP` rows of `num_matrices` matrices, one behind the other."""

    name: str
    num_matrices: int
    num_steps: int  # of each matrix
    step_weights: int  # in a step
    kind: Weights

    @property
    def num_tasks(self) -> int:
        return self.num_matrices * self.num_steps


def attention_products(config: ModelConfig, kind: Weights) -> list[Product]:
    """Of a layer: down to the latents, up to the heads, the two sides of absorbed attention, and the output."""
    c = config
    latents = c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim
    heads = c.num_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    return [
        _rows("attn_q_a, kv_a", latents, c.hidden_size, kind),
        _rows("attn_q_b", heads, c.q_lora_rank, kind),
        _rows("attn_k_b", c.num_heads * c.kv_lora_rank, c.qk_nope_head_dim, kind),
        _rows("attn_v_b", c.num_heads * c.v_head_dim, c.kv_lora_rank, kind),
        _rows("attn_output", c.hidden_size, c.num_heads * c.v_head_dim, kind),
    ]


def feed_forward_products(config: ModelConfig, width: int, num_matrices: int, kind: Weights) -> list[Product]:
    """Gate and up of so many experts, of which each thread takes the same rows; down's rows in all of them."""
    size = config.hidden_size
    gate_up = Product("gate, up", num_matrices, width // BAND_STEP, 2 * BAND_STEP * size, kind)
    return [gate_up, Product("down", 1, size // BAND_STEP, num_matrices * BAND_STEP * width, kind)]


def _rows(name: str, num_rows: int, k: int, kind: Weights) -> Product:
    return Product(name, 1, num_rows // BAND_STEP, BAND_STEP * k, kind)


@function("int64(int64, int64, int64, int64)")
def _take(bands, thread, num_tasks, most):
    first, count = take_tasks(bands, thread, num_tasks, most)
    return first * _HALF + count


@function("void(int64, int64)")
def _enter(bands, thread):
    enter_phase(bands, thread)


@dataclass(slots=True)
class _Reader:
    """A thread with a task: what it still has to read, and from where."""

    socket: int
    source: int  # the socket whose RAM it reads; -1: all alike
    is_slow: bool
    left_bytes: float
    rate: float = 0.0

    @property
    def likeness(self) -> tuple[int, int, bool]:
        """Readers that are alike are equally fast."""
        return self.socket, self.source, self.is_slow


def product_s(product: Product, server: Server, use: MemoryUse) -> float:
    """Seconds until the last thread has no task left."""
    bands = Bands([server.socket_of(thread) for thread in range(server.cores)])
    for thread in range(server.cores):
        _enter(bands.address, thread)
    readers: dict[int, _Reader] = {}
    for thread in range(server.cores):
        _begin(readers, bands, thread, product, server, use)
    now_s = 0.0
    while readers:
        _set_rates(list(readers.values()), server, product.kind)
        step_s = min(reader.left_bytes / reader.rate for reader in readers.values())
        now_s += step_s
        for thread, reader in list(readers.items()):
            reader.left_bytes -= reader.rate * step_s
            if reader.left_bytes <= 1e-6:
                del readers[thread]
                _begin(readers, bands, thread, product, server, use)
    return now_s


def _begin(
    readers: dict[int, _Reader], bands: Bands, thread: int, product: Product, server: Server, use: MemoryUse
) -> None:
    """The thread's next tasks, where there are any."""
    first, count = divmod(_take(bands.address, thread, product.num_tasks, TASK_ROWS // BAND_STEP), _HALF)
    if count == 0:
        return
    num_bytes = count * product.step_weights * product.kind.bytes_per_weight
    owner = server.socket_of(first * server.cores // product.num_tasks)  # of the band, whose rows these are
    source = {"by rows": owner, "interleaved": -1 if server.sockets > 1 else 0, "one node": 0}[use]
    readers[thread] = _Reader(server.socket_of(thread), source, thread < server.slow_cores, num_bytes)


def _set_rates(readers: Sequence[_Reader], server: Server, kind: Weights) -> None:
    """Bytes/s of each: all grow alike until what one of them needs is used up."""
    sockets, ram = server.sockets, 1e9 * server.bandwidth_gb_s / server.sockets
    counts: dict[tuple[int, int, bool], int] = {}
    for reader in readers:
        counts[reader.likeness] = counts.get(reader.likeness, 0) + 1
    needs = {likeness: _needs(likeness, sockets) for likeness in counts}
    left = {("ram", s): ram for s in range(sockets)} | {("link", s): server.link_share * ram for s in range(sockets)}
    caps = {likeness: _core_rate(likeness, server, kind) for likeness in counts}
    rates, growing = dict.fromkeys(counts, 0.0), set(counts)
    while growing:
        used = {place: sum(counts[each] * needs[each].get(place, 0.0) for each in growing) for place in left}
        step = min(left[place] / share for place, share in used.items() if share)
        step = min(step, *(caps[each] - rates[each] for each in growing))
        for each in growing:
            rates[each] += step
        for place, share in used.items():
            left[place] -= share * step
        full = {place for place in left if left[place] <= 1e-9 * ram}
        growing -= {each for each in growing if rates[each] >= caps[each] * (1 - 1e-12) or full & needs[each].keys()}
    for reader in readers:
        reader.rate = rates[reader.likeness]


@cache
def _needs(likeness: tuple[int, int, bool], sockets: int) -> dict[tuple[str, int], float]:
    """Of each byte, the share that comes from each RAM and through the reader's link."""
    socket, source, _ = likeness
    if source >= 0:
        return {("ram", source): 1.0} | ({("link", socket): 1.0} if source != socket else {})
    return {("ram", each): 1 / sockets for each in range(sockets)} | {("link", socket): (sockets - 1) / sockets}


def _core_rate(likeness: tuple[int, int, bool], server: Server, kind: Weights) -> float:
    """Bytes/s that a core asks for at most."""
    socket, source, is_slow = likeness
    far = 0.0 if source == socket else 1.0 if source >= 0 else (server.sockets - 1) / server.sockets
    waiting = 1e9 * server.core_gb_s / (1 - far + far / server.far_share)
    computing = 1e9 * server.clock_ghz * kind.bytes_per_weight / kind.cycles_per_weight
    return min(waiting, computing) * (0.5 if is_slow else 1.0)


@dataclass(frozen=True, slots=True)
class Token:
    """Seconds of a token: of products, and of barriers."""

    products_s: float
    barriers_s: float
    num_bytes: float

    @property
    def tok_s(self) -> float:
        return 1 / (self.products_s + self.barriers_s)

    def share_of(self, bandwidth_gb_s: float) -> float:
        """Of the tokens/s that bytes over bandwidth would give."""
        return self.num_bytes / (1e9 * bandwidth_gb_s) * self.tok_s


def simulate_token(
    server: Server,
    use: MemoryUse,
    experts: Weights,
    rest: Weights,
    config: ModelConfig = K2_5,
    seconds: Callable[[Product, Server, MemoryUse], float] = product_s,
) -> Token:
    """Every layer of the model, and its head, on the CPU."""
    total_s = num_bytes = 0.0
    for count, product in _products(config, experts, rest):
        total_s += count * seconds(product, server, use)
        num_bytes += count * product.num_tasks * product.step_weights * product.kind.bytes_per_weight
    return Token(total_s, _BARRIERS * config.num_layers * server.barrier_s, num_bytes)


def _products(config: ModelConfig, experts: Weights, rest: Weights) -> Iterator[tuple[int, Product]]:
    """Each product with how often it occurs. The shared expert is one more of the routed ones' shape, in its own type:
    its bytes go with theirs in one phase, so it is a product of its own here."""
    c = config
    num_layers = c.num_dense_layers + c.num_moe_layers
    for product in attention_products(c, rest):
        yield num_layers, product
    for product in feed_forward_products(c, c.feed_forward_size, 1, rest):
        yield c.num_dense_layers, product
    width = c.expert_feed_forward_size
    for product in feed_forward_products(c, width, c.num_experts_used, experts):
        yield c.num_moe_layers, product
    for product in feed_forward_products(c, c.num_shared_experts * width, 1, rest):
        yield c.num_moe_layers, product
    yield 1, _rows("output", c.vocab_size, c.hidden_size, rest)


def busier(server: Server) -> Server:
    """The same with a core that another program has half of the time."""
    return replace(server, slow_cores=1)
