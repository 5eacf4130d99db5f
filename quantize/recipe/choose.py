"""Recipes that this machine can encode: by name, from a file, and with exceptions as users write them.

A file has a line for each rule, `REGEX=TYPE`, of which the first that a tensor's name matches counts, as in
`--tensor-type`; what none matches is Q8_0. Text behind `#` is for readers. `--write-recipe` writes one.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kimi_lite import files
from kimi_lite.arch.recipe import KEPT, Override, Recipe, exact_override, group_of, named_recipe
from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.codecs import find_layout
from kimi_lite.quantize.source.model import SourceModel


def uniform_recipe(type_name: str, has_importance: bool = False) -> Recipe:
    """One type for every matrix. Raises KimiLiteError."""
    layout = find_layout(type_name, has_importance)
    return Recipe(type_name.lower(), layout, layout)


def find_recipe(name: str, has_importance: bool = False) -> Recipe:
    """The recipe of a name, or of a file, which this machine can encode. Raises KimiLiteError."""
    if is_file_name(name):
        return read_recipe(Path(name).expanduser(), has_importance)
    recipe = named_recipe(name)
    if not recipe.is_lossless:
        find_layout(name, has_importance)
    return recipe


def is_file_name(name: str) -> bool:
    """Whether `--recipe` names a file: one that is there, or a name that only a file has."""
    path = Path(name).expanduser()
    return path.is_file() or len(path.parts) > 1 or path.suffix in (".recipe", ".txt", ".csv")


def read_recipe(path: Path, has_importance: bool = False) -> Recipe:
    """Raises KimiLiteError where the file is missing, has no rule or one that cannot be."""
    if not path.is_file():
        raise KimiLiteError(f"There is no file {path}.", "--recipe takes a type's name, or a file of REGEX=TYPE lines.")
    lines = [line.split("#")[0].strip() for line in files.read_text(path, "The recipe").splitlines()]
    texts = [line for line in lines if line]
    if not texts:
        raise KimiLiteError(f"{path} has no line of REGEX=TYPE.", "--write-recipe writes such a file.")
    try:
        return with_overrides(replace(uniform_recipe("q8_0"), name=path.stem), texts, has_importance)
    except KimiLiteError as error:
        raise KimiLiteError(f"{path}: {error.message}", error.hint) from error


def write_recipe(path: Path, model: SourceModel, recipe: Recipe) -> None:
    """The type of every tensor that the recipe chooses one for, as `read_recipe` reads it."""
    tensors = [tensor for tensor in model.tensors if group_of(tensor.role, tensor.shape) != KEPT]
    choices = ((tensor.name, recipe.choose(tensor.role, tensor.shape, tensor.name).layout) for tensor in tensors)
    with files.whole_file(path) as file:
        file.writelines(f"^{re.escape(name)}$={layout.name.lower()}\n" for name, layout in choices)


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
