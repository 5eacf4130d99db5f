"""MoonViT, the vision tower of Kimi K2.5, K2.6 and Kimi-VL, as a table: its numbers in GGUF and in config.json, its
tensors with their shapes and the checkpoint's names.

`quantize.mmproj` writes files by it, `model.vision` opens them. Two forms: `kimik25` (MoonViT-3D: up to 4 frames, one
matrix for queries, keys and values, positions as a grid) and `kimivl` (images alone, three matrices, positions as a
list). In files of `kimik25` the pairs of each head of queries and keys that turn by the image's columns come before
those that turn by its rows; the checkpoint has them in turns. llama.cpp's converter leaves them in turns for `kimivl`,
which its own graph then turns wrongly; our files of it have columns first, and say so in ROW_ORDER_KEY.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

from kimi_lite.arch.checkpoint import inner_object, read_json_object
from kimi_lite.arch.reader import METADATA_HINT, Reader, shown
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import Value, ValueType, boolean, f32, text, u32
from kimi_lite.gguf.store import GGUFStore

ARCHITECTURE = "clip"  # general.architecture of such files
HINT = "Kimi K2.5, K2.6 and Kimi-VL have a vision tower that this program knows."
MAX_FRAMES = 4  # of a chunk of video
LAYER_NORM_EPS = 1e-5  # of the tower; the projector's is in the file
ROPE_BASE = 10_000.0
ROW_ORDER_KEY = "clip.vision.rope_row_order"  # ours: "columns first" or "in turns"
PATCH, POSITIONS = "v.patch_embd.weight", "v.position_embd.weight"
RowOrder = Literal["columns first", "in turns"]
Change = Literal["", "columns first", "query", "key", "value"]  # of a checkpoint's rows

_PROJECTORS = {"kimi_k25": "kimik25", "kimi_vl": "kimivl"}  # by config.json's model_type
_MAX_SIZE, _MAX_LAYERS = 1 << 20, 1 << 10  # far beyond what exists: more is damage
_MIN_PATCHES, _MAX_PATCHES = 8, 16384  # of an image, by the vendor's preprocessor
_MAX_KIMIVL_PATCHES = 4096
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
_KEYS = {  # ours: GGUF's below "clip.vision."
    "hidden": "embedding_length",
    "feed_forward": "feed_forward_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "patch": "patch_size",
    "text_hidden": "projection_dim",
}
_BLOCK = {"norm0": "ln1", "norm1": "ln2", "wo": "attn_out", "mlp.fc0": "ffn_up", "mlp.fc1": "ffn_down"}


@dataclass(frozen=True, slots=True)
class MoonViT:
    """The tower's sizes; `text_hidden` is what the projector ends in."""

    projector: str  # kimik25 or kimivl
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    patch: int
    height: int  # of the table of positions
    width: int
    time: int
    merge: int
    eps: float  # of the projector's LayerNorm
    text_hidden: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def merged(self) -> int:
        """Values of a token before the projector."""
        return self.hidden * self.merge**2

    @property
    def max_frames(self) -> int:
        return min(self.time, MAX_FRAMES) if self.projector == "kimik25" else 1

    @property
    def max_patches(self) -> int:
        """Of an image, before it is padded: the vendors' preprocessors shrink larger ones."""
        return _MAX_PATCHES if self.projector == "kimik25" else _MAX_KIMIVL_PATCHES

    @property
    def num_weights(self) -> int:
        return sum(prod(tensor.shape) for tensor in tensors_of(self))


class VisionTensor(NamedTuple):
    """A tensor of the file: its shape, the checkpoint's tensor, and what becomes of that one's rows."""

    name: str
    shape: tuple[int, ...]
    source: str
    change: Change = ""


def check_heads(tower: MoonViT, source: str, hint: str) -> MoonViT:
    """The tower. Raises KimiLiteError where a head does not hold pairs of both axes."""
    if tower.hidden % tower.heads or tower.hidden // tower.heads % (2 * _ROPE_AXES):
        raise KimiLiteError(
            f"{source}: {tower.hidden} does not divide into {tower.heads} heads with two axes of pairs.", hint
        )
    return tower


# A checkpoint ---------------------------------------------------------------------------------------------------------


def has_tower(config: Mapping[str, object]) -> bool:
    """Whether a config.json describes a tower of ours."""
    return config.get("model_type") in _PROJECTORS and bool(config.get("vision_config"))


def read_checkpoint_tower(folder: Path) -> tuple[MoonViT, dict]:
    """The sizes by config.json, and its content. Raises KimiLiteError where it has none."""
    file = folder / "config.json"
    config = read_json_object(file, HINT)
    vision = inner_object(config, "vision_config", str(file), HINT)
    kind = config.get("model_type")
    projector = _PROJECTORS.get(kind) if isinstance(kind, str) else None
    read = Reader(vision, "", f"{file}, vision_config", HINT, is_null_missing=True)
    names = {ours: next((name for name in theirs if read.has(name)), None) for ours, theirs in _FIELDS.items()}
    missing = [" or ".join(_FIELDS[ours]) for ours, name in names.items() if name is None]
    if projector is None or missing:
        what = f"lacks {', '.join(missing)} in vision_config" if projector else f"is of type {shown(kind)}"
        raise KimiLiteError(f"{file} {what}.", HINT)
    sizes = {ours: read.integer(name, 1, _MAX_SIZE) for ours, name in names.items() if name}
    text_config = Reader(inner_object(config, "text_config", str(file), HINT), "", str(file), HINT, True)
    outer = Reader(config, "", str(file), HINT, is_null_missing=True)
    tower = MoonViT(
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
    return check_heads(tower, str(file), HINT), config


def _merge_size(read: Reader) -> int:
    """Patches along one side of what becomes one token: a number, or the same for both axes."""
    merge = read.value("merge_kernel_size", default=2)
    first = merge[0] if isinstance(merge, list) and len(merge) == 2 and merge[0] == merge[1] else merge
    if type(first) is not int or not 1 <= first <= 16:
        raise read.error("merge_kernel_size", merge, "a whole number from 1 to 16, or twice the same")
    return first


# A file ---------------------------------------------------------------------------------------------------------------


def metadata_of(tower: MoonViT) -> dict[str, Value]:
    """The keys that say what the tower is."""
    keys = {
        "general.architecture": text(ARCHITECTURE),
        "general.type": text("mmproj"),
        "clip.has_vision_encoder": boolean(True),
        "clip.projector_type": text(tower.projector),
        "clip.use_gelu": boolean(True),
        "clip.vision.image_size": u32(tower.height * tower.patch),
        **{f"clip.vision.{theirs}": u32(getattr(tower, ours)) for ours, theirs in _KEYS.items()},
        "clip.vision.attention.layer_norm_epsilon": f32(tower.eps),
        "clip.vision.projector.scale_factor": u32(tower.merge),
        "clip.vision.image_mean": _floats([0.5] * 3),
        "clip.vision.image_std": _floats([0.5] * 3),
        ROW_ORDER_KEY: text("columns first"),
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


class VisionFile(NamedTuple):
    """A vision file's tower, the order of its rows of queries and keys, and what pixels are normalized with."""

    tower: MoonViT
    row_order: RowOrder
    mean: tuple[float, ...]  # of red, green and blue, from 0 to 1
    std: tuple[float, ...]


def read_vision_file(store: GGUFStore) -> VisionFile:
    """Raises KimiLiteError where the file is none, or its numbers or tensors are not a MoonViT's; by name."""
    source, metadata = str(store.path), store.metadata
    if metadata.get("general.architecture") != ARCHITECTURE:
        is_text = "block_count" in " ".join(map(str, metadata))
        raise KimiLiteError(
            f"{source} is no vision file: its general.architecture is {shown(metadata.get('general.architecture'))}"
            f"{', a language model' if is_text else ''}.",
            "A vision file (mmproj-NAME.gguf) lies next to the model's in its repository; kimi-lite quantize --mmproj "
            "makes one.",
        )
    outer, read = Reader(metadata, "", source), Reader(metadata, "clip.vision.", source)
    known = {name: name for name in _PROJECTORS.values()}
    kind = metadata.get("clip.vision.projector_type", metadata.get("clip.projector_type"))
    if not isinstance(kind, str) or kind not in known:
        raise KimiLiteError(f"{source} is the vision file of another model (projector {shown(kind)}).", HINT)
    sizes = {
        ours: read.integer(theirs, 1, _MAX_LAYERS if ours == "layers" else _MAX_SIZE) for ours, theirs in _KEYS.items()
    }
    side = read.integer("image_size", 1, _MAX_SIZE, default=64 * sizes["patch"]) // sizes["patch"]
    tower = MoonViT(
        projector=kind,
        **sizes,
        height=outer.integer("vision.pos_emb_height", 1, _MAX_SIZE, default=side),
        width=outer.integer("vision.pos_emb_width", 1, _MAX_SIZE, default=side),
        time=outer.integer("vision.pos_emb_time", 1, _MAX_SIZE, default=MAX_FRAMES if kind == "kimik25" else 1),
        merge=read.integer("projector.scale_factor", 1, 16, default=2),
        eps=read.number("attention.layer_norm_epsilon", 0, 1, default=LAYER_NORM_EPS),
    )
    check_heads(tower, source, METADATA_HINT)
    check_tensors(store, tower)
    default = "columns first" if kind == "kimik25" else "in turns"
    orders = {name: name for name in ("columns first", "in turns")}
    row_order = outer.choice(ROW_ORDER_KEY, orders, default=default)
    return VisionFile(tower, row_order, _colours(read, "image_mean", 0), _colours(read, "image_std", 1e-6))


def _colours(read: Reader, key: str, low: float) -> tuple[float, ...]:
    values = read.values.get(read.prefix + key, [0.5] * 3)
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(low <= number <= 1 for number in numbers):
        raise read.error(key, values, f"three numbers from {low:g} to 1")
    return numbers


def check_tensors(store: GGUFStore, tower: MoonViT) -> None:
    """Every tensor of the tower is there, in its shape. Raises KimiLiteError by name."""
    for wanted in tensors_of(tower):
        have = store.tensor(wanted.name).shape
        if have != wanted.shape:
            raise KimiLiteError(
                f"{store.path}: {wanted.name} is {list(have)}, and by the metadata must be {list(wanted.shape)}.",
                METADATA_HINT,
            )


def find_vision_file(model: Path, hidden_size: int, named: Path | None = None) -> Path | None:
    """The one that is named; else, of those in the model's folder that end in its width, the one with llama.cpp's name,
    mmproj-MODEL.gguf, or the only one. Publishers with a folder for each quant (UD-TQ1_0/MODEL-UD-TQ1_0.gguf) have it
    in the folder above. None where there is none, or several."""
    if named is not None:
        return named
    folders = [model.parent, *([model.parent.parent] if model.parent.name in model.name else [])]
    for folder in folders:
        fitting = [file for file in sorted(folder.glob("*mmproj*.gguf")) if _width_of(file) == hidden_size]
        own = folder / f"mmproj-{model.name}"
        if own in fitting or len(fitting) == 1:
            return own if own in fitting else fitting[0]
    return None


def _width_of(file: Path) -> object:
    """Of the features that a vision file makes; None of a damaged one."""
    try:
        return GGUFStore.open(file).metadata.get("clip.vision.projection_dim")
    except KimiLiteError:
        return None


# Tensors --------------------------------------------------------------------------------------------------------------


def tensors_of(tower: MoonViT) -> Iterator[VisionTensor]:
    """All tensors of the file in order."""
    d, ff, patch = tower.hidden, tower.feed_forward, tower.patch
    grid = (tower.height, tower.width, d) if tower.projector == "kimik25" else (tower.height * tower.width, d)
    stem = "vision_tower."
    yield VisionTensor(PATCH, (d, 3, patch, patch), f"{stem}patch_embed.proj.weight")
    yield VisionTensor("v.patch_embd.bias", (d,), f"{stem}patch_embed.proj.bias")
    yield VisionTensor(POSITIONS, grid, f"{stem}patch_embed.pos_emb.weight")
    shapes = {"norm0": (d,), "norm1": (d,), "wo": (d, d), "mlp.fc0": (ff, d), "mlp.fc1": (d, ff)}
    for layer in range(tower.layers):
        for theirs, ours in _BLOCK.items():
            yield from _pair(f"v.blk.{layer}.{ours}", shapes[theirs], f"{stem}encoder.blocks.{layer}.{theirs}")
        yield from _qkv(tower, f"{stem}encoder.blocks.{layer}.wqkv", f"v.blk.{layer}.")
    yield from _pair("v.post_ln", (d,), f"{stem}encoder.final_layernorm")
    is_k25 = tower.projector == "kimik25"
    projector = "mm_projector." if is_k25 else "multi_modal_projector."
    first, second = ("proj.0", "proj.2") if is_k25 else ("linear_1", "linear_2")
    yield from _pair("mm.input_norm", (d,), f"{projector}pre_norm")
    yield from _pair("mm.1", (tower.merged, tower.merged), f"{projector}{first}")
    yield from _pair("mm.2", (tower.text_hidden, tower.merged), f"{projector}{second}")


def _pair(name: str, shape: tuple[int, ...], source: str) -> Iterator[VisionTensor]:
    yield VisionTensor(f"{name}.weight", shape, f"{source}.weight")
    yield VisionTensor(f"{name}.bias", shape[:1], f"{source}.bias")


def _qkv(tower: MoonViT, source: str, block: str) -> Iterator[VisionTensor]:
    d = tower.hidden
    for kind, row in (("weight", (d,)), ("bias", ())):
        if tower.projector == "kimik25":
            yield VisionTensor(f"{block}attn_qkv.{kind}", (3 * d, *row), f"{source}.{kind}", "columns first")
            continue
        for letter, third in zip("qkv", ("query", "key", "value"), strict=True):
            yield VisionTensor(f"{block}attn_{letter}.{kind}", (d, *row), f"{source}.{kind}", third)
