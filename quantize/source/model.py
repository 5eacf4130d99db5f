"""A model to be converted, whatever it lies in: its GGUF tensors by name and shape, and how their rows are read.

Made by `quantize.source.hf_model` from a Hugging Face folder and by `quantize.source.gguf_model` from GGUF files;
`quantize.convert` gives every tensor a type and writes it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from kimi_lite.gguf.metadata import Value
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.source.files import FileState

# (first row, end row) -> float32 (rows, n), or uint8 (rows, row_bytes) of a reader that gives the file's own bytes
RowReader = Callable[[int, int], np.ndarray]


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the model. `stored` says in a word how it lies there, `exact` are the types that lose nothing.

    `open_rows` returns the reader of its rows as float32. `open_encoded` takes the type to be written and returns the
    reader of its bytes in that type, uint8 (rows, row_bytes), where the source has exactly these; else None.
    """

    name: str  # in the file to be written
    role: str  # as the model's code calls it: another name only where the architecture's table has one
    shape: tuple[int, ...]  # numpy order: the last axis is the row
    stored: str
    exact: frozenset[str]
    open_rows: Callable[[], RowReader]
    open_encoded: Callable[[Layout], RowReader | None]
    codes: str | None = None  # the type that holds the codes that a checkpoint stores the tensor by

    @property
    def num_weights(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class SourceModel:
    """`make_metadata` takes the type of most weights; `notes` say what is left out; `files` is every file that the
    model is read from."""

    tensors: tuple[SourceTensor, ...]
    make_metadata: Callable[[Layout], Mapping[str, Value]]
    notes: tuple[str, ...]
    files: tuple[FileState, ...]

    @property
    def origin(self) -> str:
        """Names, sizes and times of the files."""
        return repr([(file.path.name, file.num_bytes, file.modified_ns) for file in self.files])
