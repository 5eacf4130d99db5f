"""A model to be converted, whatever it lies in: its GGUF tensors by name and shape, and how their rows are read.

Made by `quantize.source.hf_model` from a Hugging Face folder and by `quantize.source.gguf_model` from GGUF files;
`quantize.convert` gives every tensor a type and writes it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.write.writer import RowReader, Value


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the model. `stored` says in a word how it lies there; `open_rows` takes the type to be written, since
    some are kept as they are, and returns the reader of its rows. `exact` are the types that lose nothing."""

    name: str
    shape: tuple[int, ...]  # numpy order: the last axis is the row
    stored: str
    exact: frozenset[str]
    open_rows: Callable[[Layout], RowReader]

    @property
    def num_weights(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class SourceModel:
    """`make_metadata` takes the type of most weights; `notes` say what is left out; `origin` names files, sizes and
    times."""

    tensors: tuple[SourceTensor, ...]
    make_metadata: Callable[[Layout], Mapping[str, Value]]
    notes: tuple[str, ...]
    origin: str


def describe_files(paths: list[Path]) -> str:
    """Names, sizes and times of change: what tells a changed source from the same one."""
    return repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths])
