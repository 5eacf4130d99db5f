"""The weights of a model on disk: memory-mapped GGUF shards, seen as named read-only tensors without copying a byte.

Every header of every shard is read and checked before the first weight (`kimi_lite.gguf.header`), so a download that
stopped half-way, a shard of another model or a flipped bit is one sentence at start-up and not a wrong answer later.

    store = GGUFStore.open("kimi-k2.5-00001-of-00006.gguf")
    store.tensor("blk.1.ffn_down_exps.weight").data[7]  # expert 7: (7168, row_bytes) uint8, still in the file
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.header import GGUFHeader, TensorInfo, read_header
from kimi_lite.gguf.mapping import map_file
from kimi_lite.gguf.metadata import DAMAGED_HINT, Value, quoted
from kimi_lite.gguf.shards import find_shards, shard_name
from kimi_lite.native.layouts import Layout
from kimi_lite.native.types.interleaved import Interleaved

_FOREIGN_HINT = "Put only the shards of one download into a folder; fetch this one again."


@dataclass(frozen=True, slots=True, eq=False)
class TensorView:
    """One tensor in place: `data` is uint8 of `shape[:-1] + (row_bytes,)`, C-contiguous, read-only, on the mapped
    file."""

    name: str
    layout: Layout
    shape: tuple[int, ...]  # numpy order: the last axis is the input, experts come first
    data: np.ndarray
    shard: Path  # where the same bytes can be read without the mapping: from `start` on
    start: int
    interleaved: Interleaved | None = None  # how the file has the rows, where they are not in order

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes


class GGUFStore:
    """An open model: its `metadata` (with types in `values`), its `tensors` by name, and the `shards` they lie in.
    Made by `open`."""

    def __init__(
        self, shards: tuple[Path, ...], values: Mapping[str, Value], tensors: Mapping[str, TensorView]
    ) -> None:
        self.shards = shards
        self.values: Mapping[str, Value] = MappingProxyType(dict(values))
        self.metadata = MappingProxyType({key: value.value for key, value in values.items()})
        self.tensors: Mapping[str, TensorView] = MappingProxyType(tensors)

    @classmethod
    def open(cls, path: str | Path, has_interleaved: bool = False) -> "GGUFStore":
        """Map a .gguf file, the first shard of many, or the one model in a folder. `has_interleaved`: the caller brings
        interleaved rows in order; else they are refused. Raises KimiLiteError."""
        shards = find_shards(Path(os.path.expanduser(path)))  # pathlib's raises for an unknown ~user
        files = [_map_file(shard) for shard in shards]
        mapped = zip(shards, files, strict=True)
        headers = [read_header(shard, memoryview(file), has_interleaved=has_interleaved) for shard, file in mapped]
        _check_shards(shards, headers)
        opened = zip(shards, files, headers, strict=True)
        tensors = {info.name: _view(info, shard, file) for shard, file, header in opened for info in header.tensors}
        return cls(shards, headers[0].values, tensors)

    @classmethod
    def from_headers(cls, shards: tuple[Path, ...], headers: Sequence[GGUFHeader]) -> "GGUFStore":
        """A model whose headers alone are here, those of all its shards: its tensors have names, types and sizes, and
        zeros for weights. Raises KimiLiteError as `open` does."""
        _check_shards(shards, headers)
        stated = zip(shards, headers, strict=True)
        tensors = {info.name: _absent(info, shard) for shard, header in stated for info in header.tensors}
        return cls(shards, headers[0].values, tensors)

    def renamed(self, names: Mapping[str, str]) -> "GGUFStore":
        """The same files, with the tensors of `names` under other names (from the file's to the new one)."""
        tensors = {}
        for name, view in self.tensors.items():
            tensors[names.get(name, name)] = replace(view, name=names[name]) if name in names else view
        return GGUFStore(self.shards, self.values, tensors)

    def replaced(self, views: Mapping[str, TensorView]) -> "GGUFStore":
        """The same files, with other weights for the tensors of these names."""
        assert views.keys() <= self.tensors.keys(), views.keys() - self.tensors.keys()
        return GGUFStore(self.shards, self.values, {**self.tensors, **views})

    @property
    def path(self) -> Path:
        """The file that names the model: its only one, or its first shard."""
        return self.shards[0]

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights, without headers and padding."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def tensor(self, name: str) -> TensorView:
        """The tensor called `name`, or a KimiLiteError that names its nearest neighbours."""
        if name in self.tensors:
            return self.tensors[name]
        near = get_close_matches(name, self.tensors, n=3, cutoff=0.6)
        problem = f"{self.path}: tensor {quoted(name)} is missing among {len(self.tensors):,} tensors"
        hint = f"Near it there is: {', '.join(map(quoted, near))}." if near else "The file is of another kind of model."
        raise KimiLiteError(f"{problem}.", hint)

    def close(self) -> None:
        """Unmap the files; a view that is still held somewhere keeps its file mapped."""
        self.tensors = MappingProxyType({})


def _map_file(path: Path) -> np.ndarray:
    try:
        if path.stat().st_size == 0:
            raise KimiLiteError(
                f"{path}: the file is empty, and a model needs at least a header.", "Fetch the file again."
            )
        return map_file(path)
    except OSError as error:
        raise KimiLiteError(
            f"{path} cannot be read: {error.strerror}.", "Check its permissions and the disk."
        ) from error


def _view(info: TensorInfo, shard: Path, file: np.ndarray) -> TensorView:
    row_bytes = info.layout.row_bytes(info.shape[-1])
    data = file[info.start : info.start + info.num_bytes].reshape(*info.shape[:-1], row_bytes)
    return TensorView(info.name, info.layout, info.shape, data, shard, info.start, info.interleaved)


def _absent(info: TensorInfo, shard: Path) -> TensorView:
    """One zero, seen as all bytes of the tensor."""
    shape = (*info.shape[:-1], info.layout.row_bytes(info.shape[-1]))
    return TensorView(info.name, info.layout, info.shape, np.broadcast_to(np.uint8(0), shape), shard, info.start)


def _check_shards(shards: tuple[Path, ...], headers: Sequence[GGUFHeader]) -> None:
    """Every shard is of this model, and none is missing."""
    for shard, header in zip(shards, headers, strict=True):
        _check_place(shard, header)
        if shard is not shards[0]:
            _check_kinship(shard, header, shards[0], headers[0])
    _check_completeness(shards, headers)


def _check_place(shard: Path, header: GGUFHeader) -> None:
    """What a shard says about its place must agree with its name."""
    _, number, count = shard_name(shard.name)
    said_count = _integer(shard, header, "split.count", 1)
    said_number = _integer(shard, header, "split.no", 0)  # counted from 0
    if count == 1 and said_count > 1:
        problem = (
            f"{shard}: by its header this is one of {said_count:,} shards (split.count), and its name is no shard's"
        )
        raise KimiLiteError(f"{problem}.", "Name the shards PREFIX-00001-of-0000N.gguf, as their publisher did.")
    if count > 1 and (said_count, said_number) != (count, number - 1):
        said = f"split.no {said_number:,} and split.count {said_count:,}"
        problem = (
            f"{shard}: its header says {said}, and its name asks for {number - 1} and {count}: a foreign "
            f"or renamed shard"
        )
        raise KimiLiteError(f"{problem}.", _FOREIGN_HINT)


def _check_kinship(shard: Path, header: GGUFHeader, first_shard: Path, first: GGUFHeader) -> None:
    """What a later shard says about the model must be what shard 1 says (mostly later shards say nothing)."""
    for key, value in header.metadata.items():
        if key == "split.no" or key not in first.metadata:
            continue
        theirs = first.metadata[key]
        is_same = (
            np.array_equal(theirs, value)
            if _are_arrays(theirs, value)
            else type(theirs) is type(value) and theirs == value
        )
        if not is_same:
            problem = (
                f"{shard}: {quoted(key)} is {quoted(value)}, and in {first_shard.name} it is "
                f"{quoted(theirs)}: a foreign shard"
            )
            raise KimiLiteError(f"{problem}.", _FOREIGN_HINT)


def _are_arrays(*values: object) -> bool:
    return all(isinstance(value, np.ndarray) for value in values)


def _integer(shard: Path, header: GGUFHeader, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise KimiLiteError(f"{shard}: {key} is {quoted(value)}, and must be a whole number.", DAMAGED_HINT)
    return value


def _check_completeness(shards: tuple[Path, ...], headers: Sequence[GGUFHeader]) -> None:
    """No tensor twice, and the number that shard 1 states."""
    owner: dict[str, Path] = {}
    for shard, header in zip(shards, headers, strict=True):
        for tensor in header.tensors:
            if tensor.name in owner:
                problem = (
                    f"tensor {quoted(tensor.name)} is in {owner[tensor.name].name} and in {shard.name}: one is foreign"
                )
                raise KimiLiteError(f"{shards[0]}: {problem}.", _FOREIGN_HINT)
            owner[tensor.name] = shard
    if not owner:
        raise KimiLiteError(f"{shards[0]}: it holds no tensors, only metadata.", "Give a file with weights.")
    promised = _integer(shards[0], headers[0], "split.tensors.count", len(owner))
    if promised != len(owner):
        problem = f"split.tensors.count promises {promised:,} tensors, and the {len(shards)} shards hold {len(owner):,}"
        raise KimiLiteError(f"{shards[0]}: {problem}.", DAMAGED_HINT if len(shards) == 1 else _FOREIGN_HINT)
