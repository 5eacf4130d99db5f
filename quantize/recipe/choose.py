"""Recipes that this machine can encode, and exceptions by name as users write them."""

import re
from collections.abc import Sequence
from dataclasses import replace

from kimi_lite.arch.recipe import Override, Recipe, named_recipe
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.codecs import find_layout


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
