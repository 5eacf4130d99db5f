"""`--mmproj TYPE`: the vision tower and projector of K2.5, K2.6 and Kimi-VL as the file that llama.cpp calls mmproj.

MoonViT's weights keep their values; names, shapes and metadata become those of llama.cpp's `clip` architecture with
projector `kimik25` (queries, keys and values in one matrix, positions as a grid) or `kimivl` (three matrices, positions
as a list). In each head of queries and keys the pairs that turn by columns of the image come before those that turn by
rows; the checkpoint has them in turns. Matrices get the type asked for; norms, biases, the patch filter and the
positions stay float32. Tests let llama.cpp's own vision code run both files.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_lite.arch.checkpoint import inner_object, read_json_object
from kimi_lite.arch.reader import Reader, shown
from kimi_lite.arch.recipe import choose
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import Value, ValueType, boolean, f32, text, u32
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.quantize.codecs import find_layout
from kimi_lite.quantize.source.files import FileState, check_outputs
from kimi_lite.quantize.source.metadata import quantization_metadata
from kimi_lite.quantize.source.names import VISION_PREFIXES
from kimi_lite.quantize.source.shards import RawTensor, find_raw_tensors
from kimi_lite.quantize.source.stored import make_weight
from kimi_lite.quantize.write.writer import OnProgress, Tensor, write_gguf
from kimi_lite.units import gib

_HINT = "Kimi K2.5, K2.6 and Kimi-VL have a vision tower that this program knows."
_TYPES = ("F32", "F16", "BF16", "Q8_0")
_PROJECTORS = {"kimi_k25": "kimik25", "kimi_vl": "kimivl"}  # by config.json's model_type
_MAX_SIZE = 1 << 20  # far beyond what exists: more is damage
_MIN_PATCHES, _MAX_PATCHES = 8, 16384  # of an image, by the vendor's preprocessor
_ROPE_AXES = 2  # of an image: columns and rows
_FIELDS = {  # ours: the names that K2.5's, transformers' and Kimi-VL's config.json have
    "hidden": ("vt_hidden_size", "hidden_size"),
    "feed_forward": ("vt_intermediate_size", "intermediate_size"),
    "layers": ("vt_num_hidden_layers", "num_hidden_layers"),
    "heads": ("vt_num_attention_heads", "num_attention_heads"),
    "patch": ("patch_size",),
    "height": ("init_pos_emb_height", "pos_emb_height"),
    "width": ("init_pos_emb_width", "pos_emb_width"),
}
_BLOCK = {"norm0": "ln1", "norm1": "ln2", "wo": "attn_out", "mlp.fc0": "ffn_up", "mlp.fc1": "ffn_down"}


@dataclass(frozen=True, slots=True)
class Tower:
    """The vision tower's sizes; `text_hidden` is what the projector ends in."""

    projector: str  # kimik25 or kimivl
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    patch: int
    height: int
    width: int
    time: int
    merge: int
    eps: float
    text_hidden: int


class _Part(NamedTuple):
    """A GGUF tensor: its shape, the checkpoint's tensor, and what is done to that one's rows."""

    name: str
    shape: tuple[int, ...]
    source: str
    change: Callable[[np.ndarray], np.ndarray]


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


def check_mmproj(folder: Path, tower: Tower) -> tuple[list[_Part], dict[str, RawTensor]]:
    """What is to be written and from what. Raises KimiLiteError where the folder's tensors are not those of the
    tower."""
    raw = {
        _bare(name): tensor
        for name, tensor in find_raw_tensors(folder).items()
        if _bare(name).startswith(VISION_PREFIXES)
    }
    if not raw:
        raise KimiLiteError(f"{folder} has no vision tower.", _HINT)
    parts = list(_list_parts(tower))
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
    layout, (tower, config) = find_mmproj_layout(type_name), read_tower(folder)
    parts, raw = check_mmproj(folder, tower)
    choices = {part.name: _choose(part, layout) for part in parts}
    tensors = [Tensor(part.name, part.shape, choices[part.name][0], partial(_open_rows, part, raw)) for part in parts]
    metadata = _metadata(tower, config, str(config.get("_name_or_path") or folder.resolve().name), layout)
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


def read_tower(folder: Path) -> tuple[Tower, dict]:
    """The sizes by config.json, and its content. Raises KimiLiteError where it has none."""
    file = folder / "config.json"
    config = read_json_object(file, _HINT)
    vision = inner_object(config, "vision_config", str(file), _HINT)
    kind = config.get("model_type")
    projector = _PROJECTORS.get(kind) if isinstance(kind, str) else None
    read = Reader(vision, "", f"{file}, vision_config", _HINT, is_null_missing=True)
    names = {ours: next((name for name in theirs if read.has(name)), None) for ours, theirs in _FIELDS.items()}
    missing = [" or ".join(_FIELDS[ours]) for ours, name in names.items() if name is None]
    if projector is None or missing:
        what = f"lacks {', '.join(missing)} in vision_config" if projector else f"is of type {shown(kind)}"
        raise KimiLiteError(f"{file} {what}.", _HINT)
    sizes = {ours: read.integer(name, 1, _MAX_SIZE) for ours, name in names.items() if name}
    text_config = Reader(inner_object(config, "text_config", str(file), _HINT), "", str(file), _HINT, True)
    outer = Reader(config, "", str(file), _HINT, is_null_missing=True)
    tower = Tower(
        projector=projector,
        **sizes,
        time=read.integer(
            "init_pos_emb_time" if read.has("init_pos_emb_time") else "pos_emb_time", 1, _MAX_SIZE, default=1
        ),
        merge=_merge_size(read),
        eps=(read if read.has("projector_ln_eps") else outer).number(
            "projector_ln_eps" if read.has("projector_ln_eps") else "projection_layer_norm_eps", 0, 1, default=1e-5
        ),
        text_hidden=(text_config if text_config.has("hidden_size") else read).integer(
            "hidden_size" if text_config.has("hidden_size") else "text_hidden_size", 1, _MAX_SIZE
        ),
    )
    if tower.hidden % tower.heads or tower.hidden // tower.heads % (2 * _ROPE_AXES):
        raise KimiLiteError(
            f"{file}: {tower.hidden} does not divide into {tower.heads} heads with two axes of pairs.", _HINT
        )
    return tower, config


def _merge_size(read: Reader) -> int:
    """Patches along one side of what becomes one token: a number, or the same for both axes."""
    merge = read.value("merge_kernel_size", default=2)
    first = merge[0] if isinstance(merge, list) and len(merge) == 2 and merge[0] == merge[1] else merge
    if type(first) is not int or not 1 <= first <= 16:
        raise read.error("merge_kernel_size", merge, "a whole number from 1 to 16, or twice the same")
    return first


def _bare(name: str) -> str:
    return name.removeprefix("model.")


def _list_parts(tower: Tower) -> Iterator[_Part]:
    """All tensors of the file in order."""
    d, ff, patch = tower.hidden, tower.feed_forward, tower.patch
    merged = d * tower.merge**2
    grid = (tower.height, tower.width, d) if tower.projector == "kimik25" else (tower.height * tower.width, d)
    stem = "vision_tower."
    yield _keep("v.patch_embd.weight", (d, 3, patch, patch), f"{stem}patch_embed.proj.weight")
    yield _keep("v.patch_embd.bias", (d,), f"{stem}patch_embed.proj.bias")
    yield _keep("v.position_embd.weight", grid, f"{stem}patch_embed.pos_emb.weight")
    shapes = {"norm0": (d,), "norm1": (d,), "wo": (d, d), "mlp.fc0": (ff, d), "mlp.fc1": (d, ff)}
    for layer in range(tower.layers):
        for theirs, ours in _BLOCK.items():
            source, name = f"{stem}encoder.blocks.{layer}.{theirs}", f"v.blk.{layer}.{ours}"
            yield _keep(f"{name}.weight", shapes[theirs], f"{source}.weight")
            yield _keep(f"{name}.bias", shapes[theirs][:1], f"{source}.bias")
        yield from _list_qkv(tower, f"{stem}encoder.blocks.{layer}.wqkv", f"v.blk.{layer}.")
    yield from _pair("v.post_ln", (d,), f"{stem}encoder.final_layernorm")
    is_k25 = tower.projector == "kimik25"
    projector = "mm_projector." if is_k25 else "multi_modal_projector."
    first, second = ("proj.0", "proj.2") if is_k25 else ("linear_1", "linear_2")
    yield from _pair("mm.input_norm", (d,), f"{projector}pre_norm")
    yield from _pair("mm.1", (merged, merged), f"{projector}{first}")
    yield from _pair("mm.2", (tower.text_hidden, merged), f"{projector}{second}")


def _keep(name: str, shape: tuple[int, ...], source: str) -> _Part:
    return _Part(name, shape, source, lambda rows: rows)


def _pair(name: str, shape: tuple[int, ...], source: str) -> Iterator[_Part]:
    yield _keep(f"{name}.weight", shape, f"{source}.weight")
    yield _keep(f"{name}.bias", shape[:1], f"{source}.bias")


def _list_qkv(tower: Tower, source: str, block: str) -> Iterator[_Part]:
    d = tower.hidden
    for kind, row in (("weight", (d,)), ("bias", ())):
        if tower.projector == "kimik25":
            yield _Part(
                f"{block}attn_qkv.{kind}", (3 * d, *row), f"{source}.{kind}", partial(split_axes, num_heads=tower.heads)
            )
            continue
        for index, letter in enumerate("qkv"):
            change = partial(_split_third, num_heads=tower.heads, index=index)
            yield _Part(f"{block}attn_{letter}.{kind}", (d, *row), f"{source}.{kind}", change)


def split_axes(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """wqkv (3 D, k): of each head of queries and keys, whose pairs belong to x and y in turns, the x pairs first.
    Scores are the same, and llama.cpp turns halves."""
    queries_keys, values = rows[: len(rows) // 3 * 2], rows[len(rows) // 3 * 2 :]
    pairs = queries_keys.reshape(
        2, num_heads, -1, _ROPE_AXES, 2, rows.shape[1]
    )  # (q | k, head, pair, axis, of a pair, k)
    return np.concatenate([pairs.swapaxes(2, 3).reshape(queries_keys.shape), values])


def _split_third(rows: np.ndarray, num_heads: int, index: int) -> np.ndarray:
    return np.split(split_axes(rows, num_heads), 3)[index]


def _check(folder: Path, parts: list[_Part], raw: Mapping[str, RawTensor], tower: Tower) -> None:
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
                f"{name}: need {num_weights:,} values by config.json, have {list(raw[name].shape)}.", _HINT
            )
    unknown = sorted(set(raw) - set(needed))
    if unknown:
        some = ", ".join(unknown[:3])
        raise KimiLiteError(f"{folder} has {len(unknown)} vision tensors that {tower.projector} lacks: {some}.", _HINT)


def _choose(part: _Part, wanted: Layout) -> tuple[Layout, str]:
    """The type of a tensor, and a note where it is not the one asked for."""
    if part.name in ("v.patch_embd.weight", "v.position_embd.weight"):
        return BY_NAME["F32"], ""
    choice = choose(part.name, part.shape, wanted)
    note = (
        f"mmproj: rows of {part.shape[-1]} are not whole blocks of {wanted.name}: {choice.layout.name}"
        if choice.reason
        else ""
    )
    return choice.layout, note


def _open_rows(part: _Part, raw: Mapping[str, RawTensor]) -> Callable[[int, int], np.ndarray]:
    """A tensor is at most some megabytes: it is read whole."""
    weight = make_weight(part.source, raw, (1, 1))
    num_rows = int(np.prod(weight.shape[:-1]))
    rows = weight.read_rows(0, num_rows)
    if len(weight.shape) == 1:
        rows = part.change(rows.reshape(-1, 1)).reshape(1, -1)
    else:
        rows = part.change(rows).reshape(-1, part.shape[-1])
    return lambda start, stop: np.ascontiguousarray(rows[start:stop])


def _metadata(tower: Tower, config: Mapping, name: str, layout: Layout) -> dict[str, Value]:
    keys = {
        "general.architecture": text("clip"),
        "general.type": text("mmproj"),
        "general.name": text(name),
        **quantization_metadata(layout),
        "clip.has_vision_encoder": boolean(True),
        "clip.projector_type": text(tower.projector),
        "clip.use_gelu": boolean(True),
        "clip.vision.image_size": u32(tower.height * tower.patch),
        "clip.vision.patch_size": u32(tower.patch),
        "clip.vision.embedding_length": u32(tower.hidden),
        "clip.vision.feed_forward_length": u32(tower.feed_forward),
        "clip.vision.block_count": u32(tower.layers),
        "clip.vision.attention.head_count": u32(tower.heads),
        "clip.vision.attention.layer_norm_epsilon": f32(tower.eps),
        "clip.vision.projection_dim": u32(tower.text_hidden),
        "clip.vision.projector.scale_factor": u32(tower.merge),
        "clip.vision.image_mean": _floats([0.5] * 3),
        "clip.vision.image_std": _floats([0.5] * 3),
    }
    if tower.projector == "kimivl":
        return keys
    pixels = tower.patch**2
    return keys | {
        "clip.vision.image_min_pixels": u32(_MIN_PATCHES * pixels),
        "clip.vision.image_max_pixels": u32(_MAX_PATCHES * pixels),
        "vision.pos_emb_height": u32(tower.height),
        "vision.pos_emb_width": u32(tower.width),
        "vision.pos_emb_time": u32(tower.time),
    }


def _floats(values: list[float]) -> Value:
    return Value(values, ValueType.ARRAY, ValueType.FLOAT32)
