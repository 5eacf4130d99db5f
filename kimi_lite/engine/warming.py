"""Reads a model's files into memory before the first prompt: where memory is on several nodes, each row by a thread of
the node whose threads will multiply it."""

from collections.abc import Callable
from pathlib import Path

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.tensors import open_model
from kimi_lite.experts.nodes import check_files, file_runs, placed_groups
from kimi_lite.gguf.shards import find_shards
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.gguf.warm import warm
from kimi_lite.native.cpu.nodes import ThreadGroup
from kimi_lite.native.cpu.placement import place_threads
from kimi_lite.plan.types import Plan


def warm_model(path: Path, plan: Plan, on_progress: Callable[[int, int], None], should_stop: Callable[[], bool]) -> int:
    """Bytes that had to be read; `warm` says what the others are. A warning where the files are in memory already, and
    lie on other nodes than `plan` counts with."""
    groups = _reading_groups(plan)
    if not groups:
        return warm(find_shards(path), on_progress, should_stop)
    store, config = open_model(path)
    num_read = warm(store.shards, on_progress, should_stop, runs=file_runs(store, config, groups))
    if not should_stop():
        check_warmed(store, config, plan)
    return num_read


def check_warmed(store: GGUFStore, config: ModelConfig, plan: Plan) -> None:
    """A warning where what the kernels will read of the files is in memory, and lies on other nodes than theirs."""
    if groups := _reading_groups(plan):
        is_mapped = plan.limits.loading == "map" and not plan.has_ram_slots
        check_files(store, config, groups, has_experts=is_mapped, has_others=not plan.is_on_gpu)


def _reading_groups(plan: Plan) -> tuple[ThreadGroup, ...]:
    """Of the threads that will run; () where nothing is divided."""
    return placed_groups(place_threads(plan.num_threads)) if plan.memory_use == "by rows" else ()
