"""`--mmproj TYPE`: the vision tower and projector of K2.5, K2.6 and Kimi-VL as the file that llama.cpp calls mmproj.

MoonViT's weights keep their values; names, shapes and metadata become those of llama.cpp's `clip` architecture, by the
table in `arch.moonvit`. In each head of queries and keys the pairs that turn by columns of the image come before those
that turn by rows; the checkpoint has them in turns. Matrices get the type asked for; norms, biases, the patch filter
and the positions stay float32. Tests let llama.cpp's own vision code run both files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kimi_lite.arch.moonvit import (
    HINT,
    PATCH,
    POSITIONS,
    Change,
    MoonViT,
    VisionTensor,
    metadata_of,
    read_checkpoint_tower,
    tensors_of,
)
from kimi_lite.arch.recipe import choose
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import text
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.quantize.codecs import find_layout
from kimi_lite.quantize.source.files import FileState, check_outputs
from kimi_lite.quantize.source.metadata import quantization_metadata
from kimi_lite.quantize.source.names import VISION_PREFIXES
from kimi_lite.quantize.source.shards import RawTensor, find_raw_tensors
from kimi_lite.quantize.source.stored import make_weight
from kimi_lite.quantize.write.writer import OnProgress, Tensor, write_gguf
from kimi_lite.units import gib

_TYPES = ("F32", "F16", "BF16", "Q8_0")
_THIRDS = ("query", "key", "value")


@dataclass(frozen=True, slots=True)
class MmprojReport:
    path: Path
    num_bytes: int
    num_weights: int
    notes: tuple[str, ...]

    @property
    def summary(self) -> str:
        return (
            f"{self.path}: vision tower and projector, {gib(self.num_bytes)}, {self.num_weights / 1e6:,.1f} M weights"
        )


def check_mmproj(folder: Path, tower: MoonViT) -> tuple[list[VisionTensor], dict[str, RawTensor]]:
    """What is to be written and from what. Raises KimiLiteError where the folder's tensors are not those of the
    tower."""
    raw = {
        _bare(name): tensor
        for name, tensor in find_raw_tensors(folder).items()
        if _bare(name).startswith(VISION_PREFIXES)
    }
    if not raw:
        raise KimiLiteError(f"{folder} has no vision tower.", HINT)
    parts = list(tensors_of(tower))
    _check(folder, parts, raw, tower)
    return parts, raw


def mmproj_path(path: Path) -> Path:
    """In the folder of the model NAME.gguf: mmproj-NAME.gguf, where llama.cpp looks for it."""
    return path.with_name(f"mmproj-{path.name}")


def write_mmproj(
    folder: Path, path: Path, type_name: str, on_progress: OnProgress | None = None, is_overwriting: bool = False
) -> MmprojReport:
    """Raises KimiLiteError before anything is written where the folder has no vision tower, or another one than
    config.json says."""
    layout, (tower, config) = find_mmproj_layout(type_name), read_checkpoint_tower(folder)
    parts, raw = check_mmproj(folder, tower)
    choices = {part.name: choose_type(part, layout) for part in parts}
    tensors = [
        Tensor(part.name, part.shape, choices[part.name][0], partial(_open_rows, part, raw, tower.heads))
        for part in parts
    ]
    name = str(config.get("_name_or_path") or folder.resolve().name)
    metadata = metadata_of(tower) | {"general.name": text(name), **quantization_metadata(layout)}
    files = {tensor.file for tensor in raw.values()} | {folder / "config.json"}
    check_outputs([path], files)
    states = [FileState.of(file) for file in files]
    num_bytes = write_gguf(path, metadata, tensors, on_progress, is_overwriting, states)
    notes = tuple(dict.fromkeys(note for _, note in choices.values() if note))
    return MmprojReport(path, num_bytes, sum(tensor.num_weights for tensor in tensors), notes)


def find_mmproj_layout(type_name: str) -> Layout:
    """Raises KimiLiteError for a type that llama.cpp's vision code cannot multiply or that would cost a small model
    much."""
    if type_name.upper() not in _TYPES:
        raise KimiLiteError(f"--mmproj is {type_name!r}.", f"Choose one of {', '.join(_TYPES).lower()}.")
    return find_layout(type_name)


def _bare(name: str) -> str:
    """As the vendor's checkpoint calls it; what transformers saves has the patch filter inside the encoder."""
    bare = name.removeprefix("model.")
    return bare.replace("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed.", 1)


def split_axes(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """wqkv (3 D, k): of each head of queries and keys, whose pairs belong to x and y in turns, the x pairs first.
    Scores are the same, and llama.cpp turns halves."""
    queries_keys, values = rows[: len(rows) // 3 * 2], rows[len(rows) // 3 * 2 :]
    pairs = queries_keys.reshape(2, num_heads, -1, 2, 2, rows.shape[1])  # (q | k, head, pair, axis, of a pair, k)
    return np.concatenate([pairs.swapaxes(2, 3).reshape(queries_keys.shape), values])


def _changed(rows: np.ndarray, change: Change, num_heads: int) -> np.ndarray:
    """The checkpoint's rows as the file has them; of wqkv whole, or a third of it."""
    if not change:
        return rows
    split = split_axes(rows, num_heads)
    return np.split(split, 3)[_THIRDS.index(change)] if change in _THIRDS else split


def _check(folder: Path, parts: list[VisionTensor], raw: Mapping[str, RawTensor], tower: MoonViT) -> None:
    """Every tensor that is needed is there and as large as config.json says, and none is left over."""
    needed: dict[str, int] = {}
    for part in parts:
        needed[part.source] = needed.get(part.source, 0) + int(np.prod(part.shape))
    for name, num_weights in needed.items():
        if name not in raw:
            raise KimiLiteError(f"{folder} has no {name}.", "Download the shards with the vision tower too.")
        have = int(np.prod(raw[name].shape))
        if have != num_weights:
            raise KimiLiteError(
                f"{name}: need {num_weights:,} values by config.json, have {list(raw[name].shape)}.", HINT
            )
    unknown = sorted(set(raw) - set(needed))
    if unknown:
        some = ", ".join(unknown[:3])
        raise KimiLiteError(f"{folder} has {len(unknown)} vision tensors that {tower.projector} lacks: {some}.", HINT)


def choose_type(part: VisionTensor, wanted: Layout) -> tuple[Layout, str]:
    """The type of a tensor, and a note where it is not the one asked for."""
    if part.name in (PATCH, POSITIONS):
        return BY_NAME["F32"], ""
    choice = choose(part.name, part.shape, wanted)
    note = (
        f"mmproj: rows of {part.shape[-1]} are not whole blocks of {wanted.name}: {choice.layout.name}"
        if choice.reason
        else ""
    )
    return choice.layout, note


def _open_rows(part: VisionTensor, raw: Mapping[str, RawTensor], num_heads: int) -> Callable[[int, int], np.ndarray]:
    """A tensor is at most some megabytes: it is read whole."""
    weight = make_weight(part.source, raw, (1, 1))
    num_rows = int(np.prod(weight.shape[:-1]))
    rows = weight.read_rows(0, num_rows)
    if len(weight.shape) == 1:
        rows = _changed(rows.reshape(-1, 1), part.change, num_heads).reshape(1, -1)
    else:
        rows = _changed(rows, part.change, num_heads).reshape(-1, part.shape[-1])
    return lambda start, stop: np.ascontiguousarray(rows[start:stop])
