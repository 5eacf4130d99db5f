"""Writes Kimi K2.5 at its real size without its weights, from the tensor list of a real file: the data are holes that
take no place on the disk (a sparse file: 314 GiB in 8 MiB).

    python -m tools.make.skeleton q2_K.tsv skeleton.gguf --split-size 50G
    python -m tools.make.skeleton iq1_m.tsv small.gguf --nearest --layers 5

What depends on a model's size and not on its words can be tried with it: headers, plan, doctor, tables, start-up time,
memory of the program, the disk tier's first token. Norms are one and the routers' biases random, so that numbers stay
finite and every layer chooses experts of its own; every other weight is zero bytes.

A list has a line for each tensor: name, shape (innermost axis first, as ggml writes it), type, bytes; tabs between.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

import numpy as np
import typer
from rich.console import Console

from kimi_lite.arch.architecture import layer_of
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import K2_5, slice_of
from kimi_lite.arch.tensors import tensor_shapes
from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.quantize.source.metadata import model_metadata
from kimi_lite.quantize.source.model import RowReader
from kimi_lite.quantize.write.sharding import Shard, plan_shards, shard_metadata
from kimi_lite.quantize.write.writer import Tensor, check_folder, check_replaceable, padded_bytes, write_header
from kimi_lite.tools.make.slice_tokenizer import slice_tokenizer
from kimi_lite.units import gib, parse_size

_BIAS_SPREAD = 0.1  # of the routers' selection biases


class ListedTensor(NamedTuple):
    name: str
    shape: tuple[int, ...]  # numpy order: the last axis is the row
    layout: Layout

    @property
    def num_bytes(self) -> int:
        return prod(self.shape[:-1]) * self.layout.row_bytes(self.shape[-1])


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What was written."""

    shards: tuple[Path, ...]
    num_bytes: int  # as the files say
    disk_bytes: int  # that they take
    num_tensors: int


def read_tensor_list(path: Path, takes_nearest: bool = False) -> tuple[list[ListedTensor], dict[str, str]]:
    """The tensors of a list, and which types were replaced. `takes_nearest`: a type that kimi-lite does not read
    becomes the one whose rows are nearest in bytes. Raises KimiLiteError for such a type otherwise, and for a line that
    is none."""
    found, replaced = [], {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], start=2):
        try:
            name, dims, type_name, num_bytes = line.split("\t")
            shape = tuple(int(size) for size in dims.split(",") if size)[::-1]
            row_bytes = int(num_bytes) / prod(shape[:-1])
        except ValueError:
            raise KimiLiteError(
                f"{path}, line {number}: {line[:60]!r} is not name, shape, type and bytes.",
                "Lists are tab-separated, with a line of titles; see python -m tools.make.skeleton --help.",
            ) from None
        layout = BY_NAME.get(type_name.upper())
        if layout is None:
            if not takes_nearest:
                raise KimiLiteError(
                    f"{path}, line {number}: kimi-lite does not read the type {type_name} of {name}.",
                    "Add --nearest to write the type of the nearest size instead.",
                )
            layout = _nearest(shape[-1], row_bytes)
            replaced[type_name] = layout.name
        found.append(ListedTensor(name, shape, layout))
    return found, replaced


def _nearest(row: int, row_bytes: float) -> Layout:
    fitting = [layout for layout in BY_NAME.values() if row % layout.block_size == 0]
    return min(fitting, key=lambda layout: abs(layout.row_bytes(row) - row_bytes))


def make_skeleton(
    path: Path,
    tensors: Sequence[ListedTensor],
    max_shard_bytes: int | None = None,
    num_layers: int | None = None,
    is_overwriting: bool = False,
) -> Skeleton:
    """Writes the file, or its shards of at most `max_shard_bytes`. `num_layers`: how many of the list's layers to keep,
    from the first on. Raises KimiLiteError where the list is not of Kimi K2.5, or a file cannot be written."""
    kept = [tensor for tensor in tensors if num_layers is None or layer_of(tensor.name) < num_layers]
    config = _config_of(kept)
    largest = max(kept, key=lambda tensor: tensor.num_bytes).layout
    metadata = model_metadata(config, largest) | slice_tokenizer(config.vocab_size)
    described = [Tensor(tensor.name, tensor.shape, tensor.layout, _no_rows, is_encoded=True) for tensor in kept]
    shards = plan_shards(path, described, max_shard_bytes or sys.maxsize)
    for shard in shards:
        check_replaceable(shard.path, is_overwriting)
    check_folder(path)
    for number, shard in enumerate(shards):
        with write_header(shard.partial, shard_metadata(metadata, shards, number), shard.tensors) as file:
            _write_data(file, shard)
        shard.partial.replace(shard.path)
    stats = [shard.path.stat() for shard in shards]
    return Skeleton(
        shards=tuple(shard.path for shard in shards),
        num_bytes=sum(stat.st_size for stat in stats),
        disk_bytes=sum(stat.st_blocks * 512 for stat in stats),
        num_tensors=len(kept),
    )


def _config_of(tensors: Sequence[ListedTensor]) -> ModelConfig:
    """Kimi K2.5 with as many layers, experts and tokens as the list has. Raises KimiLiteError where any other size
    differs."""
    have = {tensor.name: tensor.shape for tensor in tensors}
    layers = {layer_of(name) for name in have} - {-1}
    routed = [shape for name, shape in have.items() if name.endswith("ffn_down_exps.weight")]
    num_experts = routed[0][0] if routed else K2_5.num_experts
    vocab_size = have.get("token_embd.weight", (K2_5.vocab_size,))[0]
    config = slice_of(K2_5, len(layers) - len(routed), len(routed), num_experts, vocab_size)
    shapes = tensor_shapes(config, have)
    wrong = [name for name, shape in shapes.items() if have.get(name) != shape]
    if wrong:
        raise KimiLiteError(
            f"The list is not Kimi K2.5's: {wrong[0]} is {have.get(wrong[0], 'missing')}, K2.5 has {shapes[wrong[0]]}"
            f"{f'; {len(wrong) - 1} more' if len(wrong) > 1 else ''}.",
            "Take the list of a K2.5 file.",
        )
    return replace(config, name=f"{K2_5.name}, skeleton of {config.num_layers} layers")


def _write_data(file: BinaryIO, shard: Shard) -> None:
    """Norms and biases; the rest is left out, so that the system reads zeros there."""
    for tensor in shard.tensors:
        start = file.tell()
        if tensor.name.endswith("norm.weight"):
            file.write(np.ones(tensor.num_weights, np.float32).tobytes())
        elif tensor.name.endswith(".bias"):
            rng = np.random.default_rng(layer_of(tensor.name))
            file.write((_BIAS_SPREAD * rng.standard_normal(tensor.num_weights)).astype(np.float32).tobytes())
        file.seek(start + padded_bytes(tensor))
    file.truncate(file.tell())


def _no_rows() -> RowReader:
    raise AssertionError("a skeleton has no weights")


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    tensor_list: Annotated[Path, typer.Argument(help="Tab-separated: name, shape, type, bytes of each tensor.")],
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    split_size: Annotated[str, typer.Option(help="Largest shard, such as 50G (10^9 bytes). Default: one file.")] = "",
    layers: Annotated[int | None, typer.Option(help="The first layers of the list. Default: all.", min=1)] = None,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="Replace types that kimi-lite does not read by the nearest in size.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a GGUF of Kimi K2.5's real size without its weights, as a sparse file."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        tensors, replaced = read_tensor_list(tensor_list, nearest)
        split_bytes = parse_size(split_size, "--split-size", is_decimal=True) if split_size else None
        made = make_skeleton(out, tensors, split_bytes, layers, force)
    except KimiLiteError as error:
        console.print(f"Error: {error}")
        sys.exit(2)
    for old, new in replaced.items():
        console.print(f"{old} is not read by kimi-lite; written as {new}")
    shards = f" in {len(made.shards)} shards" if len(made.shards) > 1 else ""
    size = f"{gib(made.num_bytes)}, {made.disk_bytes / 2**20:.1f} MiB of the disk"
    console.print(f"{made.shards[0]}: {made.num_tensors:,} tensors{shards}, {size}")


if __name__ == "__main__":
    app()
