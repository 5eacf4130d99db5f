"""What the hybrid path launches on a GPU, found without one, and compiled for any.

`recorded(call)` runs a call and keeps its launches instead of doing them. A launch is compiled on the very path that it
would take on a GPU (binding, specialization by type, value and alignment, compiler, ptxas, which comes with Triton);
only loading the code is left out, and the driver that would say which GPU is there is a stand-in. Works only where
Triton was imported without TRITON_INTERPRET.

`runtime_launches` runs the layers of `model.hybrid` themselves, at Kimi K2.5's sizes, over tensors without memory
(torch's "meta" device): what a layer launches is what is compiled. Where the runtime needs the host between two
launches (routed experts), the calls are made here; a kernel that no pass launches, or an operation of the protocol that
none calls, is an error, so that nothing new can be forgotten.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kimi_lite.arch.known import K2_5
from kimi_lite.arch.tensors import tensor_shapes
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.model.cpu.attention import mla_shape
from kimi_lite.model.hybrid.decode import rows_for
from kimi_lite.model.hybrid.head import Head
from kimi_lite.model.hybrid.kernels import MAX_DECODE_TOKENS, DenseMatrix, Kernels, Residents, TritonKernels
from kimi_lite.model.hybrid.layer import Layer
from kimi_lite.model.hybrid.routed import ROW_TOKENS
from kimi_lite.model.hybrid.step import StepMaker, choose_expanded
from kimi_lite.model.hybrid.transformer import MAX_LOGITS
from kimi_lite.model.hybrid.turns import Turn, TurnMemory
from kimi_lite.native import gpu
from kimi_lite.native.gpu.experts import ExpertMatrix
from kimi_lite.native.latent_rows import PAGE_TOKENS, row_bytes
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.plan.workspace import PROMPT_CHUNKS, STREAM_EXPERTS

DECODE_TOKENS = tuple(sorted({rows_for(n) for n in range(1, MAX_DECODE_TOKENS + 1)}))
PROMPT_TOKENS = (MAX_DECODE_TOKENS + 1, 32, 33, 64, 65, 129, *sorted(PROMPT_CHUNKS))
CACHE_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8": torch.uint8}
MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)  # of a launch along x, y and z, on every GPU (CUDA's programming guide)
_PAGES = 512  # of the cache: 32,768 positions
_META = torch.device("meta")


@dataclass(frozen=True)
class _StandIn:
    """What a launch asks of a driver before it has code. Each capability is a device, as code is kept by device."""

    capability: int

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Launch(NamedTuple):
    """A kernel, and the arguments and options it was called with."""

    kernel: JITFunction
    positional: tuple
    named: dict
    grid: tuple

    def argument(self, name: str):
        """None where the kernel has no such argument."""
        return {**dict(zip(self.kernel.arg_names, self.positional, strict=False)), **self.named}.get(name)

    @property
    def types(self) -> tuple[str, ...]:
        """What it decodes."""
        found = (self.argument(prefix + name) for prefix in ("", "G_", "U_") for name in ("DECODE", "VALUES"))
        names = (each.__name__.removesuffix("_decode").removesuffix("_values").upper() for each in found if each)
        return tuple(dict.fromkeys(names))

    @property
    def is_exact(self) -> bool:
        """Whether it promises the CPU's bits (`native.gpu.exact`)."""
        return self.named.get("enable_fp_fusion") is False

    @property
    def uses_tensor_cores(self) -> bool:
        return "tl.dot(" in self.kernel.src

    @property
    def key(self) -> tuple:
        """What may make other code of it: compile-time values, types and divisibility of the others, options."""

        def kind(value: object) -> object:
            if isinstance(value, torch.Tensor):
                return value.dtype, value.data_ptr() % 16 == 0
            return (value == 1, value % 16 == 0, value < 2**31) if isinstance(value, int) else type(value).__name__

        named = {name: value if isinstance(value, int) else str(value) for name, value in self.named.items()}
        return self.kernel.__name__, self.types, tuple(map(kind, self.positional)), tuple(sorted(named.items()))

    def compiled(self, capability: int):
        """Machine code for a compute capability, as 89 (RTX 4090) or 90 (H100); `.asm` has its stages."""
        driver.set_active(_StandIn(capability))
        return self.kernel.run(*self.positional, grid=self.grid, warmup=True, **self.named)


@contextmanager
def _recording(found: list[Launch]) -> Iterator[None]:
    run = JITFunction.run

    def record(kernel, *args, grid, warmup, **kwargs):
        allowed = all(0 < size <= most for size, most in zip(grid, MOST_PROGRAMS, strict=False))
        assert allowed, (kernel.__name__, grid)
        found.append(Launch(kernel, args, kwargs, grid))

    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = run


def recorded(call: Callable[[], object]) -> list[Launch]:
    """What `call` would launch, in order."""
    found: list[Launch] = []
    with _recording(found):
        call()
    return found


class _Weights:
    """`model.hybrid.weights.DenseWeights` of shapes alone; every matrix is of one type."""

    def __init__(self, config, layout_name: str) -> None:
        self._shapes, self._layout_name = tensor_shapes(config), layout_name
        self.dense_type = "bf16" if layout_name == "BF16" else "q8_0"

    def matrix(self, *names: str) -> DenseMatrix:
        shapes = [self._shapes[name] for name in names]
        return self._made((sum(rows for rows, _ in shapes), shapes[0][1]), self._layout_name)

    def matrices(self, *names: str) -> list[DenseMatrix]:
        return [self.matrix(*names)]

    def activation_type(self, num_tokens: int) -> torch.dtype:
        return torch.bfloat16 if num_tokens > MAX_DECODE_TOKENS else torch.float32

    def exact_matrix(self, name: str) -> DenseMatrix:
        return self._made(self._shapes[name], "F32")

    def vector(self, name: str) -> torch.Tensor:
        return torch.empty(self._shapes[name], device=_META)

    def heads(self, config, layer: int) -> tuple[DenseMatrix, DenseMatrix]:
        names = (f"blk.{layer}.attn_{part}_b.weight" for part in "kv")
        key, value = (self._made(self._shapes[name], self._head_type(self._shapes[name][-1])) for name in names)
        return key, value

    def _head_type(self, k: int) -> str:
        """A head's rows may be shorter than a block."""
        return self._layout_name if k % BY_NAME[self._layout_name].block_size == 0 else "Q8_0"

    @staticmethod
    def _made(shape: tuple[int, ...], layout_name: str) -> DenseMatrix:
        row = BY_NAME[layout_name].row_bytes(shape[-1])
        return DenseMatrix(torch.empty((*shape[:-1], row), dtype=torch.uint8, device=_META), layout_name, shape[-1])


class _Counting:
    """TritonKernels, and which of its operations were called."""

    def __init__(self) -> None:
        self._kernels, self.called = TritonKernels(), set()

    def __getattr__(self, name: str):
        self.called.add(name)
        return getattr(self._kernels, name)


class ExpertForm(NamedTuple):
    """Three matrices of one type in a slot."""

    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix

    @property
    def num_bytes(self) -> int:
        return self.down.offset + self.down.num_rows * self.down.row_bytes


def expert_form(name: str, hidden: int, width: int) -> ExpertForm:
    matrices, offset = [], 0
    for num_rows, k in ((width, hidden), (width, hidden), (hidden, width)):
        matrices.append(ExpertMatrix(name, offset, num_rows, k, BY_NAME[name].row_bytes(k)))
        offset += num_rows * matrices[-1].row_bytes
    return ExpertForm(*matrices)


class HybridPath:
    """Kimi K2.5's first two layers, one dense and one with experts, and its head, on the "meta" device.

    It stands for `RoutedExperts` too, of which a captured step needs `turn` and `hit_rows`.
    """

    def __init__(self, expert_type: str, dense_type: str = "Q8_0", cache: str = "f16") -> None:
        self.config = c = replace(K2_5, num_layers=2)
        self.kernels, streams = _Counting(), GpuStreams("meta")
        weights = _Weights(c, dense_type)
        row = row_bytes("q8", c.kv_latent_size) if cache == "q8" else c.kv_latent_size
        storage = torch.empty((_PAGES, PAGE_TOKENS, row), dtype=CACHE_DTYPES[cache], device=_META)
        residents = Residents(self._int32(c.num_experts), 0.0)
        store = SimpleNamespace(tensors=tensor_shapes(c))
        self.layers = [Layer(store, weights, c, n, storage, self.kernels, residents) for n in range(c.num_layers)]
        self.head = Head(store, weights, c, self.kernels)
        self._form = expert_form(expert_type, c.hidden_size, c.expert_feed_forward_size)
        self._slots = torch.empty((STREAM_EXPERTS, self._form.num_bytes), dtype=torch.uint8, device=_META)
        self._maker = StepMaker(c, streams)
        rows = torch.empty((ROW_TOKENS * c.num_experts_used, c.hidden_size), device=_META)
        self._memory = TurnMemory.make(streams, 1, c.num_experts_used, rows)

    def turn(self, layer: int, first: torch.Tensor) -> Turn:
        return Turn(self._memory, 1, first)

    def deferral(self) -> None:
        """No expert is added a layer later."""

    def hit_rows(self, layer: int, normed: torch.Tensor, slot_of_choice: torch.Tensor) -> torch.Tensor:
        is_exact = True if len(normed) <= MAX_DECODE_TOKENS else None
        choices = (slot_of_choice, slot_of_choice)
        return self.kernels.expert_choices(normed, self._slots, self._form, *choices, is_exact=is_exact)

    def decode(self, num_tokens: int) -> None:
        """A step of so many sequences."""
        pieces = tuple(SequenceSlice(i, 1, np.zeros(1, np.int32)) for i in range(num_tokens))
        step = self._maker.make(_batch(pieces), [])
        x, first = self._x(num_tokens), torch.empty(1, dtype=torch.int64, device=_META)
        normed = self.layers[0].normed(x)
        for layer, next_norm in zip(
            self.layers, (self.layers[1].attention.attn_norm, self.head.output_norm), strict=True
        ):
            normed = layer.decode(x, normed, step, self, first, next_norm)
        self.head.logits(normed)

    def prompt(self, num_tokens: int) -> None:
        """A chunk of one sequence."""
        piece = SequenceSlice(0, num_tokens, np.zeros(-(-num_tokens // PAGE_TOKENS), np.int32))
        step = self._maker.make(_batch((piece,)), choose_expanded((piece,), mla_shape(self.config)))
        x = self._x(num_tokens)
        self.layers[0].attend(x, step)
        self.layers[1].router.forward(self.layers[1].attend(x, step))
        self.experts(num_tokens)
        self.head.forward(x[:MAX_LOGITS])

    def experts(self, num_tokens: int) -> None:
        """A prompt's: choices by rows as far as there are rows, and those of a group of streamed experts beyond; all at
        once with the CPU's bits, as `--reproducible` has them where a few experts are chosen by all tokens."""
        c = self.config
        num_choices = num_tokens * c.num_experts_used
        has_rows = num_tokens <= ROW_TOKENS
        choice = self._int32(num_choices if has_rows else num_choices * STREAM_EXPERTS // c.num_experts)
        normed = self._x(num_tokens)
        rows = self.hit_rows(1, normed, choice)
        every = self._int32(num_choices)
        self.kernels.expert_choices(normed, self._slots, self._form, every, every, is_exact=True)
        shared = self.layers[1].shared_expert(normed)
        weights = torch.empty((num_tokens, c.num_experts_used), device=_META)
        if has_rows:
            self.kernels.weighted_sum(rows.view(*weights.shape, -1), weights, shared)
        rows = torch.empty((num_choices, c.hidden_size), device=_META)
        self.kernels.sum_at_places(rows, self._int32(*weights.shape), weights, shared)

    def _x(self, num_tokens: int) -> torch.Tensor:
        return torch.empty((num_tokens, self.config.hidden_size), device=_META)

    @staticmethod
    def _int32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=_META)


def _batch(pieces: tuple[SequenceSlice, ...]) -> Batch:
    num_tokens = sum(piece.length for piece in pieces)
    zeros = np.zeros(num_tokens, np.int32)
    positions = np.concatenate([np.arange(piece.length, dtype=np.int32) for piece in pieces])
    return Batch(zeros, positions, np.zeros(num_tokens, bool), pieces)


def runtime_launches(
    expert_types: Sequence[str],
    dense_types: Sequence[str] = ("Q8_0",),
    caches: Sequence[str] = ("f16",),
    tokens: Sequence[int] = (*DECODE_TOKENS, *PROMPT_TOKENS),
) -> list[Launch]:
    """Every launch of passes of so many tokens once: of the first of each sort of types together with each other type
    alone."""
    found: list[Launch] = []
    with _recording(found):
        for dense_type, cache in [(name, caches[0]) for name in dense_types] + [
            (dense_types[0], c) for c in caches[1:]
        ]:
            path = HybridPath(expert_types[0], dense_type, cache)
            for num_tokens in tokens:
                path.decode(num_tokens) if num_tokens <= MAX_DECODE_TOKENS else path.prompt(num_tokens)
            missing = operations() - path.kernels.called
            assert not missing, f"no layer calls {missing}"
        for name in expert_types[1:]:
            path = HybridPath(name, dense_types[0], caches[0])
            for num_tokens in tokens:
                path.experts(num_tokens)
    missing = set(all_kernels()) - {launch.kernel.__name__ for launch in found}
    assert not missing, f"no pass launches {missing}"
    return list({launch.key: launch for launch in found}.values())


def operations() -> set[str]:
    """What layers may ask of kernels."""
    return {name for name, _ in inspect.getmembers(Kernels, inspect.isfunction) if not name.startswith("_")}


def all_kernels() -> dict[str, JITFunction]:
    """Name -> every kernel of `native.gpu`, found in its modules: what is launched has a name that ends so."""
    modules = (importlib.import_module(f"{gpu.__name__}.{each.name}") for each in pkgutil.iter_modules(gpu.__path__))
    named = (pair for module in modules for pair in vars(module).items())
    return {name: each for name, each in named if isinstance(each, JITFunction) and name.endswith("_kernel")}
