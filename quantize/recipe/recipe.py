"""Which type each tensor gets: a recipe for groups of tensors, exceptions by name, float32 where precision is nearly
free.

A recipe named after a type gives that type to the routed experts, 99 % of a Kimi, and Q8_0 to everything that all
tokens pass; `--type` gives one type to all. The F32 list is llama.cpp's own (its converter and its quantizer never
touch these), so files made here and there agree.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.quantize.codecs import find_layout

_FALLBACKS = ("Q8_0", "F16")  # tried in turn where a row is not a whole number of blocks
LOSSLESS = "q4_0-lossless"
EXPERTS, ATTENTION, OTHERS, KEPT = "routed experts", "attention", "shared+dense+embed", "norms+router"
GROUPS = (EXPERTS, ATTENTION, OTHERS, KEPT)


class Choice(NamedTuple):
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

    def choose(self, tensor: str, shape: tuple[int, ...]) -> Choice:
        """The type of the tensor with this GGUF name and shape (last axis is the row)."""
        group = group_of(tensor, shape)
        if group == KEPT:
            return choose(tensor, shape, self.rest)
        for override in self.overrides:
            if override.pattern.search(tensor):
                return choose(tensor, shape, override.layout)
        return choose(tensor, shape, self.experts if group == EXPERTS else self.rest)

    @property
    def layouts(self) -> set[Layout]:
        return {self.experts, self.rest, *(override.layout for override in self.overrides)}


def uniform_recipe(type_name: str, has_importance: bool = False) -> Recipe:
    """One type for every matrix."""
    layout = find_layout(type_name, has_importance)
    return Recipe(type_name.lower(), layout, layout)


def find_recipe(name: str, has_importance: bool = False) -> Recipe:
    """The recipe of a name, which this machine can encode. Raises KimiLiteError."""
    recipe = named_recipe(name)
    if not recipe.is_lossless:
        find_layout(name, has_importance)
    return recipe


def named_recipe(name: str) -> Recipe:
    """The recipe of a name: a type (`tq1_0`, `iq1_m`, `q2_k`, ...), or `q4_0-lossless`. Raises KimiLiteError."""
    if name.lower() == LOSSLESS:
        return Recipe(LOSSLESS, BY_NAME["Q4_0"], BY_NAME["BF16"], is_lossless=True)
    layout = BY_NAME.get(name.upper())
    if layout is None:
        known = ", ".join(sorted(type_name.lower() for type_name in BY_NAME))
        raise KimiLiteError(f"There is no recipe {name!r}.", f"Recipes are {LOSSLESS}, or the experts' type: {known}.")
    rest = layout if layout.bits_per_weight > BY_NAME["Q8_0"].bits_per_weight else BY_NAME["Q8_0"]
    return Recipe(name.lower(), layout, rest)


def with_overrides(recipe: Recipe, texts: Sequence[str], has_importance: bool = False) -> Recipe:
    """The recipe with exceptions written `REGEX=TYPE`. Raises KimiLiteError."""
    return replace(recipe, overrides=tuple(_parse_override(text, has_importance) for text in texts) + recipe.overrides)


def _parse_override(text: str, has_importance: bool) -> Override:
    pattern, equals, type_name = text.rpartition("=")
    if not (equals and pattern and type_name):
        raise KimiLiteError(f"{text!r} is not REGEX=TYPE.", "For example: --tensor-type 'ffn_down_exps=q3_k'.")
    try:
        return Override(re.compile(pattern), find_layout(type_name, has_importance))
    except re.error as error:
        raise KimiLiteError(f"{pattern!r} is not a regular expression: {error}.", "Python's rules count.") from error


def exact_override(name: str, layout: Layout) -> Override:
    """An exception for the one tensor of this name."""
    return Override(re.compile(f"^{re.escape(name)}$"), layout)


def group_of(name: str, shape: tuple[int, ...]) -> str:
    """The group of a tensor, one of GROUPS."""
    is_norm_or_router = name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
    if len(shape) < 2 or is_norm_or_router or not name.endswith(".weight"):
        return KEPT
    if name.endswith("_exps.weight"):
        return EXPERTS
    return ATTENTION if ".attn_" in name else OTHERS


def choose(name: str, shape: tuple[int, ...], wanted: Layout) -> Choice:
    """The type of tensor `name` (GGUF name) with `shape` (last axis is the row) when `wanted` is asked for."""
    if group_of(name, shape) == KEPT:
        return Choice(BY_NAME["F32"])
    row = shape[-1]
    if row % wanted.block_size == 0:
        return Choice(wanted)
    for fallback in map(BY_NAME.__getitem__, _FALLBACKS):
        if row % fallback.block_size == 0:
            reason = (
                f"{name}: rows of {row} are not whole blocks of {wanted.block_size}, so {fallback.name} "
                f"and not {wanted.name}"
            )
            return Choice(fallback, reason)
    raise AssertionError((name, shape, wanted.name))
