"""Existing GGUF files as a model to be converted: rows kept where the type stays, decoded where it changes.

Metadata keys go over as they are, with their exact types, but for those that say how the file is quantized and split.
"""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFValueType

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore, TensorView
from kimi_lite.native.cpu.blocks import FORMATS
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.source.metadata import quantization_metadata
from kimi_lite.quantize.source.model import SourceModel, SourceTensor, describe_files
from kimi_lite.quantize.write.writer import RowReader, Value

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_REPLACED = ("general.file_type", "general.quantization_version", "split.", "quantize.imatrix.")


def open_gguf_model(path: Path) -> SourceModel:
    """`path` is a file, the first shard, or a folder with one model. Raises KimiLiteError."""
    store = GGUFStore.open(path)
    unknown = sorted({view.layout.name for view in store.tensors.values()} - {*FORMATS})
    if unknown:
        raise KimiLiteError(f"{store.path} has tensors of {', '.join(unknown)}, which are not decoded here.")
    values = {key: value for key, value in read_values(store.path).items() if not key.startswith(_REPLACED)}

    def make_metadata(layout: Layout) -> Mapping[str, Value]:
        return values | quantization_metadata(layout)

    return SourceModel(
        tensors=tuple(_source_tensor(view) for view in store.tensors.values()),
        make_metadata=make_metadata,
        notes=(),
        origin=describe_files(list(store.shards)),
    )


def _source_tensor(view: TensorView) -> SourceTensor:
    exact = frozenset({view.layout.name, "F32"})
    return SourceTensor(
        view.name, view.shape, view.layout.name.lower(), exact, lambda layout: _row_reader(view, layout)
    )


def _row_reader(view: TensorView, layout: Layout) -> RowReader:
    data = view.data.reshape(-1, view.data.shape[-1])
    if layout is view.layout:
        return lambda start, stop: np.ascontiguousarray(data[start:stop])
    return lambda start, stop: dequantize(data[start:stop], view.layout.name)


def read_values(file: Path) -> dict[str, Value]:
    """The metadata of a file that `GGUFStore` has found sound, each with its type. GGUF specification, version 3."""
    with file.open("rb") as stream:

        def scalar(code: str) -> object:
            return struct.unpack(f"<{code}", stream.read(struct.calcsize(f"<{code}")))[0]

        def string() -> str:
            return stream.read(scalar("Q")).decode()

        def value(kind: int) -> object:
            return string() if kind == _STRING else scalar(_SCALARS[kind])

        def typed() -> Value:
            kind = scalar("I")
            if kind != _ARRAY:
                return Value(value(kind), GGUFValueType(kind))
            element, count = scalar("I"), scalar("Q")
            return Value([value(element) for _ in range(count)], GGUFValueType.ARRAY, GGUFValueType(element))

        stream.seek(16)  # magic, version, number of tensors
        return {string(): typed() for _ in range(scalar("Q"))}
