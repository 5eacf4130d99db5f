"""Recipes that this machine can encode, and exceptions by name as users write them."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from kimi_lite.arch.recipe import Override, Recipe, exact_override, named_recipe
from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.codecs import find_layout
from kimi_lite.quantize.source.model import SourceModel


def uniform_recipe(type_name: str, has_importance: bool = False) -> Recipe:
    """One type for every matrix. Raises KimiLiteError."""
    layout = find_layout(type_name, has_importance)
    return Recipe(type_name.lower(), layout, layout)


def find_recipe(name: str, has_importance: bool = False) -> Recipe:
    """The recipe of a name, which this machine can encode. Raises KimiLiteError."""
    recipe = named_recipe(name)
    if not recipe.is_lossless:
        find_layout(name, has_importance)
    return recipe


def kept_recipe(model: SourceModel) -> Recipe | None:
    """What keeps the codes of a checkpoint that is stored by codes, tensor by tensor, the rest Q8_0; None where it is
    stored by values."""
    kept = [tensor for tensor in model.tensors if tensor.codes]
    if not kept:
        return None
    main = Counter(tensor.codes for tensor in kept).most_common(1)[0][0]
    others = tuple(exact_override(each.name, BY_NAME[each.codes]) for each in kept if each.codes != main)
    return Recipe(f"{main.lower()}, as the source has it", BY_NAME[main], BY_NAME["Q8_0"], others)


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
