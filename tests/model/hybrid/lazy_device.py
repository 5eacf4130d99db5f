"""A stand-in GPU that is as late as it may be: streams are queues, and what is in them runs in an adversary's order.

A real GPU runs what it is asked for later, and nothing says how much later: a missing synchronization shows once in a
thousand runs. Here it shows in every one. Tensors of the device are wrappers (`Lazy`) around memory on the CPU; every
operation on them goes into the queue of the current stream and runs when an event is waited for, or when the policy
lets it. What is not there yet is poisoned: outputs until their operation runs, pinned targets of copies from the moment
they are asked for, freed memory as soon as the stream that owned it may use it again, the memory of graphs before each
replay. Pinned sources are read when the copy runs, not when it is asked for.

    device = LazyDevice("late")
    with device:                            # torch's factories and `.to` on `device.device` make Lazy tensors
        x = device.zeros((3,), torch.float32)
        x += 1                              # queued
        event = device.event()
        event.synchronize()                 # runs

It is a `GpuStreams`, so that the product runs on it unchanged. It cannot find what lies inside kernels, in the driver
or in speed.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.model.hybrid import attention
from kimi_lite.model.hybrid.kernels import Residents, RouterRule
from kimi_lite.model.hybrid.turns import Turn
from kimi_lite.native.gpu.arguments import Routes
from tests.model.hybrid.stand_in import is_answered, post

POLICIES = ("late", "copies first", "compute first", "random")
_NUM_STREAMS = 32  # that torch hands out in turn
_MOST_DEVICES = 100  # at a time: torch numbers them with a byte
_NUMBERS = count()
_PATIENCE_S = 10.0  # for a flag that another thread of the host sets
_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default}
_WHOLE = {_aten.linear.default, _aten.matmul.default, _aten.scaled_dot_product_attention.default}  # one operation each
_TO_HOST = {_aten._local_scalar_dense.default, _aten.equal.default}  # give the host a value, so they wait


class Stuck(AssertionError):
    """The host waits for what can never happen."""


@dataclass(slots=True, eq=False)
class Item:
    """Something in a stream's queue. `waits_for`, `is_ready`: it stays at the head, and all behind it, until then."""

    name: str
    run: Callable[[], None] | None = None
    waits_for: "LazyEvent | None" = None
    is_ready: Callable[[], bool] | None = None
    records: "LazyEvent | None" = None


class Stream:
    """Items in the order they were asked for."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.queue: deque[Item] = deque()
        self.threads: set[int] = set()  # that gave it work
        self.graph: LazyGraph | None = None  # that is captured from it

    def __repr__(self) -> str:
        return f"stream {self.number}: {[item.name for item in self.queue]}"


class LazyEvent:
    """Has happened once its item has run."""

    def __init__(self, owner: "LazyDevice", stream: Stream, graph: "LazyGraph | None") -> None:
        self.owner, self.stream, self.graph, self.has_happened = owner, stream, graph, False

    def query(self) -> bool:
        return self.owner.query(self)

    def synchronize(self) -> None:
        self.owner.run_until(self)


class Memory:
    """What `Lazy` tensors lie in; when the last of them is gone, its stream may use it again."""

    def __init__(self, owner: "LazyDevice", base: torch.Tensor, stream: Stream, pool: "Pool | None") -> None:
        self.owner, self.base, self.stream, self.pool = owner, base, stream, pool

    def __del__(self) -> None:
        self.owner.freed(self)


class Lazy(torch.Tensor):
    """A tensor of a lazy device. `plain`: its part of `memory`, as the device will have it."""

    @staticmethod
    def __new__(cls, memory: Memory, plain: torch.Tensor) -> "Lazy":
        with torch.inference_mode():  # views of other tensors cannot be made inside it
            return torch.Tensor._make_wrapper_subclass(
                cls,
                plain.shape,
                strides=plain.stride(),
                storage_offset=plain.storage_offset(),
                dtype=plain.dtype,
                device=memory.owner.device,
            )

    def __init__(self, memory: Memory, plain: torch.Tensor) -> None:
        self.memory, self.plain = memory, plain

    def __repr__(self) -> str:
        return f"Lazy({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        (owner,) = {t.memory.owner for t in tree_flatten((args, kwargs))[0] if isinstance(t, Lazy)}
        return owner.dispatch(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sends a thread's factories and copies onto the device there."""

    def __init__(self, owner: "LazyDevice") -> None:
        super().__init__()
        self._owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, owner = kwargs or {}, self._owner
        is_ours = any(
            t.memory.owner is owner if isinstance(t, Lazy) else isinstance(t, torch.device) and t == owner.device
            for t in tree_flatten((args, kwargs))[0]
        )
        return owner.dispatch(func, args, kwargs) if is_ours else func(*args, **kwargs)


@dataclass(slots=True, eq=False)
class Pool:
    """Memory that graphs share: what one no longer needs, the next takes."""

    free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = field(default_factory=dict)

    def take(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        free = self.free.get((size, dtype))
        return free.pop() if free else torch.empty(size, dtype=dtype)

    def give_back(self, base: torch.Tensor) -> None:
        self.free.setdefault((len(base), base.dtype), []).append(base)


class LazyGraph:
    """What was captured: items and the streams that they go to again at each replay."""

    def __init__(self, owner: "LazyDevice", pool: Pool) -> None:
        self._owner, self.pool, self.thread = owner, pool, threading.get_ident()
        self.items: list[tuple[Stream, Item]] = []
        self.bases: dict[int, torch.Tensor] = {}  # of the pool, by their id
        self.pinned_targets: list[torch.Tensor] = []
        self.is_reset = False

    def replay(self) -> None:
        assert not self.is_reset, "a graph that was reset is replayed"
        self._owner.replay(self)

    def reset(self) -> None:
        self.is_reset = True
        self.items.clear()
        self.bases.clear()
        self._owner.num_graphs -= 1


class LazyDevice(GpuStreams):
    """policy: one of POLICIES. "late" runs nothing before it must, "copies first" lets the compute stream wait for its
    own work, "compute first" all others; "random" throws dice that begin with `seed`. has_graphs: what decodes is
    captured and replayed.

    on_operation(number, name): called with everything the device is asked for, before it is done; may raise. Whether an
    event has happened is asked as often as time allows, so that has no number of its own.
    """

    def __init__(self, policy: str = "late", seed: int = 0, has_graphs: bool = True) -> None:
        super().__init__("cpu")
        assert policy in POLICIES, policy
        self.device, self.is_cuda = torch.device("meta", next(_NUMBERS) % _MOST_DEVICES), has_graphs
        self.on_operation: Callable[[int, str], None] | None = None
        self.num_operations = self.num_graphs = self.num_frees = 0
        self._policy, self._dice = policy, random.Random(seed)
        self._changed = threading.Condition(threading.RLock())
        self._ring = [Stream(i) for i in range(_NUM_STREAMS)]
        self._num_streams_given = 0
        self.compute = Stream(-1)  # the default stream of every thread
        self.copies, self.captures = self.new_stream(), self.new_stream()
        self._local = threading.local()
        self._pinned: dict[int, torch.Tensor] = {}  # by the address of their memory
        self._entered: list[ExitStack] = []

    def __enter__(self) -> "LazyDevice":
        """On this thread."""
        self._entered.append(stack := ExitStack())
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_Mode(self))
        stack.enter_context(patch.object(attention, "causal_lower_right", _causal_lower_right))
        self._local.has_mode = True
        return self

    def __exit__(self, *_: object) -> None:
        self._local.has_mode = False
        self._entered.pop().close()

    # What the product calls ------------------------------------------------------------------------------------------

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self._count("pin")
        memory = torch.zeros(shape, dtype=dtype)
        self._pinned[memory.untyped_storage().data_ptr()] = memory
        return memory

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Lazy:
        out = self.allocate(shape, dtype)
        self.put(Item("zeros", out.plain.zero_))
        return out

    def event(self) -> LazyEvent:
        event = LazyEvent(self, self.stream, self._graph)
        self.put(Item("event", records=event))
        return event

    def wait(self, event: LazyEvent) -> None:
        if event.graph is not self._graph:
            raise RuntimeError("CUDA error: dependency created on uncaptured work in another stream")
        self.put(Item("wait", waits_for=event))

    @contextmanager
    def copying(self) -> Iterator[None]:
        with self.on(self.copies), torch.inference_mode():
            yield

    def enter_thread(self) -> None:
        """Once, however often it is said: threads that end take the mode with them, this one keeps it until exit."""
        if not getattr(self._local, "has_mode", False):
            self._local.has_mode = True
            _Mode(self).__enter__()

    def finish(self, event: LazyEvent, num_tokens: int = 1, host_is_over: threading.Event | None = None) -> None:
        """A host whose other thread works for the device does not ask it for anything: it goes on by itself."""
        while host_is_over is not None and not event.query() and not host_is_over.is_set():
            time.sleep(0)
        super().finish(event, num_tokens)

    def give_back(self) -> None:
        self._count("give back")

    def free_bytes(self) -> int | None:
        return None

    def graph_memory(self) -> Pool:
        return Pool()

    def capture(self, run: Callable[[], None], memory: Pool) -> LazyGraph:
        self._count("capture")
        stream, graph = self.captures, LazyGraph(self, memory)
        if stream.threads - {graph.thread}:
            raise RuntimeError("CUDA error: another thread works in the stream that is captured")
        assert self._graph is None, "a capture inside a capture"
        self._local.graph = stream.graph = graph
        try:
            with self.on(stream):
                run()
        finally:
            self._local.graph = stream.graph = None
        self.num_graphs += 1
        return graph

    # What tests and kernels call -------------------------------------------------------------------------------------

    @property
    def stream(self) -> Stream:
        """The current one of this thread."""
        return getattr(self._local, "stream", self.compute)

    def new_stream(self) -> Stream:
        """As `torch.cuda.Stream()`: the next of 32."""
        self._num_streams_given += 1
        return self._ring[(self._num_streams_given - 1) % _NUM_STREAMS]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Inside, `stream` is the current one of this thread."""
        before = self.stream
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    def put(self, item: Item) -> None:
        """Ask for `item` in the current stream."""
        self._count(item.name)
        stream, graph = self.stream, self._graph
        with self._changed:
            if graph is not None:
                graph.items.append((stream, item))
                return
            if stream.graph is not None:
                raise RuntimeError("CUDA error: operation not permitted on a stream that another thread captures")
            stream.threads.add(threading.get_ident())
            stream.queue.append(item)
            self._follow_policy()

    def kernel(self, name: str, run: Callable[[], None], host_targets: tuple[torch.Tensor, ...] = ()) -> None:
        """A kernel in the current stream. host_targets: pinned memory that it writes."""
        for target in host_targets:
            self._poison_pinned(target)
        self.put(Item(name, run))

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """A kernel that polls: the current stream goes on once `is_ready()`, which looks at memory that the host (or a
        kernel of another stream) writes. Who waits for the device meanwhile waits until another thread has written."""
        self.put(Item("poll", is_ready=is_ready))

    def hang(self) -> None:
        """A kernel that never ends, in the current stream."""
        self.stream.queue.append(Item("hang", is_ready=lambda: False))

    @property
    def pending(self) -> list[str]:
        """What was asked for and has not run, but for frees."""
        return [item.name for stream in (self.compute, *self._ring) for item in stream.queue if item.name != "free"]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the device works by itself, as one does: for a host that polls memory instead of asking for events.
        A stream that waits does not hinder the others."""
        has_ended = threading.Event()

        def work() -> None:
            while not has_ended.is_set():
                with self._changed:
                    has_moved = sum(self._advance(stream) for stream in (self.compute, *self._ring)) > 0
                time.sleep(0 if has_moved else 0.0002)

        worker = threading.Thread(target=work, daemon=True, name="lazy-device")
        worker.start()
        try:
            yield
        finally:
            has_ended.set()
            worker.join()

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def query(self, event: LazyEvent) -> bool:
        """Whether it has happened; asking gives the device the time for one item."""
        if self.on_operation is not None:
            self.on_operation(self.num_operations, "query")
        with self._changed:
            if not event.has_happened:
                self._advance(event.stream)
            return event.has_happened

    def run_until(self, event: LazyEvent) -> None:
        """The host waits."""
        self._count("wait on the host")
        assert self._graph is None, "the host waits inside a capture"
        until_s = None
        with self._changed:
            while not event.has_happened:
                if self._advance(event.stream):
                    until_s = None
                    continue
                until_s = until_s or time.monotonic() + _PATIENCE_S
                if time.monotonic() > until_s or not event.stream.queue:
                    raise Stuck(f"the host waits for ever: {event.stream}")
                self._changed.wait(0.001)

    def replay(self, graph: LazyGraph) -> None:
        self._count("replay")
        events: dict[int, LazyEvent] = {}

        def again(event: LazyEvent | None) -> LazyEvent | None:
            if event is None:
                return None
            stream = self.stream if event.stream is self.captures else event.stream
            return events.setdefault(id(event), LazyEvent(self, stream, None))

        bases = list(graph.bases.values())
        for target in graph.pinned_targets:
            poison(target)
        self.put(Item("graph", lambda: [poison(base) for base in bases]))
        for stream, item in graph.items:
            with self.on(stream) if stream is not self.captures else nullcontext():
                self.put(replace(item, waits_for=again(item.waits_for), records=again(item.records)))

    # Queues ----------------------------------------------------------------------------------------------------------

    @property
    def _graph(self) -> LazyGraph | None:
        """That this thread captures."""
        return getattr(self._local, "graph", None)

    def _count(self, name: str) -> None:
        with self._changed:
            self.num_operations += 1
            number = self.num_operations
        if self.on_operation is not None:
            self.on_operation(number, name)

    def _follow_policy(self) -> None:
        if self._policy == "copies first":
            self._run_all(self._ring)
        elif self._policy == "compute first":
            self._run_all([self.compute])
        elif self._policy == "random":
            while self._dice.random() < 0.5:
                self._advance(self._dice.choice((self.compute, self.copies)))

    def _run_all(self, streams: list[Stream]) -> None:
        """What can run in these streams without the others."""
        while ready := [stream for stream in streams if stream.queue and self._is_free(stream.queue[0])]:
            for stream in ready:
                self._run(stream)

    def _advance(self, stream: Stream, seen: tuple[Stream, ...] = ()) -> bool:
        """One item nearer to the end of `stream`, of it or of what it waits for. False where nothing can run."""
        if not stream.queue or stream in seen:
            return False
        item = stream.queue[0]
        if self._is_free(item):
            return self._run(stream)
        if item.waits_for is not None:
            return self._advance(item.waits_for.stream, (*seen, stream))
        return any(self._advance(other, (*seen, stream)) for other in (self.compute, *self._ring) if other.queue)

    @staticmethod
    def _is_free(item: Item) -> bool:
        if item.waits_for is not None and not item.waits_for.has_happened:
            return False
        return item.is_ready is None or item.is_ready()

    def _run(self, stream: Stream) -> bool:
        item = stream.queue.popleft()
        if item.run is not None:
            with _disable_current_modes(), torch.inference_mode():
                item.run()
        if item.records is not None:
            item.records.has_happened = True
        return True

    def _flush(self) -> None:
        """The host waits for the current stream."""
        assert self._graph is None, "the host waits inside a capture"
        self.event().synchronize()

    # Memory ----------------------------------------------------------------------------------------------------------

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Lazy:
        """Memory of the current stream, poisoned."""
        self._count("allocate")
        strides = strides or _strides(shape)
        size = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if all(shape) else 0
        graph = self._graph
        base = poison(torch.empty(size, dtype=dtype)) if graph is None else graph.pool.take(size, dtype)
        if graph is not None:
            graph.bases[id(base)] = base
        memory = Memory(self, base, self.stream, None if graph is None else graph.pool)
        return Lazy(memory, base.as_strided(shape, strides))

    def freed(self, memory: Memory) -> None:
        """From now on what its stream does next may overwrite it; what another stream still does with it is in
        danger."""
        base, graph = memory.base, self._graph
        self.num_frees += 1
        item = Item("free", lambda: poison(base))
        if memory.pool is None:
            memory.stream.queue.append(item)
            return
        memory.pool.give_back(base)
        if graph is not None and id(base) in graph.bases:
            graph.items.append((self.stream, item))

    def _poison_pinned(self, target: torch.Tensor) -> None:
        """What the device will write there, the host does not see yet."""
        assert self.is_pinned(target), tuple(target.shape)
        if self._graph is None:
            poison(target)
        else:
            self._graph.pinned_targets.append(target)

    # Operations of torch ---------------------------------------------------------------------------------------------

    def dispatch(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """One operation of torch on tensors of this device."""
        if func in _TO_HOST:
            self._flush()
            return func(*tree_map_only(Lazy, lambda t: t.plain, args))
        if func is _aten._to_copy.default:
            return self._to_copy(args[0], kwargs)
        if func is _aten.copy_.default:
            return self._copy(*args, **kwargs)
        if func not in _WHOLE and func._can_decompose():
            with _Mode(self):
                return func.decompose(*args, **kwargs)
        if _is_view(func):
            (memory,) = {t.memory for t in args if isinstance(t, Lazy)}
            out = func(*tree_map_only(Lazy, lambda t: t.plain, args), **kwargs)
            return tree_map_only(torch.Tensor, lambda t: Lazy(memory, t), out)
        return self._operation(func, args, kwargs)

    def _operation(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name, schema = func.__name__, func._schema
        for t in tree_flatten((args, kwargs))[0]:
            if isinstance(t, torch.Tensor) and not isinstance(t, Lazy):
                assert t.dim() == 0 or t.numel() == 0, f"{name}: a host tensor {tuple(t.shape)} among the device's"
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        real_args, real_kwargs = tree_map_only(Lazy, lambda t: t.plain, (args, kwargs))
        by_place = zip(args, schema.arguments, strict=False)
        written = [value for value, argument in by_place if argument.alias_info and argument.alias_info.is_write]
        written += [
            kwargs[argument.name]
            for argument in schema.arguments
            if argument.alias_info and argument.alias_info.is_write and argument.name in kwargs
        ]
        if written:
            self.put(Item(name, lambda: func(*real_args, **real_kwargs)))
            return written[0] if len(written) == 1 else tuple(written)
        like = func(*tree_map_only(Lazy, _meta, args), **tree_map_only(Lazy, _meta, kwargs) | _meta_device(func))
        out = tree_map_only(torch.Tensor, lambda t: self.allocate(tuple(t.shape), t.dtype, t.stride()), like)
        if func not in _EMPTY:
            targets = [t.plain for t in tree_flatten(out)[0] if isinstance(t, Lazy)]

            def run() -> None:
                results = tree_flatten(func(*real_args, **real_kwargs))[0]
                for target, result in zip(targets, results, strict=True):
                    target.copy_(result)

            self.put(Item(name, run))
        return out

    def _to_copy(self, source: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """`.to`, `.cpu`, `.float` and their like."""
        is_ours = isinstance(source, Lazy)
        device = kwargs.get("device") or (self.device if is_ours else source.device)
        dtype, is_blocking = kwargs.get("dtype") or source.dtype, not kwargs.get("non_blocking")
        if device == self.device:
            out = self.allocate(tuple(source.shape), dtype)
            self._copy(out, source, not is_blocking)
            return out
        assert is_ours and device.type == "cpu", f"from {source.device} to {device}"
        out = torch.empty(source.shape, dtype=dtype)
        self._copy(out, source)
        return out

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """Within the device, or over the bus: a stop for the host unless its side is pinned and it said so."""
        on, of = isinstance(target, Lazy), isinstance(source, Lazy)
        to, real = target.plain if on else target, source.plain if of else source
        if on and not of and not (non_blocking and self.is_pinned(source)):
            assert self._graph is None or source.dim() == 0, "a copy that blocks inside a capture"
            if any(item.name == "hang" for item in self.stream.queue):
                raise Stuck("the host waits with a copy for a stream that hangs")
            real = source.clone()
        if of and not on and non_blocking and self.is_pinned(target):
            self._poison_pinned(target)
        self.put(Item("copy", lambda: to.copy_(real)))
        if of and not on and not (non_blocking and self.is_pinned(target)):
            self._flush()
        return target


class LazyKernels:
    """`kimi_lite.model.hybrid.kernels.Kernels` of another class on the CPU, each call an item of the current stream.

    What comes out is learned by a first call with zeros of the same shapes. `host_targets`: names of arguments that
    kernels write although they are pinned memory of the host.
    """

    host_targets: frozenset[str] = frozenset()

    def __init__(self, device: LazyDevice, plain: Any) -> None:
        self._device, self._plain = device, plain
        self._forms: dict[tuple, tuple[list[Any], Any]] = {}  # by the call's shapes: what must not be freed, results

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._plain, name)
        if not callable(method):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, method, args, kwargs)

        return call

    def route(
        self,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        rule: RouterRule,
        residents: Residents | None = None,
        turn: Turn | None = None,
        out: Routes | None = None,
    ) -> Routes:
        """In a turn the rows that the CPU will write are poisoned before it is told of the choices."""
        if turn is None:
            return self._call("route", self._plain.route, (logits, bias, rule, residents), {"out": out})
        routes = self._call("route", self._plain.route, (logits, bias, rule, residents), {"out": out})
        plain, ids, slots = self._plain_turn(turn), routes.ids.plain, routes.slots.plain

        def tell() -> None:
            poison(plain.memory.rows)
            post(plain, ids, slots)

        self._device.kernel("post", tell)
        return routes

    def await_answer(self, turn: Turn) -> None:
        """The stream waits; behind that nobody reads the turn's x any more."""
        plain = self._plain_turn(turn)
        self._device.wait_until(lambda: is_answered(plain))
        self._device.kernel("answered", lambda: poison(plain.memory.x))

    @staticmethod
    def _plain_turn(turn: Turn) -> Turn:
        on_device = {"given_up": turn.memory.given_up.plain, "arrivals": turn.memory.arrivals.plain}
        return Turn(replace(turn.memory, **on_device), turn.number, turn.first.plain)

    def _call(self, name: str, method: Callable, args: tuple, kwargs: dict) -> Any:
        device, form = self._device, self._form_of(name, method, args, kwargs)
        given = _tensors((args, kwargs))
        results = tree_map(lambda like: given[like] if isinstance(like, int) else _new(device, like), form)
        fresh = [(like, out) for like, out in zip(_leaves(form), _leaves(results), strict=True)]
        targets = [None if isinstance(like, int) or like is None else out.plain for like, out in fresh]
        real_args, real_kwargs = _swap((args, kwargs), lambda t: t.plain if isinstance(t, Lazy) else t)

        def run() -> None:
            for target, result in zip(targets, _leaves(method(*real_args, **real_kwargs)), strict=True):
                if target is not None:
                    target.copy_(result)

        host_targets = tuple(value for key, value in kwargs.items() if key in self.host_targets)
        device.kernel(name, run, host_targets)
        return results

    def _form_of(self, name: str, method: Callable, args: tuple, kwargs: dict) -> Any:
        """Of each result: the number of the argument that it is, or a tensor of its shape on "meta", or None."""
        given = _tensors((args, kwargs))
        others: list[Any] = []
        _swap((args, kwargs), lambda t: t, others.append)
        known = (other if isinstance(other, int | float | str | None) else id(other) for other in others)
        key = (name, *((tuple(t.shape), t.stride(), t.dtype) for t in given), *known)
        if key not in self._forms:
            with _disable_current_modes(), torch.inference_mode():
                zeros: list[torch.Tensor] = []
                as_zeros = _swap((args, kwargs), lambda t: zeros.append(_zeros(t)) or zeros[-1])
                results = method(*as_zeros[0], **as_zeros[1])
                places = {id(zero): number for number, zero in enumerate(zeros)}
            self._forms[key] = others, tree_map_only(torch.Tensor, lambda t: places.get(id(t), _meta(t)), results)
        return self._forms[key][1]


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """What nobody may read: not a number, or one that stands out."""
    if tensor.dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else 0xAB if tensor.dtype == torch.uint8 else -77)


def _causal_lower_right(length: int, num_positions: int) -> torch.Tensor:
    """A mask that is no tensor yet: torch cannot make one where operations are looked at."""
    with _disable_current_modes():
        return causal_lower_right(length, num_positions)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor in one piece."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(1, n)
    return tuple(reversed(strides))


def _is_view(func: Any) -> bool:
    schema = func._schema
    is_alias = any(result.alias_info for result in schema.returns)
    return is_alias and not any(a.alias_info and a.alias_info.is_write for a in schema.arguments)


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    """Its form, of which torch's operations derive the form of their results."""
    with _disable_current_modes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _meta_device(func: Any) -> dict[str, str]:
    """For factories, which take no tensor: where the result is to be."""
    has_device = any(argument.name == "device" for argument in func._schema.arguments)
    return {"device": "meta"} if has_device and not any("Tensor" in str(a.type) for a in func._schema.arguments) else {}


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).zero_()


def _new(device: LazyDevice, like: torch.Tensor | None) -> Lazy | None:
    return None if like is None else device.allocate(tuple(like.shape), like.dtype, like.stride())


def _leaves(value: Any) -> list[Any]:
    return tree_flatten(value, is_leaf=lambda v: v is None)[0]


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _swap(value, lambda t: found.append(t) or t)
    return found


def _swap(value: Any, change: Callable[[torch.Tensor], Any], see: Callable[[Any], Any] = lambda other: None) -> Any:
    """The same with other tensors, also inside tuples and dataclasses; `see` is shown everything else."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _swap(each, change, see) for key, each in value.items()}
    if isinstance(value, tuple | list):
        each = [_swap(part, change, see) for part in value]
        return type(value)(*each) if hasattr(value, "_fields") else type(value)(each)
    fields = getattr(value, "__dataclass_fields__", {})
    parts = {name: getattr(value, name) for name in fields if isinstance(getattr(value, name), torch.Tensor)}
    if parts:
        for name in (name for name in fields if name not in parts):
            see(getattr(value, name))
        return replace(value, **{name: change(part) for name, part in parts.items()})
    see(value)
    return value
