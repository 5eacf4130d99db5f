"""Which tensors a model must have and in which shapes: checked against the file before any weight is read.

A header can be sound and still not fit its metadata (a damaged `embedding_length`, a file of another size): then the
kernels would read past their rows. And a file may hold tensors that change what its weights mean (scales, biases,
factors of rotary positions): what no code reads is refused by name, unless the architecture's table says why it may
stay.

    store, config = open_model(path)
"""

import re
from collections.abc import Collection, Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from kimi_lite.arch.architecture import Architecture, Row, layer_of, role_of
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.reader import Reader
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import quoted
from kimi_lite.gguf.store import GGUFStore

HEAD, EMBEDDING = "output.weight", "token_embd.weight"
Shapes = dict[str, tuple[int, ...]]  # tensor name -> numpy order, the last axis is the input


class OpenModel(NamedTuple):
    """A file whose header fits its metadata; its tensors have the names that the model's code uses."""

    store: GGUFStore
    config: ModelConfig


def open_model(path: str | PathLike[str]) -> OpenModel:
    """Maps a GGUF model and checks it before any weight is read. Raises KimiLiteError."""
    return checked_model(GGUFStore.open(Path(path)))


def checked_model(store: GGUFStore) -> OpenModel:
    """Raises KimiLiteError where the header does not fit its metadata."""
    config = ModelConfig.from_metadata(store.metadata, store.path.name)
    store = in_our_names(store, config.table)
    check_tensors(store, config)
    return OpenModel(store, config)


def in_our_names(store: GGUFStore, table: Architecture) -> GGUFStore:
    """The store with the names that the model's code uses, where the architecture has others in files."""
    ours = {row.file: row.name for row in table.rows if row.file}
    if not ours:
        return store
    roles = {name: role_of(name) for name in store.tensors}
    return store.renamed({name: name.removesuffix(role) + ours[role] for name, role in roles.items() if role in ours})


def file_name(name: str, table: Architecture) -> str:
    """What files of the architecture call the tensor that the model's code calls `name`."""
    role = role_of(name)
    row = table.by_name.get(role)
    return name.removesuffix(role) + row.file_name if row else name


def check_tensors(store: GGUFStore, config: ModelConfig) -> None:
    """Raise KimiLiteError if a tensor is missing, its shape is not what the metadata asks for, or it is one that no
    code reads."""
    shapes = tensor_shapes(config, store.tensors)
    for name, shape in shapes.items():
        have = store.tensor(name).shape
        if have != shape:
            problem = f"{store.path}: tensor {name} has shape {have}, and the metadata asks for {shape}"
            raise KimiLiteError(f"{problem}.", "The file is damaged or its metadata was edited: fetch it again.")
    num_blocks = Reader(store.metadata, f"{config.architecture}.", store.path.name).integer("block_count", 1, 1 << 20)
    unread = [
        name
        for name in store.tensors
        if name not in shapes and not why_unused(name, config, store.tensors, num_blocks - config.num_layers)
    ]
    if unread:
        raise _unread(store.path, unread)


def tensor_shapes(config: ModelConfig, names: Collection[str] | None = None) -> Shapes:
    """Every tensor that is needed, in the variant that `names` (those of the file) shows; without them, those that a
    conversion writes."""
    rows = [row for row in config.table.rows if row.applies(config) or row.is_optional]
    shapes: Shapes = {row.name: row.shape_in(config) for row in rows if row.layers == "none"}
    if names is not None and is_tied(names):
        del shapes[HEAD]
    for layer in range(config.num_layers):
        here = [row for row in rows if row.is_in_layer(config, layer)]
        for row in _variant(here, f"blk.{layer}.", config, names):
            shapes[f"blk.{layer}.{row.name}"] = row.shape_in(config)
    return shapes


def is_tied(names: Collection[str]) -> bool:
    """Whether a file with these tensors makes its logits with the embedding, as llama.cpp does for one that has no
    matrix of its own for that."""
    return HEAD not in names and EMBEDDING in names


def head_name(names: Collection[str]) -> str:
    """The matrix (vocabulary, hidden) that logits are made with, of a file with these tensors."""
    return EMBEDDING if is_tied(names) else HEAD


def _variant(rows: list[Row], prefix: str, config: ModelConfig, names: Collection[str] | None) -> Iterator[Row]:
    """The rows of a layer, of which some stand for others."""
    if names is None:
        yield from (row for row in rows if not row.replaces and row.applies(config))
        return
    joint = [row for row in rows if row.replaces and f"{prefix}{row.name}" in names
             and not all(f"{prefix}{other}" in names for other in row.replaces)]  # fmt: skip
    replaced = {name for row in joint for name in row.replaces}
    for row in rows:
        is_there = f"{prefix}{row.name}" in names
        is_wanted = row in joint if row.replaces else (is_there or not row.is_optional) and row.name not in replaced
        if is_wanted:
            yield row


def why_unused(name: str, config: ModelConfig, names: Collection[str], num_prediction_layers: int = 0) -> str:
    """Why a tensor may stay unread: empty where it may not."""
    role, layer = role_of(name), layer_of(name)
    if config.num_layers <= layer < config.num_layers + num_prediction_layers:
        return "next-token prediction is not used"
    row = config.table.by_name.get(role)
    if row and row.cut == "keys and values" and all(name.removesuffix(role) + other in names for other in row.replaces):
        return f"{' and '.join(row.replaces)} say the same"
    return next((why for pattern, why in config.table.unused.items() if re.fullmatch(pattern, name)), "")


def _unread(path: Path, names: list[str]) -> KimiLiteError:
    some = ", ".join(map(quoted, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    what = "it changes what the weights mean, or is of another model" if len(names) == 1 else (
        "they change what the weights mean, or are of another model"
    )  # fmt: skip
    problem = f"{path}: no code here reads {some}: {what}, so answers would be wrong"
    return KimiLiteError(f"{problem}.", "Get a plain GGUF of this model, or make one with kimi-lite quantize.")
