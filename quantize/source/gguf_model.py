"""Existing GGUF files as a model to be converted: rows kept where the type stays, decoded where it changes.

Metadata keys go over as they are, with their exact types, but for those that describe the file and not the model.
"""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from kimi_lite.arch.architecture import Architecture, find_architecture
from kimi_lite.arch.tensors import in_our_names
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import Value
from kimi_lite.gguf.store import GGUFStore, TensorView
from kimi_lite.native.cpu.blocks import is_implemented
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.cpu.row_order import rows_in_order
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.source.files import FileState
from kimi_lite.quantize.source.metadata import FILE_KEYS, quantization_metadata
from kimi_lite.quantize.source.model import RowReader, SourceModel, SourceTensor

_SHRUNK_HINT = "Restore that file, and repeat the command: the conversion starts again."


def open_gguf_model(path: Path) -> SourceModel:
    """`path` is a file, the first shard, or a folder with one model. Raises KimiLiteError."""
    store = GGUFStore.open(path, has_interleaved=True)
    states = tuple(map(FileState.of, store.shards))
    unknown = sorted({view.layout.name for view in store.tensors.values() if not is_implemented(view.layout.name)})
    if unknown:
        raise KimiLiteError(f"{store.path} has tensors of {', '.join(unknown)}, which are not decoded here.")
    values = {key: value for key, value in store.values.items() if not key.startswith(FILE_KEYS)}

    def make_metadata(layout: Layout) -> Mapping[str, Value]:
        return values | quantization_metadata(layout)

    return SourceModel(
        tensors=tuple(_source_tensors(store, find_architecture(store.metadata.get("general.architecture")))),
        make_metadata=make_metadata,
        notes=(),
        files=states,
    )


def _source_tensors(store: GGUFStore, table: Architecture | None) -> Iterator[SourceTensor]:
    roles = in_our_names(store, table).tensors if table else store.tensors
    is_interleaved = any(view.interleaved for view in store.tensors.values())  # then types stay, if none is asked for
    for view, role in zip(store.tensors.values(), roles, strict=True):
        yield SourceTensor(
            name=view.name,
            role=role,
            shape=view.shape,
            stored=(view.interleaved or view.layout).name.lower(),
            exact=frozenset({view.layout.name, "F32"}),
            open_rows=partial(_decoded_rows, view),
            open_encoded=partial(_kept_rows, view),
            codes=view.layout.name if is_interleaved and len(view.shape) > 1 else None,
        )


def _kept_rows(view: TensorView, layout: Layout) -> RowReader | None:
    return _rows_in_order(view) if layout is view.layout else None


def _rows_in_order(view: TensorView) -> RowReader:
    """The rows' bytes, in the order of rows however the file has them."""
    read, kind = _file_rows(view), view.interleaved
    if kind is None:
        return read

    def read_rows(start: int, stop: int) -> np.ndarray:
        first, end = start // kind.num_rows * kind.num_rows, -(-stop // kind.num_rows) * kind.num_rows
        return rows_in_order(kind, read(first, end), view.shape[-1])[start - first : stop - first]

    return read_rows


def _file_rows(view: TensorView) -> RowReader:
    """The rows' bytes as the file has them. Read and not mapped: a file that shrinks meanwhile is an error."""
    num_rows, row_bytes = view.data.size // view.data.shape[-1], view.data.shape[-1]

    def read_rows(start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= num_rows, (view.name, start, stop)
        rows = np.empty((stop - start, row_bytes), np.uint8)
        buffer, done = memoryview(rows).cast("B") if rows.size else memoryview(b""), 0
        try:
            with open(view.shard, "rb", buffering=0) as file:
                file.seek(view.start + start * row_bytes)
                while done < len(buffer) and (count := file.readinto(buffer[done:])):
                    done += count
        except OSError as error:
            raise KimiLiteError(f"{view.shard} cannot be read: {error.strerror or error}.", _SHRUNK_HINT) from error
        if done < len(buffer):
            problem = f"{view.shard} shrank to {os.path.getsize(view.shard):,} bytes while it was read"
            raise KimiLiteError(f"{problem}: {view.name} is cut off.", _SHRUNK_HINT)
        return rows

    return read_rows


def _decoded_rows(view: TensorView) -> RowReader:
    read = _rows_in_order(view)
    return lambda start, stop: dequantize(read(start, stop), view.layout.name)
