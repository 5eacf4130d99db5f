"""A model's bytes on several memory nodes: which rows the threads of which node read, in slots and in files, and
whether they came to lie there.

A thread's rows are its share of each matrix, of each expert's gate, up and down, in the order of the threads
(`native.cpu.bands`), so a node's rows are its threads' (`native.cpu.nodes.split_rows`). Slots are touched first by
threads of the node (`native.cpu.pages`); a mapped file's pages lie where the thread ran that brought them into the page
cache, so `gguf.warm` reads `file_runs`, and without it the kernels' own threads do.
"""

import ctypes
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.index import ExpertIndex, RoutedLayer
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.gguf.warm import Run, is_cached
from kimi_lite.native.cpu.linear import BAND_STEP
from kimi_lite.native.cpu.nodes import ThreadGroup, split_rows
from kimi_lite.native.cpu.pages import (
    HUGE_PAGE_BYTES,
    LOCAL_POLICIES,
    PAGE_BYTES,
    Spans,
    inherited_policy,
    locate,
    strange_share,
    touch,
)

_STRANGE = 0.1  # of the bytes: with more on other nodes huge pages are too large, or a warning is due
_SLOTS_LOOKED_AT, _PAGES_LOOKED_AT = 64, 1024
_LEAST_CACHED = 0.2  # of the pages looked at: with fewer in memory the rest will lie right
_RIGHT = "docker run --cap-add SYS_NICE gives a container the right"


class FilePart(NamedTuple):
    """Bytes start .. stop of a file, which threads of this group read."""

    shard: Path
    start: int
    stop: int
    group: int

    @property
    def middle(self) -> int:
        return (self.start + self.stop) // 2


def placed_groups(groups: Sequence[ThreadGroup]) -> tuple[ThreadGroup, ...]:
    """Those of a team whose memory is placed: none where numactl, or who started this process otherwise, has said where
    its pages lie."""
    try:
        policy = inherited_policy() if groups else 0
    except OSError:  # a container without the right to ask; first touch needs none
        policy = 0
    return tuple(groups) if policy in LOCAL_POLICIES else ()


def slot_parts(layer: RoutedLayer, groups: Sequence[ThreadGroup]) -> list[tuple[int, int, int]]:
    """(start, stop, group) of the bytes of a slot in RAM, ascending."""
    parts, at = [], 0
    for matrix in layer.matrices:
        run = matrix.run(0)
        ends = [at + rows.stop * matrix.row_bytes for rows in split_rows(groups, matrix.num_rows, BAND_STEP)]
        ends[-1] = at + run.target_bytes
        for number, (start, stop) in enumerate(zip([at, *ends[:-1]], ends, strict=True)):
            if start < stop:
                parts.append((start, stop, number))
        at = ends[-1]
    return parts


def wants_small_pages(layer: RoutedLayer, groups: Sequence[ThreadGroup]) -> bool:
    """Whether huge pages would put much of a slot on other nodes than its threads'."""
    spans = Spans.repeated(0, layer.ram_slot_bytes, _SLOTS_LOOKED_AT, slot_parts(layer, groups))
    return strange_share(spans, HUGE_PAGE_BYTES) > _STRANGE


def place_slots(memory: np.ndarray, layer: RoutedLayer, groups: Sequence[ThreadGroup]) -> None:
    """Touches untouched memory of slots like this layer's, each node's rows by its own threads; a warning where they
    came to lie elsewhere."""
    slot_bytes = layer.ram_slot_bytes
    count = memory.nbytes // slot_bytes
    if not count:
        return
    spans = Spans.repeated(memory.ctypes.data, slot_bytes, count, slot_parts(layer, groups))
    touch(spans, groups, PAGE_BYTES if wants_small_pages(layer, groups) else HUGE_PAGE_BYTES)
    addresses = np.linspace(memory.ctypes.data, spans.stop - 1, _PAGES_LOOKED_AT).astype(np.int64)
    check_pages(addresses, spans.owners_at(addresses), groups, "numastat -m shows which node is full, and of what")


def file_runs(store: GGUFStore, config: ModelConfig, groups: Sequence[ThreadGroup]) -> list[Run]:
    """The bytes of a model's files by the CPUs of those that read them, each file's in order."""
    parts = [*_expert_parts(ExpertIndex.find(store, config), groups), *_other_parts(store, config, groups)]
    parts.sort(key=lambda part: part[:2])
    return [Run(shard, start, stop, groups[number].cpus) for shard, start, stop, number in parts]


def _expert_parts(index: ExpertIndex, groups: Sequence[ThreadGroup]) -> Iterator[FilePart]:
    """Of every routed expert, each for itself."""
    for layer in index.layers.values():
        for matrix in layer.matrices:
            split = split_rows(groups, matrix.num_rows, BAND_STEP)
            for expert in range(index.num_experts):
                first = matrix.start + expert * matrix.stride
                for number, rows in enumerate(split):
                    if rows:
                        start, stop = first + rows.start * matrix.row_bytes, first + rows.stop * matrix.row_bytes
                        yield FilePart(matrix.shard, start, stop, number)


def _other_parts(store: GGUFStore, config: ModelConfig, groups: Sequence[ThreadGroup]) -> Iterator[FilePart]:
    """Of every other matrix."""
    layers = ExpertIndex.find(store, config).layers.values()
    routed = {matrix.tensor for layer in layers for matrix in layer.matrices}
    for tensor in store.tensors.values():
        if tensor.name in routed or tensor.data.ndim < 2:
            continue
        row_bytes = tensor.data.shape[-1]
        for number, rows in enumerate(split_rows(groups, tensor.data.nbytes // row_bytes, BAND_STEP)):
            if rows:
                start, stop = tensor.start + rows.start * row_bytes, tensor.start + rows.stop * row_bytes
                yield FilePart(tensor.shard, start, stop, number)


def check_files(
    store: GGUFStore,
    config: ModelConfig,
    groups: Sequence[ThreadGroup],
    has_experts: bool = True,
    has_others: bool = True,
) -> None:
    """A warning where much of what the page cache holds of the model lies on other nodes than its threads'. What it
    does not hold is not looked at. has_experts, has_others: what of the files the CPU reads in place."""
    parts = [
        *(_expert_parts(ExpertIndex.find(store, config), groups) if has_experts else ()),
        *(_other_parts(store, config, groups) if has_others else ()),
    ]
    if not parts:
        return
    looked_at = [parts[at] for at in np.unique(np.linspace(0, len(parts) - 1, _PAGES_LOOKED_AT).astype(int))]
    cached = [part for part, is_there in zip(looked_at, are_cached(looked_at), strict=True) if is_there]
    if len(cached) < _LEAST_CACHED * len(looked_at):
        return
    bases = {tensor.shard: tensor.data.ctypes.data - tensor.start for tensor in store.tensors.values()}
    addresses = np.array([bases[part.shard] + part.middle for part in cached], np.int64)
    for address in addresses.tolist():
        ctypes.string_at(address, 1)  # a page has a node for this process once it is in its tables
    owners = np.array([part.group for part in cached])
    remedy = "to read them anew: echo 1 | sudo tee /proc/sys/vm/drop_caches before a start; or --load read"
    check_pages(addresses, owners, groups, remedy)


def are_cached(parts: Sequence[FilePart]) -> list[bool]:
    """Whether the page cache holds the middle of each; False where the system does not tell."""
    with ExitStack() as opened:
        descriptors = {shard: os.open(shard, os.O_RDONLY) for shard in {part.shard for part in parts}}
        for descriptor in descriptors.values():
            opened.callback(os.close, descriptor)
        return [is_cached(descriptors[part.shard], part.middle) for part in parts]


def check_pages(addresses: np.ndarray, owners: np.ndarray, groups: Sequence[ThreadGroup], remedy: str) -> None:
    """A warning where more than a tenth of these pages, which group `owners[i]` reads, are on other nodes, or where the
    system does not tell."""
    try:
        found = locate(addresses)
    except OSError as error:
        why = f"move_pages is refused: {error.strerror}"
        warnings.warn(f"Whether rows lie on their memory nodes cannot be checked ({why}); {_RIGHT}.", stacklevel=2)
        return
    wanted = np.array([group.memory for group in groups])[owners]
    known = found >= 0
    share = float(np.mean(found[known] != wanted[known])) if known.any() else 0.0
    if share > _STRANGE:
        text = f"{share:.0%} of the model's pages lie on other memory nodes than the threads that read them"
        warnings.warn(f"{text}, and come through a slower link; {remedy}.", stacklevel=2)
