"""Which type each tensor gets: a recipe for groups of tensors, exceptions by name, float32 where precision is nearly
free. `plan` estimates files by it that are yet to be made, `quantize` makes them.

A recipe named after a type gives that type to the routed experts, 99 % of a Kimi, and Q8_0 to everything that all
tokens pass; `--type` gives one type to all. The F32 list is llama.cpp's own (its converter and its quantizer never
touch these), so files made here and there agree.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from kimi_lite.arch.architecture import find_row
from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME, Layout

_FALLBACKS = ("Q8_0", "F16")  # tried in turn where a row is not a whole number of blocks
LOSSLESS = "q4_0-lossless"
OWN_TYPES = frozenset(  # quantize needs no ggml for them
    name for name, layout in BY_NAME.items() if layout.encoder not in ("ggml", "none")
)
EXPERTS, ATTENTION, OTHERS, KEPT = "routed experts", "attention", "shared+dense+embed", "norms+router"
GROUPS = (EXPERTS, ATTENTION, OTHERS, KEPT)


class TypeChoice(NamedTuple):
    layout: Layout
    reason: str = ""  # why it is not the type asked for; empty where it is, or where F32 is the rule


@dataclass(frozen=True, slots=True)
class Override:
    """Tensors whose name the pattern is found in get this type; the first that matches counts."""

    pattern: re.Pattern
    layout: Layout


@dataclass(frozen=True, slots=True)
class Recipe:
    """`experts` for the routed experts, `rest` for all other matrices; `overrides` before both. Where `is_lossless`,
    experts that the type would change are refused."""

    name: str
    experts: Layout
    rest: Layout
    overrides: tuple[Override, ...] = ()
    is_lossless: bool = False

    def choose(self, tensor: str, shape: tuple[int, ...], file_name: str = "") -> TypeChoice:
        """The type of a tensor by the name that the model's code uses and its shape (last axis is the row).
        `file_name`: what overrides look at, where the architecture's files call it otherwise."""
        group = group_of(tensor, shape)
        if group == KEPT:
            return choose(tensor, shape, self.rest)
        for override in self.overrides:
            if override.pattern.search(file_name or tensor):
                return choose(tensor, shape, override.layout)
        return choose(tensor, shape, self.experts if group == EXPERTS else self.rest)

    @property
    def layouts(self) -> set[Layout]:
        return {self.experts, self.rest, *(override.layout for override in self.overrides)}


def named_recipe(name: str) -> Recipe:
    """The recipe of a name: a type (`tq1_0`, `iq1_m`, `q2_k`, ...), or `q4_0-lossless`. Raises KimiLiteError."""
    if name.lower() == LOSSLESS:
        return Recipe(LOSSLESS, BY_NAME["Q4_0"], BY_NAME["BF16"], is_lossless=True)
    layout = BY_NAME.get(name.upper())
    if layout is None:
        names = sorted(type_name.lower() for type_name in BY_NAME)
        near = get_close_matches(re.sub(r"^ud-|_xl$", "", name.lower()), names, n=1)  # llama-quantize's Q4_K_M
        hint = f"Did you mean {near[0]}? " if near else ""
        raise KimiLiteError(
            f"There is no recipe {name!r}.",
            f"{hint}Recipes are {LOSSLESS}, or the experts' type: {', '.join(names)}.",
        )
    rest = layout if layout.bits_per_weight > BY_NAME["Q8_0"].bits_per_weight else BY_NAME["Q8_0"]
    return Recipe(name.lower(), layout, rest)


def exact_override(name: str, layout: Layout) -> Override:
    """An exception for the one tensor of this name."""
    return Override(re.compile(f"^{re.escape(name)}$"), layout)


def group_of(name: str, shape: tuple[int, ...]) -> str:
    """The group of a tensor, one of GROUPS: by its architecture's table, else (vision, next-token prediction) by its
    form."""
    row = find_row(name)
    if row is None:
        is_norm = len(shape) < 2 or name.endswith("norm.weight") or not name.endswith(".weight")
        return KEPT if is_norm else OTHERS
    if row.is_exact:
        return KEPT
    return {"routed": EXPERTS, "attention": ATTENTION}.get(row.part, OTHERS)


def choose(name: str, shape: tuple[int, ...], wanted: Layout) -> TypeChoice:
    """The type of tensor `name` with `shape` (last axis is the row) when `wanted` is asked for."""
    if group_of(name, shape) == KEPT:
        return TypeChoice(BY_NAME["F32"])
    row = shape[-1]
    if row % wanted.block_size == 0:
        return TypeChoice(wanted)
    for fallback in map(BY_NAME.__getitem__, _FALLBACKS):
        if row % fallback.block_size == 0:
            reason = (
                f"{name}: rows of {row} are not whole blocks of {wanted.block_size}, so {fallback.name} "
                f"and not {wanted.name}"
            )
            return TypeChoice(fallback, reason)
    raise AssertionError((name, shape, wanted.name))
