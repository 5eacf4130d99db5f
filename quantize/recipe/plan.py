"""What a conversion would do, from names and shapes alone: types, sizes and shards. `--dry-run` prints it, `convert`
does it."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_lite.arch.recipe import GROUPS, LOSSLESS, Recipe, group_of
from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware.host import usable_cores
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.codecs import encode
from kimi_lite.quantize.source.model import SourceModel, SourceTensor
from kimi_lite.quantize.write.sharding import Shard

_GIB = 1 << 30
_TRAINED_TYPES = ("f32", "f16", "bf16")
_PROBE_WEIGHTS = 1 << 18  # encoded once a type for the estimate of time


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    source: SourceTensor
    layout: Layout

    @property
    def num_bytes(self) -> int:
        row = self.source.shape[-1]
        return self.source.num_weights // row * self.layout.row_bytes(row)

    @property
    def is_exact(self) -> bool:
        return self.layout.name in self.source.exact


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """Every tensor with its type. `notes` say what is left out, and which tensors did not get the type asked for, and
    why."""

    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]
    model: SourceModel

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def num_weights(self) -> int:
        return sum(tensor.source.num_weights for tensor in self.tensors)

    @property
    def main_layout(self) -> Layout:
        """The type of most weights, or of the experts asked for where the model has none."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.layout.name] = counts.get(tensor.layout.name, 0) + tensor.source.num_weights
        most = max(counts, key=lambda name: counts[name])
        return next(tensor.layout for tensor in self.tensors if tensor.layout.name == most)


def plan_conversion(model: SourceModel, recipe: Recipe) -> ConversionPlan:
    """Raises KimiLiteError where a lossless recipe would change a weight, or an exception names no tensor."""
    choices = [recipe.choose(tensor.role, tensor.shape, tensor.name) for tensor in model.tensors]
    tensors = tuple(PlannedTensor(tensor, choice.layout) for tensor, choice in zip(model.tensors, choices, strict=True))
    for override in recipe.overrides:
        if not any(override.pattern.search(tensor.name) for tensor in model.tensors):
            some = ", ".join(tensor.name for tensor in model.tensors[:3])
            raise KimiLiteError(f"No tensor's name has {override.pattern.pattern!r}.", f"Names are like {some}.")
    changed = [tensor.source for tensor in tensors if recipe.is_lossless and not tensor.is_exact]
    if changed:
        first = f"{changed[0].name} is {changed[0].stored}"
        raise KimiLiteError(
            f"{LOSSLESS} cannot keep {len(changed)} of {len(tensors)} tensors as they are: {first}.",
            "It is for checkpoints with INT4 experts and bfloat16 for the rest: Kimi K2-Thinking, K2.5, K2.6.",
        )
    reasons = (choice.reason for choice in choices if choice.reason)
    return ConversionPlan(
        recipe, tensors, (*model.notes, *_twice_quantized(tensors), *_of_our_own(tensors), *reasons), model
    )


def _twice_quantized(tensors: Sequence[PlannedTensor]) -> Iterator[str]:
    """Says where the source is no longer what was trained."""
    twice = [tensor.source for tensor in tensors if tensor.source.stored not in _TRAINED_TYPES and not tensor.is_exact]
    if twice:
        kinds = ", ".join(sorted({tensor.stored for tensor in twice}))
        yield (
            f"{len(twice)} tensors are quantized in the source already ({kinds}), and once more here: their "
            f"errors add up"
        )


def _of_our_own(tensors: Sequence[PlannedTensor]) -> Iterator[str]:
    """Says where no other program can read the result."""
    own = [tensor.layout.name for tensor in tensors if tensor.layout.is_own]
    if own:
        kinds = ", ".join(sorted(set(own)))
        yield f"{len(own)} tensors are {kinds}, which only kimi-lite reads: llama.cpp refuses the file"


def estimate_seconds(plan: ConversionPlan) -> float:
    """Of encoding what is not kept, on all cores, by encoding a few Gaussian rows now; disks work meanwhile."""
    rows = np.random.default_rng(0).standard_normal((_PROBE_WEIGHTS // 1024, 1024), np.float32)
    importance = np.ones(rows.shape[1], np.float32)
    seconds = 0.0
    changed = [tensor for tensor in plan.tensors if not tensor.is_exact]
    for layout in {tensor.layout for tensor in changed}:
        encode(layout, rows[:1], importance)  # compiles
        start_s = time.perf_counter()
        encode(layout, rows, importance)
        per_weight_s = (time.perf_counter() - start_s) / rows.size
        seconds += per_weight_s * sum(tensor.source.num_weights for tensor in changed if tensor.layout == layout)
    return seconds / usable_cores().most_threads


def describe_plan(plan: ConversionPlan, shards: Sequence[Shard], folder: Path) -> list[str]:
    """The table of `--dry-run`, a line a group."""
    lines = [f"{'group':<20}{'tensors':>8}{'params':>12}  {'from -> to':<28}{'size':>12}{'bpw':>8}"]
    for group in GROUPS:
        members = [tensor for tensor in plan.tensors if group_of(tensor.source.role, tensor.source.shape) == group]
        if members:
            before = "+".join(sorted({tensor.source.stored for tensor in members}))
            after = "+".join(sorted({tensor.layout.name.lower() for tensor in members}))
            lines.append(_line(group, members, f"{before} -> {after}"))
    lines.append(_line("total", plan.tensors, f"{len(shards)} file{'s' if len(shards) > 1 else ''}"))
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    verdict = "enough" if free > plan.num_bytes else f"{(plan.num_bytes - free) / _GIB:,.1f} GiB too little"
    lines.append(f"disk free {free / _GIB:,.1f} GiB: {verdict}")
    if not folder.exists():
        made = "will be made" if os.access(existing, os.W_OK) else f"is not there, and {existing} cannot be written"
        lines.append(f"{folder} {made}")
    lines.append(
        f"encoding takes about {_duration(estimate_seconds(plan))} on {usable_cores().most_threads} threads, "
        "if the disks keep up"
    )
    return [*lines, _verdict(plan, existing)]


def _line(label: str, tensors: Sequence[PlannedTensor], types: str) -> str:
    num_weights = sum(tensor.source.num_weights for tensor in tensors)
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    params = f"{num_weights / 1e9:,.1f} B" if num_weights >= 1e9 else f"{num_weights / 1e6:,.1f} M"
    size = f"{num_bytes / _GIB:,.3f} GiB" if num_bytes < _GIB else f"{num_bytes / _GIB:,.1f} GiB"
    return f"{label:<20}{len(tensors):>8,}{params:>12}  {types:<28}{size:>12}{8 * num_bytes / num_weights:>8.2f}"


def _verdict(plan: ConversionPlan, folder: Path) -> str:
    """Whether the result would run on this machine and how fast at most, as `kimi-lite plan` says it."""
    from kimi_lite.arch.config import ModelConfig
    from kimi_lite.arch.sizes import sizes_of
    from kimi_lite.hardware import probe as hardware
    from kimi_lite.plan import plan as memory_plan
    from kimi_lite.plan.view import verdict_line

    config = ModelConfig.from_metadata(
        {key: value.value for key, value in plan.model.make_metadata(plan.main_layout).items()}
    )
    sizes = sizes_of(config, ((tensor.source.role, tensor.source.shape, tensor.layout) for tensor in plan.tensors))
    return verdict_line(memory_plan.make_plan(sizes, hardware.probe(folder)))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min"
