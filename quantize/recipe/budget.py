"""`--fit 24G+256G` and `--size 250G`: the types that lose least within the memory of a machine, or within a file.

What the machine has is what `kimi-lite plan` says of it, by the same code: all experts must lie in RAM, or in VRAM,
with everything else. Every type that a tensor can have is tried on sampled rows of the very weights, weighed by the
importance matrix where there is one. A table of sensitivities says what such an error does to the model's words
(`quantize.recipe.sensitivity`), and `quantize.recipe.knapsack` finds the choice with the least divergence. Without a
table every weight of the routed experts counts alike, and the rest keeps 6 to 8 bits.

Without a GPU, and for a file, all matrices compete for the same bytes. With one, what is not a routed expert lies in
VRAM in a type of the GPU's own, so that its bytes buy nothing for experts in RAM: it stays in Q8_0, or Q6_K.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kimi_lite.arch.architecture import layer_of
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.recipe import EXPERTS, KEPT, Recipe, choose, exact_override, group_of
from kimi_lite.arch.sizes import sizes_of
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import pack_text, pack_value
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
from kimi_lite.quantize.recipe.knapsack import Option, solve
from kimi_lite.quantize.recipe.sensitivity import Sensitivity, known_sensitivity
from kimi_lite.quantize.source.model import SourceModel, SourceTensor
from kimi_lite.quantize.write.writer import ALIGNMENT
from kimi_lite.units import gib_apart, parse_size

_EXPERT_TYPES = (
    *("IQ1_S", "TQ1_0", "IQ1_M", "TQ2_0", "IQ2_XXS", "Q2_0", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S"),
    *("IQ4_XS", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
)
_REST_TYPES = ("IQ4_XS", "Q4_0", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0")  # what every token passes
_GPU_REST_TYPES = ("Q8_0", "Q6_K")
_SAMPLED_ROWS = 32
_MOST_PLANS = 8
_DEPTH_PARTS = 6  # of the lines that say which layers got which types
_INFO_BYTES = 128  # of a tensor in a header but for its name, and of what each shard says of itself


class FitTarget(NamedTuple):
    """What to fit into: a machine, and how much of it may be used."""

    hardware: Hardware
    options: Options


class TypeOption(NamedTuple):
    """A type for a unit: its bytes, and what it loses: nats, or where no table says it the relative squared error times
    the number of weights."""

    num_bytes: int
    loss: float
    layout: Layout


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that take a type together, and the types that they may have."""

    tensors: tuple[SourceTensor, ...]
    options: tuple[TypeOption, ...]

    @property
    def is_routed(self) -> bool:
        return _is_routed(self.tensors[0])


@dataclass(frozen=True, slots=True)
class FittedRecipe:
    """The recipe found, and lines that say what goes where and what it costs. `predicted`: nats above the floor; None
    where no table says."""

    recipe: Recipe
    lines: tuple[str, ...]
    predicted: float | None


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


def fit_recipe(
    model: SourceModel,
    machine: FitTarget,
    importance: Importance | None = None,
    sensitivity: Sensitivity | None = None,
) -> FittedRecipe:
    """Chooses the types for a machine. `sensitivity`: default, that of the model where it is known. Raises
    KimiLiteError where even the smallest are too large, with need and have."""
    sensitivity = sensitivity or known_sensitivity(_config_of(model))
    is_on_gpu = machine.hardware.gpu is not None and machine.options.allows_gpu
    has_rest = not is_on_gpu and machine.options.ram_expert_bytes is None
    groups = _make_groups(model, sensitivity, importance, has_rest)
    rest, plan = _choose_rest(model, machine, groups, is_on_gpu)
    chosen = choose_options(groups, 0)
    available = _available(groups, chosen, plan)
    for _ in range(_MOST_PLANS):
        chosen = choose_options(groups, available)
        plan = _plan(model, machine, _recipe(rest, groups, chosen))  # larger experts need larger buffers
        if plan.verdict in ("fits", "tight"):
            break
        available = min(available, _available(groups, chosen, plan))
    else:
        raise AssertionError((machine, plan.verdict))
    need, have = gib_apart(plan.sizes.expert_bytes, plan.expert_capacity_bytes)
    others = "" if _has_rest(groups) else f", the rest in {rest.name}"
    line = f"fit: experts {need} of {have}{others}; {verdict_line(plan)}"
    return _fitted(rest, groups, chosen, sensitivity, line)


def fit_size(
    model: SourceModel, num_bytes: int, importance: Importance | None = None, sensitivity: Sensitivity | None = None
) -> FittedRecipe:
    """Chooses the types for files of at most `num_bytes` together. Raises KimiLiteError as `fit_recipe`."""
    sensitivity = sensitivity or known_sensitivity(_config_of(model))
    groups = _make_groups(model, sensitivity, importance, has_rest=True)
    rest = BY_NAME["Q8_0"]
    competing = {tensor.name for group in groups for tensor in group.tensors}
    fixed = _header_bytes(model) + sum(
        _num_bytes(tensor, choose(tensor.role, tensor.shape, rest).layout)
        for tensor in model.tensors
        if tensor.name not in competing
    )
    least = fixed + sum(min(option.num_bytes for option in group.options) for group in groups)
    if least > num_bytes:
        need, have = gib_apart(least, num_bytes)
        raise KimiLiteError(f"With the smallest types the file needs {need}; --size is {have}.", "Name a larger size.")
    chosen = choose_options(groups, num_bytes - fixed)
    need, have = gib_apart(fixed + sum(option.num_bytes for option in chosen), num_bytes)
    line = f"fit: {need} of {have}"
    return _fitted(rest, groups, chosen, sensitivity, line)


def _fitted(
    rest: Layout, groups: Sequence[Group], chosen: Sequence[TypeOption], sensitivity: Sensitivity | None, line: str
) -> FittedRecipe:
    lines = (line, *_chosen_lines(groups, chosen, sensitivity))
    return FittedRecipe(_recipe(rest, groups, chosen), lines, _predicted(chosen) if sensitivity else None)


def _has_rest(groups: Sequence[Group]) -> bool:
    return not all(group.is_routed for group in groups)


def choose_options(groups: Sequence[Group], available: int) -> list[TypeOption]:
    """The least sum of losses within `available` bytes; the smallest of all where even they are too large."""
    units = [[Option(option.num_bytes, option.loss) for option in group.options] for group in groups]
    places = solve(units, available)
    if places is None:
        return [min(group.options, key=lambda option: (option.num_bytes, option.loss)) for group in groups]
    return [group.options[place] for group, place in zip(groups, places, strict=True)]


def _choose_rest(
    model: SourceModel, machine: FitTarget, groups: Sequence[Group], is_on_gpu: bool
) -> tuple[Layout, Plan]:
    """The type of what competes for no bytes, the larger one where everything fits with it, and the plan with the
    smallest types for the others. Raises KimiLiteError where nothing fits."""
    smallest = choose_options(groups, 0)
    plan = None
    for name in _GPU_REST_TYPES if is_on_gpu or not _has_rest(groups) else _GPU_REST_TYPES[:1]:
        try:
            rest = find_layout(name)
        except KimiLiteError:
            break  # ggml's library is not here: only Q8_0
        plan = _plan(model, machine, _recipe(rest, groups, smallest))
        if not plan.refusal and plan.sizes.expert_bytes <= plan.expert_capacity_bytes:
            return rest, plan
    least_bytes = plan.sizes.expert_bytes
    if plan.refusal and (plan.expert_capacity_bytes <= 0 or least_bytes <= plan.expert_capacity_bytes):
        raise KimiLiteError(plan.refusal.problem, "Name a larger machine, or choose a recipe: see kimi-lite plan.")
    need, have = gib_apart(least_bytes, plan.expert_capacity_bytes)
    raise KimiLiteError(
        f"With the smallest types the experts need {need}; {have} are left for them on this machine.",
        "Try a recipe such as tq1_0, and let the experts that do not fit be read from disk.",
    )


def _available(groups: Sequence[Group], chosen: Sequence[TypeOption], plan: Plan) -> int:
    """Bytes for all groups together, by the plan for these choices: what experts can have, and what the others among
    them have now."""
    others = (option.num_bytes for group, option in zip(groups, chosen, strict=True) if not group.is_routed)
    return plan.expert_capacity_bytes + sum(others)


def _recipe(rest: Layout, groups: Sequence[Group], chosen: Sequence[TypeOption]) -> Recipe:
    overrides = (
        exact_override(tensor.name, option.layout)
        for group, option in zip(groups, chosen, strict=True)
        for tensor in group.tensors
    )
    return Recipe("fit", BY_NAME["Q8_0"], rest, tuple(overrides))


def _config_of(model: SourceModel) -> ModelConfig:
    return ModelConfig.from_metadata({key: value.value for key, value in model.make_metadata(BY_NAME["Q8_0"]).items()})


def _plan(model: SourceModel, machine: FitTarget, recipe: Recipe) -> Plan:
    """Of the file that the recipe would make."""
    tensors = (
        (tensor.role, tensor.shape, recipe.choose(tensor.role, tensor.shape, tensor.name).layout)
        for tensor in model.tensors
    )
    return make_plan(sizes_of(_config_of(model), tensors), machine.hardware, machine.options)


def _num_bytes(tensor: SourceTensor, layout: Layout) -> int:
    """In a file, with the padding behind it."""
    row = tensor.shape[-1]
    return -(-tensor.num_weights // row * layout.row_bytes(row) // ALIGNMENT) * ALIGNMENT


def _header_bytes(model: SourceModel) -> int:
    """At most, of all shards."""
    metadata = model.make_metadata(BY_NAME["Q8_0"])
    return sum(len(pack_text(key) + pack_value(value)) for key, value in metadata.items()) + sum(
        _INFO_BYTES + len(tensor.name) for tensor in model.tensors
    )


# What competes, and what it loses -------------------------------------------------------------------------------------


def _make_groups(
    model: SourceModel, sensitivity: Sensitivity | None, importance: Importance | None, has_rest: bool
) -> list[Group]:
    """The experts' tensors, and where `has_rest` and a table says what they are worth the other matrices."""
    by_name = {t.name: t for t in model.tensors if group_of(t.role, t.shape) != KEPT}
    experts = [name for name, tensor in by_name.items() if _is_routed(tensor)]
    if sensitivity is None:
        wanted = [((by_name[name],), float(by_name[name].num_weights)) for name in experts]
    else:
        sensitivity.check_names(experts, "this model")
        found = [
            (tuple(by_name[name] for name in unit.tensors if name in by_name), unit.slope) for unit in sensitivity.units
        ]
        wanted = [(tensors, slope) for tensors, slope in found if tensors and (has_rest or _is_routed(tensors[0]))]
    with ThreadPoolExecutor(usable_cores().num_usable) as pool:
        return list(pool.map(lambda each: _measure(each[0], each[1], importance), wanted))


def _is_routed(tensor: SourceTensor) -> bool:
    return group_of(tensor.role, tensor.shape) == EXPERTS


def _measure(tensors: tuple[SourceTensor, ...], slope: float, importance: Importance | None) -> Group:
    """Each type that one of them can have, with what all together lose in it. A tensor whose rows it does not fit keeps
    the next that does."""
    samples = [_Sample.of(tensor, importance) for tensor in tensors]
    has_importance = all(sample.has_importance for sample in samples)
    num_weights = sum(tensor.num_weights for tensor in tensors)
    names = _EXPERT_TYPES if _is_routed(tensors[0]) else _REST_TYPES
    options = []
    for wanted in _list_layouts(names, has_importance):
        layouts = [choose(tensor.role, tensor.shape, wanted).layout for tensor in tensors]
        if wanted not in layouts:
            continue
        lost = sum(
            sample.relative_error(layout) * sample.tensor.num_weights
            for sample, layout in zip(samples, layouts, strict=True)
        )
        size = sum(_num_bytes(tensor, layout) for tensor, layout in zip(tensors, layouts, strict=True))
        options.append(TypeOption(size, slope * lost / num_weights, wanted))
    return Group(tensors, tuple(options))


def _list_layouts(names: Sequence[str], has_importance: bool) -> Iterator[Layout]:
    """Of these types those that this machine encodes."""
    for name in names:
        try:
            yield find_layout(name, has_importance)
        except KimiLiteError:
            continue  # needs an importance matrix, or ggml's library


class _Sample(NamedTuple):
    """Rows of a tensor evenly over all its matrices, each (1, n) float32, with the importance of their columns."""

    tensor: SourceTensor
    rows: list[np.ndarray]
    weights: list[np.ndarray | None]

    @classmethod
    def of(cls, tensor: SourceTensor, importance: Importance | None) -> "_Sample":
        places = np.unique(np.linspace(0, tensor.num_weights // tensor.shape[-1] - 1, _SAMPLED_ROWS).astype(int))
        vectors = importance.find(tensor.name, tensor.shape) if importance else None
        read_rows = tensor.open_rows()
        rows = [read_rows(int(place), int(place) + 1) for place in places]
        return cls(tensor, rows, [None if vectors is None else vectors[place // tensor.shape[-2]] for place in places])

    @property
    def has_importance(self) -> bool:
        return self.weights[0] is not None

    def relative_error(self, layout: Layout) -> float:
        """Squares of the errors by squares of the weights; 0 where the source has this very type."""
        if layout.name in self.tensor.exact:
            return 0.0
        error = energy = 0.0
        for row, weight in zip(self.rows, self.weights, strict=True):
            scale = np.float32(1) if weight is None else weight
            error += float((scale * (dequantize(encode(layout, row, weight), layout.name) - row) ** 2).sum())
            energy += float((scale * row**2).sum())
        return error / energy if energy else 0.0


# What is said of it ---------------------------------------------------------------------------------------------------


def _chosen_lines(
    groups: Sequence[Group], chosen: Sequence[TypeOption], sensitivity: Sensitivity | None
) -> Iterator[str]:
    """The types of experts by part of the depth, those of the rest, and what the table predicts."""
    pairs = list(zip(groups, chosen, strict=True))
    layers = sorted({layer_of(group.tensors[0].role) for group, _ in pairs if group.is_routed})
    size = -(-len(layers) // _DEPTH_PARTS) if layers else 1
    for first in range(0, len(layers), size):
        part = layers[first : first + size]
        types = Counter(
            option.layout.name for group, option in pairs if group.is_routed and layer_of(group.tensors[0].role) in part
        )
        yield f"experts of layers {part[0]} to {part[-1]}: {_counted(types)}"
    if rest := Counter(option.layout.name for group, option in pairs if not group.is_routed):
        yield f"other matrices: {_counted(rest)}"
    if sensitivity is None:
        yield "no table of sensitivities is known for this model, so all weights count alike: --sensitivity names one"
    else:
        floor = f", and {sensitivity.floor:.3g} that any change costs" if sensitivity.floor else ""
        yield f"predicted KL divergence: {_predicted(chosen):.3g} nats, by what {sensitivity.label} showed{floor}"


def _predicted(chosen: Sequence[TypeOption]) -> float:
    return sum(option.loss for option in chosen)


def _counted(types: Counter[str]) -> str:
    order = sorted(types, key=lambda name: -BY_NAME[name].bits_per_weight)
    return ", ".join(f"{types[name]} {name}" for name in order)
