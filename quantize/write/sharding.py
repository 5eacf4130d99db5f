"""Which tensor goes into which output file: llama.cpp's shards `NAME-00001-of-000NN.gguf`, or one file where all fits.

A tensor never spans shards, and a shard is closed before the tensor that would make it larger than asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_lite.gguf.metadata import Value, ValueType
from kimi_lite.quantize.write.writer import Tensor, padded_bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file and its tensors, in order."""

    path: Path
    tensors: tuple[Tensor, ...]

    @property
    def data_bytes(self) -> int:
        return sum(padded_bytes(tensor) for tensor in self.tensors)

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")


def plan_shards(path: Path, tensors: Sequence[Tensor], max_bytes: int) -> tuple[Shard, ...]:
    """The output files for `path` (`NAME.gguf`): itself where all tensors fit into `max_bytes`, else its numbered
    shards."""
    groups: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + padded_bytes(tensor) > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += padded_bytes(tensor)
    count = len(groups)
    if count == 1:
        return (Shard(path, tuple(groups[0])),)
    stem = path.name.removesuffix(".gguf")
    names = (f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1))
    return tuple(Shard(path.with_name(name), tuple(group)) for name, group in zip(names, groups, strict=True))


def shard_metadata(metadata: Mapping[str, Value], shards: Sequence[Shard], number: int) -> dict[str, Value]:
    """The model's keys in the first shard; its place in all of them."""
    own = dict(metadata) if number == 0 else {"general.architecture": metadata["general.architecture"]}
    if len(shards) == 1:
        return own
    return own | {
        "split.no": Value(number, ValueType.UINT16),
        "split.count": Value(len(shards), ValueType.UINT16),
        "split.tensors.count": Value(sum(len(shard.tensors) for shard in shards), ValueType.INT32),
    }
