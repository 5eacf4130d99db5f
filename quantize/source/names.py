"""Which weights of a checkpoint make which GGUF tensor, by the architecture's table.

A GGUF tensor is made of parts of one or many checkpoint tensors: `attn_k_b` and `attn_v_b` are the two halves of
`kv_b_proj` for each head, and the experts of a layer are stacked. `list_sources` says which; `source.hf_model` reads
them.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from kimi_lite.arch.architecture import Row
from kimi_lite.arch.config import ModelConfig

VISION_PREFIXES = ("vision_tower.", "vision_model.", "visual.", "mm_projector.", "multi_modal_projector.")
_WRAPPERS = re.compile(r"^(?:(?:model|language_model|text_model|module)\.)+")
_LAYER = "model.layers.{layer}."


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of one checkpoint weight (rows counted over all axes but the last); `is_transposed` turns them
    round."""

    weight: str
    start: int
    stop: int
    is_transposed: bool = False


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A tensor of the model, the shape it must have, and the parts it is made of, each giving the same number of
    rows."""

    name: str  # as the model's code calls it
    row: Row
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def canonical_name(name: str) -> str | None:
    """The name as a bare text model has it, `model.layers.N...`; None for vision tensors. K2.5 writes
    `language_model.model.layers.N`, exports `language_model.layers.N` or `model.language_model.layers.N`."""
    bare = _WRAPPERS.sub("", name)
    if bare.startswith(VISION_PREFIXES):
        return None
    return f"model.{bare}" if bare.startswith(("layers.", "embed_tokens.", "norm.")) else bare


def layer_number(name: str) -> int:
    """The layer of a canonical name, or -1 outside the layers."""
    match = re.match(r"model\.layers\.(\d{1,6})\.", name, re.ASCII)
    return int(match[1]) if match else -1


def file_order(name: str) -> int:
    """Where a GGUF tensor comes in the order in which a model runs: the embedding, layer after layer, the rest."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else (-1 if name == "token_embd.weight" else 1 << 30)


def list_sources(config: ModelConfig, names: Collection[str], is_tied: bool = False) -> Iterator[TensorSource]:
    """Every tensor of the GGUF file in its order. `names` are the checkpoint's canonical names; a source may ask for
    one that is not there, which the caller reports. `is_tied`: the head is the embedding where it has no weight."""
    rows = [row for row in config.table.conversion_rows if row.applies(config) or row.is_optional]
    outer = {row.part: row for row in rows if row.layers == "none"}
    embedding, head = outer["embedding"], outer["head"]
    yield _outer(config, embedding, embedding.weight)
    for layer in range(config.num_layers):
        for row in rows:
            if row.is_in_layer(config, layer):
                source = _in_layer(config, row, layer, names)
                if not row.is_optional or source.parts[0].weight in names:
                    yield source
    for row in rows:
        if row.layers == "none" and row not in (embedding, head):
            yield _outer(config, row, row.weight)
    yield _outer(config, head, embedding.weight if is_tied and head.weight not in names else head.weight)


def _outer(config: ModelConfig, row: Row, weight: str) -> TensorSource:
    shape = row.shape_in(config)
    return TensorSource(row.name, row, shape, _whole(weight, shape))


def _in_layer(config: ModelConfig, row: Row, layer: int, names: Collection[str]) -> TensorSource:
    stem, shape = _LAYER.format(layer=layer), row.shape_in(config)
    if row.cut == "whole":
        parts = _whole(stem + row.weight, shape)
    elif row.cut == "experts":
        parts = _experts(row, stem, shape, names)
    else:
        parts = _halves(config, row, stem + row.weight)
    return TensorSource(f"blk.{layer}.{row.name}", row, shape, parts)


def _whole(weight: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    return (Part(weight, 0, shape[0] if len(shape) > 1 else 1),)


def _halves(config: ModelConfig, row: Row, weight: str) -> tuple[Part, ...]:
    """`kv_b_proj` has for each head its nope key rows, then its value rows. llama.cpp keeps the keys transposed."""
    nope, stride = config.qk_nope_head_dim, config.kv_head_dim
    starts = range(0, config.num_heads * stride, stride)
    if row.cut == "keys":
        return tuple(Part(weight, start, start + nope, is_transposed=True) for start in starts)
    return tuple(Part(weight, start + nope, start + stride) for start in starts)


def _experts(row: Row, stem: str, shape: tuple[int, ...], names: Collection[str]) -> tuple[Part, ...]:
    """The experts of a layer one after another; from a weight for each, or from transformers' own stacked tensors,
    where an expert's gate rows come before its up rows."""
    num, rows, _ = shape
    if row.stacked and stem + row.stacked[0] in names:
        weight, index, count = row.stacked
        stride, first = count * rows, index * rows
        return tuple(Part(stem + weight, first + stride * e, first + stride * e + rows) for e in range(num))
    return tuple(Part(stem + row.weight.format(expert=e), 0, rows) for e in range(num))
