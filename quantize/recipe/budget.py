"""`--fit 24G+256G`: the types of the routed experts' tensors that lose least within the memory of a machine.

What the machine has for experts is what `kimi-lite plan` says of it, by the same code: all of them must lie in RAM, or
in VRAM, with everything else. For each of their tensors every type is tried on sampled rows of the very weights,
weighed by the importance matrix where there is one. Then all start at their cheapest type, and the upgrade that lowers
the error most per byte is taken until the memory is full: on the lower convex hull of each tensor's (bytes, error) this
is the Lagrangian optimum up to the last step (Shoham & Gersho 1988).
"""

import heapq
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.recipe import EXPERTS, Recipe, exact_override, group_of
from kimi_lite.arch.sizes import sizes_of
from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware.host import usable_cores
from kimi_lite.hardware.machine import Hardware, described
from kimi_lite.hardware.probe import probe
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.options import Options
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.types import Plan
from kimi_lite.plan.view import verdict_line
from kimi_lite.quantize.calibrate.imatrix import Importance
from kimi_lite.quantize.codecs import encode, find_layout
from kimi_lite.quantize.source.model import SourceModel, SourceTensor
from kimi_lite.units import gib_apart, parse_size

_CANDIDATES = ("IQ1_S", "TQ1_0", "TQ2_0", "IQ2_XXS", "Q2_0", "Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_REST_TYPES = ("Q8_0", "Q6_K")  # what every token passes keeps 6 to 8 bits
_SAMPLED_ROWS = 32
_MOST_PLANS = 8


class FitTarget(NamedTuple):
    """What to fit into: a machine, and how much of it may be used."""

    hardware: Hardware
    options: Options


class TypeOption(NamedTuple):
    """A type for one tensor: its bytes, and the relative squared error times the number of weights."""

    num_bytes: int
    loss: float
    layout: Layout


@dataclass(frozen=True, slots=True)
class FittedRecipe:
    """The recipe found, and a line that says what goes where."""

    recipe: Recipe
    summary: str


def parse_machine(text: str) -> FitTarget:
    """`24G+256G`: VRAM and RAM, with the same meaning as `plan --vram 24G --ram 256G`; `256G`: no GPU; `this`: this
    machine. Raises KimiLiteError."""
    if text.strip().lower() == "this":
        return FitTarget(probe(), Options())
    vram, plus, ram = text.partition("+")
    try:
        vram_bytes = parse_size(vram, "--fit", allows_zero=True) if plus else 0
        ram_bytes = parse_size(ram if plus else text, "--fit")
    except KimiLiteError as error:
        problem = f"--fit {text!r} is no amount of memory."
        raise KimiLiteError(problem, f"Write VRAM and RAM, such as 24G+256G, or: this. {error.hint}") from error
    return FitTarget(described(probe(), ram_bytes, vram_bytes), Options(ram_bytes=ram_bytes, vram_bytes=vram_bytes))


def fit_recipe(model: SourceModel, machine: FitTarget, importance: Importance | None = None) -> FittedRecipe:
    """Chooses the types. Raises KimiLiteError where even the smallest are too large, with need and have."""
    experts = [tensor for tensor in model.tensors if group_of(tensor.role, tensor.shape) == EXPERTS]
    with ThreadPoolExecutor(usable_cores().num_usable) as pool:
        options = dict(zip(experts, pool.map(lambda tensor: _measure(tensor, importance), experts), strict=True))
    rest, plan = _choose_rest(model, machine, options)
    for _ in range(_MOST_PLANS):
        chosen = choose_options(options, plan.expert_capacity_bytes)
        recipe = _recipe(rest, chosen)
        plan = _plan(model, machine, recipe)  # larger experts need larger buffers, so there may be less for them
        if plan.verdict in ("fits", "tight"):
            break
    else:
        raise AssertionError((machine, plan.verdict))
    need, have = gib_apart(_num_bytes(chosen), plan.expert_capacity_bytes)
    return FittedRecipe(recipe, f"fit: experts {need} of {have}, the rest in {rest.name}; {verdict_line(plan)}")


def choose_options(
    options: Mapping[SourceTensor, Sequence[TypeOption]], available: int
) -> dict[SourceTensor, TypeOption]:
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


def lower_hull(options: Sequence[TypeOption]) -> list[TypeOption]:
    """The options that are best for some price of a byte, by rising size."""
    hull: list[TypeOption] = []
    for option in sorted(options, key=lambda option: (option.num_bytes, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _between(hull[-1], option) <= _between(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _between(first: TypeOption, second: TypeOption) -> float:
    return (second.loss - first.loss) / (second.num_bytes - first.num_bytes)


def _slope(hull: Sequence[TypeOption], position: int) -> float:
    return _between(hull[position], hull[position + 1])


def _choose_rest(
    model: SourceModel, machine: FitTarget, options: Mapping[SourceTensor, Sequence[TypeOption]]
) -> tuple[Layout, Plan]:
    """The type of all but the experts, the larger one where everything fits with it, and the plan with the smallest
    experts. Raises KimiLiteError where nothing fits."""
    smallest = choose_options(options, 0)
    plan = None
    for name in _REST_TYPES:
        try:
            rest = find_layout(name)
        except KimiLiteError:
            break  # ggml's library is not here: only Q8_0
        plan = _plan(model, machine, _recipe(rest, smallest))
        if not plan.refusal and _num_bytes(smallest) <= plan.expert_capacity_bytes:
            return rest, plan
    least_bytes = _num_bytes(smallest)
    if plan.refusal and (plan.expert_capacity_bytes <= 0 or least_bytes <= plan.expert_capacity_bytes):
        raise KimiLiteError(plan.refusal.problem, "Name a larger machine, or choose a recipe: see kimi-lite plan.")
    need, have = gib_apart(least_bytes, plan.expert_capacity_bytes)
    raise KimiLiteError(
        f"With the smallest types the experts need {need}; {have} are left for them on this machine.",
        "Try a recipe such as tq1_0, and let the experts that do not fit be read from disk.",
    )


def _recipe(rest: Layout, chosen: Mapping[SourceTensor, TypeOption]) -> Recipe:
    overrides = tuple(exact_override(tensor.name, option.layout) for tensor, option in chosen.items())
    return Recipe("fit", BY_NAME["Q8_0"], rest, overrides)


def _plan(model: SourceModel, machine: FitTarget, recipe: Recipe) -> Plan:
    """Of the file that the recipe would make."""
    metadata = {key: value.value for key, value in model.make_metadata(BY_NAME["Q8_0"]).items()}
    config = ModelConfig.from_metadata(metadata)
    tensors = (
        (tensor.role, tensor.shape, recipe.choose(tensor.role, tensor.shape, tensor.name).layout)
        for tensor in model.tensors
    )
    return make_plan(sizes_of(config, tensors), machine.hardware, machine.options)


def _num_bytes(chosen: Mapping[SourceTensor, TypeOption]) -> int:
    return sum(option.num_bytes for option in chosen.values())


def _measure(tensor: SourceTensor, importance: Importance | None) -> list[TypeOption]:
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
        options.append(
            TypeOption(rows_in_all * layout.row_bytes(row), float(np.mean(lost)) * tensor.num_weights, layout)
        )
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
