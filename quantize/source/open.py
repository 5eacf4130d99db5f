"""A Hugging Face checkpoint folder: its configuration and its weights by name, every header checked, nothing read yet.

checkpoint = Checkpoint.open(Path("Kimi-K2.5"))
checkpoint.weights["model.layers.1.mlp.experts.0.up_proj.weight"].read_rows(0, 64)  # float32 (64, 7168)
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kimi_lite.arch.checkpoint import CheckpointConfig, read_checkpoint_config
from kimi_lite.arch.reader import Reader
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.source.formats import read_formats
from kimi_lite.quantize.source.names import canonical_name, layer_number
from kimi_lite.quantize.source.shards import RawTensor, find_raw_tensors
from kimi_lite.quantize.source.stored import FACTOR_SUFFIXES, ZERO_POINT, StoredWeight, make_weight

_CONFIG_HINT = "Check that config.json belongs to these weights."
_PREDICTION = (".eh_proj.", ".enorm.", ".hnorm.", ".shared_head.")  # what only next-token-prediction layers have


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`config`: config.json; `weights`: its tensors by canonical name (quantize.source.names); `files`: what they lie
    in; `notes`: what the folder holds besides and why it is left out."""

    folder: Path
    config: CheckpointConfig
    weights: Mapping[str, StoredWeight]
    files: tuple[Path, ...]
    notes: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Raises KimiLiteError where config.json, a shard or a header is missing, damaged or of an unknown kind."""
        config = read_checkpoint_config(folder)
        formats = read_formats(config)
        num_layers, unused = config.config.num_layers, config.config.table.unused_weights
        raw, vision, extra, stored_names = {}, [], [], {}
        tensors = find_raw_tensors(folder)
        for stored_name, tensor in tensors.items():
            name = canonical_name(stored_name)
            if name is None:
                vision.append(tensor)
                continue
            if name in stored_names:
                both = f"{stored_names[name]} and {stored_name}"
                raise KimiLiteError(
                    f"{folder}: {both} are the same weight of the text model.", "Keep the files of one model."
                )
            stored_names[name] = stored_name
            if layer_number(name) >= num_layers:
                extra.append(tensor)
            elif not any(re.fullmatch(pattern, name) for pattern in unused):
                raw[name] = tensor
        _check_prediction_layers(config, extra)
        notes = []
        if vision:
            what = f"vision tower and projector left out ({_num_values(vision)})"
            notes.append(f"{what}: this file is the text model; --mmproj bf16 writes them to a file of their own")
        if extra:
            notes.append(f"next-token-prediction layers left out ({_num_values(extra)})")
        names = dict.fromkeys(map(_weight_name, raw))
        weights = {name: make_weight(name, raw, formats.fp8_block, formats.of(name, raw)) for name in names}
        files = tuple(sorted({tensor.file for tensor in tensors.values()}))
        return cls(folder, config, weights, files, tuple(notes))


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint's folder, and not GGUF."""
    return (path / "config.json").is_file()


def _num_values(tensors: Iterable[RawTensor]) -> str:
    return f"{sum(prod(tensor.shape) for tensor in tensors) / 1e6:,.1f} M values"


def _check_prediction_layers(config: CheckpointConfig, extra: list[RawTensor]) -> None:
    """Layers after the last are left out only where they are such: else config.json is of a smaller model."""
    stated = Reader(config.fields, "", str(config.file), _CONFIG_HINT, is_null_missing=True).integer(
        "num_nextn_predict_layers", 0, 1 << 10, default=0
    )
    by_layer: dict[int, list[str]] = {}
    for tensor in extra:
        by_layer.setdefault(layer_number(canonical_name(tensor.name) or ""), []).append(tensor.name)
    for layer, names in sorted(by_layer.items()):
        is_stated = layer < config.config.num_layers + stated
        if not is_stated and not any(mark in name for name in names for mark in _PREDICTION):
            raise KimiLiteError(
                f"{config.file} has num_hidden_layers {config.config.num_layers}, and there are weights of layer "
                f"{layer}: {names[0]}.",
                _CONFIG_HINT,
            )


def _weight_name(name: str) -> str:
    """`X.weight` for each of the tensors that store it together."""
    for suffix in FACTOR_SUFFIXES:
        if name.endswith(f".weight{suffix}"):
            return name.removesuffix(suffix)
    return f"{name.removesuffix(ZERO_POINT)}.weight" if name.endswith(ZERO_POINT) else name
