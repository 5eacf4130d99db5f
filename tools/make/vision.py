"""Writes vision files: MoonViT of any size with random weights, in seconds.

    python -m tools.make.vision mmproj-k2.5.gguf --type q8_0       # Kimi K2.5's true size, what speed is measured on
    python -m tools.make.vision mmproj-vl.gguf --like kimi-vl --layers 2

Weights have mean 0 and standard deviation 1 / sqrt(inputs), norms are near 1, so every layer does something and nothing
overflows. What such a tower sees is noise (`tools.make.seeing` fits a projector that knows a few colours).
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from kimi_lite.arch.known import K2_5_TOWER, KIMI_VL_TOWER
from kimi_lite.arch.moonvit import POSITIONS, MoonViT, VisionTensor, metadata_of, tensors_of
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import text
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.mmproj import choose_type, find_mmproj_layout
from kimi_lite.quantize.source.metadata import quantization_metadata
from kimi_lite.quantize.write.writer import OnProgress, Tensor, write_gguf
from kimi_lite.units import gib

TOWERS = {"kimi-k2.5": K2_5_TOWER, "kimi-vl": KIMI_VL_TOWER}
_SMALL_SPREAD = 0.1  # of norms around 1, and of biases


def random_weights(tensor: VisionTensor, seed: int) -> np.ndarray:
    """float32, the same for the same tensor and seed."""
    rng = np.random.default_rng([seed, *tensor.name.encode()])
    noise = rng.standard_normal(tensor.shape, np.float32)
    if len(tensor.shape) == 1:
        is_gain = tensor.name.endswith(".weight")
        return noise * np.float32(_SMALL_SPREAD) + np.float32(is_gain)
    inputs = 4 if tensor.name == POSITIONS else np.prod(tensor.shape[1:])
    return noise * np.float32(inputs**-0.5)


def write_tower(
    path: Path,
    tower: MoonViT,
    type_name: str = "f16",
    weights: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    is_overwriting: bool = False,
    on_progress: OnProgress | None = None,
) -> int:
    """Writes the file; returns its bytes. weights: of tensors that are given, float32; all others are random. Raises
    KimiLiteError."""
    layout, given = find_mmproj_layout(type_name), weights or {}

    def rows_of(tensor: VisionTensor) -> Callable[[], Callable[[int, int], np.ndarray]]:
        def open_rows() -> Callable[[int, int], np.ndarray]:
            values = given[tensor.name] if tensor.name in given else random_weights(tensor, seed)
            assert values.shape == tensor.shape, (tensor.name, values.shape, tensor.shape)
            rows = np.ascontiguousarray(values, np.float32).reshape(-1, tensor.shape[-1])
            return lambda start, stop: rows[start:stop]

        return open_rows

    def type_of(tensor: VisionTensor) -> Layout:
        return choose_type(tensor, layout)[0]

    tensors = [Tensor(each.name, each.shape, type_of(each), rows_of(each)) for each in tensors_of(tower)]
    name = {"general.name": text(f"{tower.projector}-{tower.layers}-layers")}
    metadata = metadata_of(tower) | name | quantization_metadata(layout)
    return write_gguf(path, metadata, tensors, on_progress, is_overwriting)


def main(
    path: Annotated[Path, typer.Argument(help="The file to write.")],
    like: Annotated[str, typer.Option(help=f"Whose tower: {', '.join(TOWERS)}.")] = "kimi-k2.5",
    type_name: Annotated[str, typer.Option("--type", help="f16, bf16, q8_0 or f32.")] = "f16",
    layers: Annotated[int, typer.Option(help="Of its layers; 0: all.", min=0)] = 0,
    force: Annotated[bool, typer.Option(help="Write over a file that is there.")] = False,
) -> None:
    """A vision file of a tower's true size with random weights."""
    start_s = time.perf_counter()
    try:
        if like not in TOWERS:
            raise KimiLiteError(f"--like is {like!r}.", f"Choose one of {', '.join(TOWERS)}.")
        tower = replace(TOWERS[like], layers=layers or TOWERS[like].layers)
        num_bytes = write_tower(path, tower, type_name, is_overwriting=force)
    except KimiLiteError as error:
        sys.exit(str(error))
    print(f"{path}: {tower.num_weights / 1e6:,.0f} M weights, {gib(num_bytes)}, {time.perf_counter() - start_s:.1f} s")


if __name__ == "__main__":
    typer.run(main)
