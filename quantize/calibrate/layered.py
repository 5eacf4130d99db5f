"""A model that is in memory only where it runs: the layers of a checkpoint, or of a file that is being written, one
after another.

`LayerWalk` wants a GGUF store with all tensors. This one has them all in name, type and shape; their bytes come when
their layer begins, and go when it ends. They lie in one mapping of the size of the whole model of which the system
gives memory only for pages in use, so that a tensor's address stays and kernels need not be told. So the memory of a
walk is that of the largest layer: 9.6 GB for Kimi K2.5, whose INT4 experts are Q4_0 here without loss.
"""

import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from kimi_lite.arch.recipe import KEPT, group_of
from kimi_lite.arch.tensors import HEAD
from kimi_lite.gguf.metadata import Value, ValueType
from kimi_lite.gguf.store import GGUFStore, TensorView
from kimi_lite.hardware.host import usable_cores
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.quantize.codecs import encode
from kimi_lite.quantize.source.model import RowReader, SourceModel, SourceTensor
from kimi_lite.quantize.source.names import file_order

_PAGE = mmap.ALLOCATIONGRANULARITY
_NO_RESERVE = 0x4000  # Linux; the mmap module has a name for it from Python 3.13 on
_PIECE_WEIGHTS = 1 << 20  # read at once by a thread


@dataclass(frozen=True, slots=True)
class LayerTensor:
    """A tensor by the name that the model's code uses. `open_rows` returns the reader of its encoded rows, uint8 (rows,
    row_bytes), counted over all axes but the last."""

    name: str
    layout: Layout
    shape: tuple[int, ...]
    open_rows: Callable[[], RowReader]

    @property
    def is_always_there(self) -> bool:
        """Models read vectors, and split keys from values, when they are opened."""
        return len(self.shape) == 1 or self.name.endswith(".attn_kv_b.weight")

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.layout.row_bytes(self.shape[-1])


class LayeredStore:
    """`store` may be used as any other, where `load(layer)` was called and `release(layer)` was not yet. The matrix
    of the logits is never there."""

    def __init__(self, path: Path, values: Mapping[str, Value], tensors: Sequence[LayerTensor]) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._places, size = {}, 0
        for tensor in tensors:
            self._places[tensor.name] = size
            size += -(-tensor.num_bytes // _PAGE) * _PAGE + _PAGE  # kernels load whole vectors, also at the end
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._memory = mmap.mmap(-1, size, flags=flags)
        whole = np.frombuffer(self._memory, np.uint8)
        views = {}
        for tensor in tensors:
            start = self._places[tensor.name]
            shape = (*tensor.shape[:-1], tensor.layout.row_bytes(tensor.shape[-1]))
            data = whole[start : start + tensor.num_bytes].reshape(shape)
            views[tensor.name] = TensorView(tensor.name, tensor.layout, tensor.shape, data, path, start)
        self.store = GGUFStore((path,), {key: _as_read(value) for key, value in values.items()}, views)
        self._fill(tensor for tensor in tensors if tensor.is_always_there)

    @property
    def largest_layer_bytes(self) -> int:
        """Memory that a layer takes while it runs."""
        layers = {file_order(name) for name in self._tensors}
        return max(sum(tensor.num_bytes for tensor in self._members(layer)) for layer in layers)

    def load(self, layer: int) -> None:
        """Reads the layer's tensors; layer -1 is the embedding. Raises what their readers raise."""
        self._fill(self._members(layer))

    def release(self, layer: int) -> None:
        """Gives the memory back."""
        for tensor in self._members(layer):
            size = -(-tensor.num_bytes // _PAGE) * _PAGE
            self._memory.madvise(mmap.MADV_DONTNEED, self._places[tensor.name], size)

    def _members(self, layer: int) -> list[LayerTensor]:
        return [
            tensor
            for name, tensor in self._tensors.items()
            if file_order(name) == layer and not tensor.is_always_there and name != HEAD
        ]

    def _fill(self, tensors: Iterable[LayerTensor]) -> None:
        with ThreadPoolExecutor(usable_cores().most_threads) as pool:
            pending = [future for tensor in tensors for future in self._submit(pool, tensor)]
            for future in pending:
                future.result()

    def _submit(self, pool: ThreadPoolExecutor, tensor: LayerTensor) -> list:
        read_rows = tensor.open_rows()
        rows = self.store.tensor(tensor.name).data.reshape(tensor.num_rows, -1)
        count = max(1, _PIECE_WEIGHTS // tensor.shape[-1])

        def fill(start: int) -> None:
            stop = min(start + count, len(rows))
            rows[start:stop] = read_rows(start, stop)

        return [pool.submit(fill, start) for start in range(0, len(rows), count)]


def checkpoint_layers(model: SourceModel, path: Path) -> LayeredStore:
    """The source's own weights: codes as they are stored, other matrices in BF16 or F16, which hold them exactly but
    for block FP8, rounded to 8 bits of mantissa."""
    tensors = [_source_layer(tensor) for tensor in model.tensors]
    return LayeredStore(path, model.make_metadata(BY_NAME["BF16"]), tensors)


def _source_layer(tensor: SourceTensor) -> LayerTensor:
    if group_of(tensor.role, tensor.shape) == KEPT:
        layout = BY_NAME["F32"]
    else:
        fitting = [name for name in (tensor.codes, "BF16", "F16") if name in tensor.exact]
        layout = BY_NAME[fitting[0] if fitting else "F32" if tensor.stored == "f32" else "BF16"]

    return LayerTensor(tensor.role, layout, tensor.shape, partial(open_source, tensor, layout))


def open_source(tensor: SourceTensor, layout: Layout) -> RowReader:
    """The source's rows in a type, as they are or encoded."""
    encoded = tensor.open_encoded(layout)
    if encoded:
        return encoded
    read_rows = tensor.open_rows()
    return lambda start, stop: encode(layout, read_rows(start, stop))


def _as_read(value: Value) -> Value:
    """As readers of files have it: rounded to the type that a file gives it, numbers of a list in an array."""
    items = value.value
    if value.value_type == ValueType.FLOAT32:
        return value._replace(value=float(np.float32(items)))
    if isinstance(items, list) and items and not isinstance(items[0], str):
        kind = np.float32 if value.element_type == ValueType.FLOAT32 else None
        return value._replace(value=np.asarray(items, kind))
    return value
