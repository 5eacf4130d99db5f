"""`--fit 24G+256G`: the types of the routed experts' tensors that lose least within the memory of a machine.

The GPU holds what every token passes (attention, shared experts, dense layers, embeddings, at Q8_0 or Q6_K),
the cache of 32 K tokens and some room to work; experts get the main memory and what is left on the GPU. For each of
their tensors every type is tried on sampled rows of the very weights, weighed by the importance matrix where there is
one. Then all start at their cheapest type, and the upgrade that lowers the error most per byte is taken until the
memory is full: on the lower convex hull of each tensor's (bytes, error) this is the Lagrangian optimum up to the last
step (Shoham & Gersho 1988).
"""

import heapq
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import psutil

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.recipe import EXPERTS, Recipe, exact_override, group_of
from kimi_lite.errors import KimiLiteError
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.quantize.calibrate.imatrix import Importance
from kimi_lite.quantize.codecs import encode, find_layout
from kimi_lite.quantize.source.model import SourceModel, SourceTensor

_GIB = 1 << 30
_CANDIDATES = ("IQ1_S", "TQ1_0", "TQ2_0", "IQ2_XXS", "Q2_0", "Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_REST_TYPES = ("Q8_0", "Q6_K")  # what every token passes keeps 6 to 8 bits
_SYSTEM_BYTES, _GPU_BYTES = 8 * _GIB, 2 * _GIB  # of main memory for system and programs; of the GPU for work
_CONTEXT_TOKENS, _CACHE_VALUE_BYTES = 32768, 2
_SAMPLED_ROWS = 32


class Budget(NamedTuple):
    """Bytes of the GPU and of main memory."""

    gpu: int
    memory: int


class Option(NamedTuple):
    """A type for one tensor: its bytes, and the relative squared error times the number of weights."""

    num_bytes: int
    loss: float
    layout: Layout


@dataclass(frozen=True, slots=True)
class Fit:
    """The recipe found, and a line that says what goes where."""

    recipe: Recipe
    summary: str


def parse_budget(text: str) -> Budget:
    """`24G+256G`: VRAM and main memory in GiB, as they are sold; `256G`: no GPU; `this`: this machine."""
    if text.strip().lower() == "this":
        return Budget(_gpu_bytes(), psutil.virtual_memory().total)
    gpu, _, memory = text.replace(" ", "").upper().rpartition("+")
    try:
        sizes = [float(size.removesuffix("B").removesuffix("G")) for size in (gpu or "0", memory)]
    except ValueError:
        sizes = []
    if len(sizes) != 2 or not 0 <= sizes[0] < 1e6 or not 0 < sizes[1] < 1e6:
        raise KimiLiteError(
            f"{text!r} is no memory to fit into.", "Write VRAM and main memory, such as 24G+256G, or: this."
        )
    return Budget(int(sizes[0] * _GIB), int(sizes[1] * _GIB))


def _gpu_bytes() -> int:
    """The largest GPU's memory by nvidia-smi; 0 where there is none."""
    if not shutil.which("nvidia-smi"):
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return max((int(line) << 20 for line in done.stdout.split() if line.isdecimal()), default=0)


def fit_recipe(model: SourceModel, budget: Budget, importance: Importance | None = None) -> Fit:
    """Chooses the types. Raises KimiLiteError where even the smallest are too large, with need and have."""
    experts = [tensor for tensor in model.tensors if group_of(tensor.role, tensor.shape) == EXPERTS]
    rest, rest_bytes = _choose_rest(model, budget)
    cache_bytes = _cache_bytes(model)
    gpu_left = budget.gpu - rest_bytes - cache_bytes - _GPU_BYTES * bool(budget.gpu)
    available = budget.memory - _SYSTEM_BYTES + gpu_left
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        options = dict(zip(experts, pool.map(lambda tensor: _measure(tensor, importance), experts), strict=True))
    chosen = choose_options(options, available)
    need = sum(option.num_bytes for option in chosen.values())
    if need > available:
        total = budget.memory + budget.gpu
        raise KimiLiteError(
            f"With the smallest types all needs {(total - available + need) / _GIB:.1f} GiB, VRAM and memory have "
            f"{total / _GIB:.1f}.",
            "Take a recipe such as tq1_0 and let the experts that do not fit be read from disk.",
        )
    overrides = tuple(exact_override(tensor.name, option.layout) for tensor, option in chosen.items())
    summary = (
        f"fit: experts {need / _GIB:,.3f} of {available / _GIB:,.3f} GiB, the rest {rest_bytes / _GIB:,.3f} GiB "
        f"in {rest.name}, "
        f"cache of up to {_CONTEXT_TOKENS:,} tokens {cache_bytes / _GIB:,.3f} GiB"
    )
    return Fit(Recipe("fit", BY_NAME["Q8_0"], rest, overrides), summary)


def choose_options(options: Mapping[SourceTensor, Sequence[Option]], available: int) -> dict[SourceTensor, Option]:
    """The least sum of losses within `available` bytes, by the steps of steepest descent along each tensor's hull."""
    hulls = {tensor: lower_hull(choices) for tensor, choices in options.items()}
    at = dict.fromkeys(hulls, 0)
    left = available - sum(hull[0].num_bytes for hull in hulls.values())
    order = list(hulls)
    steps = [(_slope(hulls[tensor], 0), index) for index, tensor in enumerate(order) if len(hulls[tensor]) > 1]
    heapq.heapify(steps)
    while steps:
        _, index = heapq.heappop(steps)
        hull, position = hulls[order[index]], at[order[index]]
        cost = hull[position + 1].num_bytes - hull[position].num_bytes
        if cost > left:
            continue  # too large a step here; a smaller tensor's may still fit
        left -= cost
        at[order[index]] = position + 1
        if position + 2 < len(hull):
            heapq.heappush(steps, (_slope(hull, position + 1), index))
    return {tensor: hulls[tensor][position] for tensor, position in at.items()}


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options that are best for some price of a byte, by rising size."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.num_bytes, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _between(hull[-1], option) <= _between(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _between(first: Option, second: Option) -> float:
    return (second.loss - first.loss) / (second.num_bytes - first.num_bytes)


def _slope(hull: Sequence[Option], position: int) -> float:
    return _between(hull[position], hull[position + 1])


def _choose_rest(model: SourceModel, budget: Budget) -> tuple[Layout, int]:
    """The type of all but the experts, and their bytes: the larger one where it leaves the GPU room."""
    layout, num_bytes = BY_NAME["Q8_0"], 0
    for name in _REST_TYPES:
        try:
            layout = find_layout(name)
        except KimiLiteError:
            break  # ggml's library is not here: stay with Q8_0
        recipe = Recipe(name, layout, layout)
        num_bytes = sum(
            tensor.num_weights
            // tensor.shape[-1]
            * recipe.choose(tensor.role, tensor.shape).layout.row_bytes(tensor.shape[-1])
            for tensor in model.tensors
            if group_of(tensor.role, tensor.shape) != EXPERTS
        )
        if num_bytes + _cache_bytes(model) + _GPU_BYTES <= budget.gpu or not budget.gpu:
            break
    return layout, num_bytes


def _cache_bytes(model: SourceModel) -> int:
    config = ModelConfig.from_metadata(
        {key: value.value for key, value in model.make_metadata(BY_NAME["Q8_0"]).items()}
    )
    return int(config.kv_bytes_per_token(_CACHE_VALUE_BYTES)) * min(_CONTEXT_TOKENS, config.context_length)


def _measure(tensor: SourceTensor, importance: Importance | None) -> list[Option]:
    """Each type that can hold the tensor, with its loss on rows sampled evenly over all experts."""
    rows_in_all, row = tensor.num_weights // tensor.shape[-1], tensor.shape[-1]
    vectors = importance.find(tensor.name, tensor.shape) if importance else None
    places = np.unique(np.linspace(0, rows_in_all - 1, _SAMPLED_ROWS).astype(int))
    read_rows = tensor.open_rows()
    samples = [read_rows(int(place), int(place) + 1) for place in places]
    weights = [None if vectors is None else vectors[place // tensor.shape[-2]] for place in places]
    options = []
    for layout in _list_layouts(row, vectors is not None):
        lost = [_relative_loss(layout, sample, weight) for sample, weight in zip(samples, weights, strict=True)]
        options.append(Option(rows_in_all * layout.row_bytes(row), float(np.mean(lost)) * tensor.num_weights, layout))
    return options


def _list_layouts(row: int, has_importance: bool) -> list[Layout]:
    layouts = []
    for name in _CANDIDATES:
        if row % BY_NAME[name].block_size == 0:
            try:
                layouts.append(find_layout(name, has_importance))
            except KimiLiteError:
                continue  # needs an importance matrix, or ggml's library
    return layouts


def _relative_loss(layout: Layout, sample: np.ndarray, weight: np.ndarray | None) -> float:
    error = dequantize(encode(layout, sample, weight), layout.name) - sample
    scale = np.float32(1) if weight is None else weight
    energy = float((scale * sample**2).sum())
    return float((scale * error**2).sum()) / energy if energy else 0.0
