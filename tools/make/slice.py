"""Writes a GGUF file with Kimi K2.5's dimensions, a few of its layers, and random but valid weights of any types, in
seconds.

    python -m tools.make.slice slice.gguf --layers 1+2 --experts tq1_0 --attention q8_0 --experts-gate iq1_m
    python -m tools.make.slice small.gguf --num-experts 32 --type 'blk.2.ffn_*_exps=q2_k'

One such layer costs what one of the 60 real layers costs, so speed, memory and loading can be measured without the
trillion weights. The weights have mean 0 and standard deviation 1 / sqrt(inputs), so logits stay finite; the words are
noise. Each tensor is one random tile of a few megabytes, repeated from changing offsets. llama.cpp loads the file too.
"""

import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import K2_5, slice_of
from kimi_lite.arch.recipe import choose
from kimi_lite.arch.tensors import tensor_shapes
from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.native.types.random_blocks import random_rows
from kimi_lite.quantize.source.metadata import model_metadata
from kimi_lite.quantize.source.model import RowReader
from kimi_lite.quantize.write.writer import Tensor, write_gguf
from kimi_lite.tools.make.slice_tokenizer import slice_tokenizer

_TILE_BYTES = 4 << 20
_LITE_LAYERS = (26, 27)  # llama.cpp takes a deepseek2 file of so many layers for another model, without attn_q_a
_SMALL_SPREAD = 0.1  # of norms around 1, and of the router's selection bias


@dataclass(frozen=True, slots=True)
class SliceReport:
    num_bytes: int
    tensors_by_type: Mapping[str, int]
    notes: tuple[str, ...]  # tensors that could not have the type asked for
    seconds: float


def make_slice(
    path: Path, config: ModelConfig, types: Mapping[str, str], seed: int = 0, is_overwriting: bool = False
) -> SliceReport:
    """Writes the file. `types`: patterns of tensor names without ".weight", such as "blk.*.attn_*", to types; the last
    match counts, and a tensor without one is Q8_0. Raises KimiLiteError."""
    start_s = time.perf_counter()
    if config.num_layers in _LITE_LAYERS:
        raise KimiLiteError(
            f"llama.cpp takes a model of {config.num_layers} layers for a DeepSeek Lite.", "Ask for one layer more."
        )
    layouts = {pattern: _find_layout(type_name) for pattern, type_name in types.items()}
    shapes = tensor_shapes(config)
    choices = {name: choose(name, shape, _match(name, layouts)) for name, shape in shapes.items()}
    tensors = [Tensor(name, shapes[name], choice.layout, _opener(name, shapes[name], choice.layout, seed), True)
               for name, choice in choices.items()]  # fmt: skip
    metadata = model_metadata(config, _match(f"blk.{config.num_layers - 1}.ffn_up_exps.weight", layouts))
    num_bytes = write_gguf(path, metadata | slice_tokenizer(config.vocab_size), tensors, is_overwriting=is_overwriting)
    by_type = Counter(choice.layout.name for choice in choices.values())
    notes = tuple(choice.reason for choice in choices.values() if choice.reason)
    return SliceReport(num_bytes, by_type, notes, time.perf_counter() - start_s)


def _find_layout(type_name: str) -> Layout:
    if type_name.upper() not in BY_NAME:
        raise KimiLiteError(f"There is no type {type_name!r}.", f"Choose from {', '.join(BY_NAME).lower()}.")
    return BY_NAME[type_name.upper()]


def _match(name: str, layouts: Mapping[str, Layout]) -> Layout:
    matches = [layout for pattern, layout in layouts.items() if fnmatchcase(name.removesuffix(".weight"), pattern)]
    return matches[-1] if matches else BY_NAME["Q8_0"]


def _opener(name: str, shape: tuple[int, ...], layout: Layout, seed: int) -> Callable[[], RowReader]:
    """The tensor's rows, made when its turn comes."""

    def open_rows() -> RowReader:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        num_rows = prod(shape[:-1])
        tile = _make_tile(name, min(num_rows, _TILE_BYTES // layout.row_bytes(shape[-1])), shape[-1], layout, rng)

        def read_rows(start: int, stop: int) -> np.ndarray:
            if num_rows == len(tile):
                return tile[start:stop]
            offset = (start * 2654435761 >> 8) % (len(tile) - (stop - start))  # a hash: neighbours differ
            return tile[offset : offset + stop - start]

        return read_rows

    return open_rows


def _make_tile(name: str, num_rows: int, row_weights: int, layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """uint8 (rows, row_bytes)"""
    if name.endswith("_norm.weight") or name.endswith(".bias"):
        centre = 1 if name.endswith("_norm.weight") else 0
        values = centre + _SMALL_SPREAD * rng.standard_normal((num_rows, row_weights), np.float32)
        return values.astype(np.float32).view(np.uint8)
    spread = 1.0 if name == "token_embd.weight" else row_weights**-0.5
    return random_rows(layout, num_rows, row_weights, spread, rng)


def _parse_layers(layers: str) -> tuple[int, int]:
    dense, plus, expert = layers.partition("+")
    if not (plus and dense.isdecimal() and expert.isdecimal() and int(dense) + int(expert) > 0):
        raise KimiLiteError(f"--layers is {layers!r}.", "Write dense layers + expert layers, such as 1+2.")
    return int(dense), int(expert)


def _gather_types(
    experts: str,
    gate: str,
    up: str,
    down: str,
    attention: str,
    shared: str,
    dense: str,
    embedding: str,
    extra: list[str],
) -> dict[str, str]:
    """Patterns in order of precedence, from general to particular."""
    types = {"blk.*.attn_*": attention, "blk.*.ffn_*_shexp": shared, "token_embd": embedding, "output": embedding}
    types |= {f"blk.*.ffn_{part}": dense for part in ("gate", "up", "down")}
    types |= {f"blk.*.ffn_{part}_exps": own or experts for part, own in (("gate", gate), ("up", up), ("down", down))}
    for assignment in extra:
        pattern, is_assigned, type_name = assignment.partition("=")
        if not is_assigned:
            raise KimiLiteError(f"--type is {assignment!r}.", "Write PATTERN=TYPE, such as 'blk.2.ffn_*_exps=q2_k'.")
        types.pop(pattern, None)  # the same pattern again moves to the end
        types[pattern] = type_name
    return types


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    layers: Annotated[str, typer.Option(help="Dense layers + expert layers.")] = "1+2",
    experts: Annotated[str, typer.Option(help="Type of the routed experts.")] = "tq1_0",
    experts_gate: Annotated[
        str, typer.Option(help="Type of their gate; likewise up and down. Default: as --experts.")
    ] = "",
    experts_up: Annotated[str, typer.Option(hidden=True)] = "",
    experts_down: Annotated[str, typer.Option(hidden=True)] = "",
    attention: Annotated[str, typer.Option(help="Type of attention.")] = "q8_0",
    shared: Annotated[str, typer.Option(help="Type of the shared experts.")] = "q8_0",
    dense: Annotated[str, typer.Option(help="Type of the dense feed-forward layers.")] = "q8_0",
    embedding: Annotated[str, typer.Option(help="Type of token_embd and output.")] = "q8_0",
    type_: Annotated[
        list[str] | None, typer.Option("--type", help="PATTERN=TYPE for tensor names; the last match counts.")
    ] = None,
    num_experts: Annotated[int, typer.Option(help="Routed experts a layer; K2.5 has 384.", min=8)] = 384,
    vocab: Annotated[int, typer.Option(help="Tokens; K2.5 has 163840.")] = 32_768,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a GGUF with Kimi K2.5's dimensions and random weights."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        dense_layers, expert_layers = _parse_layers(layers)
        config = slice_of(K2_5, dense_layers, expert_layers, num_experts, vocab)
        parts = (experts, experts_gate, experts_up, experts_down, attention, shared, dense, embedding)
        report = make_slice(out, config, _gather_types(*parts, type_ or []), seed, force)
    except KimiLiteError as error:
        console.print(f"Error: {error}")
        sys.exit(2)
    for note in report.notes:
        console.print(f"note: {note}")
    types = ", ".join(f"{count} {name}" for name, count in report.tensors_by_type.items())
    rate = report.num_bytes / report.seconds / 1e9
    console.print(f"{out}: {report.num_bytes / 1e9:.3f} GB ({types}) in {report.seconds:.1f} s, {rate:.2f} GB/s")


if __name__ == "__main__":
    app()
