"""A Hugging Face checkpoint folder: its configuration and its weights by name, every header checked, nothing read yet.

checkpoint = Checkpoint.open(Path("Kimi-K2.5"))
checkpoint.weights["model.layers.1.mlp.experts.0.up_proj.weight"].read_rows(0, 64)  # float32 (64, 7168)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.source.config import read_config
from kimi_lite.quantize.source.names import canonical_name, layer_number
from kimi_lite.quantize.source.stored import StoredWeight, make_weight
from kimi_lite.quantize.write.shards import find_raw_tensors

_FACTOR_SUFFIXES = ("_packed", "_scale", "_shape", "_scale_inv", "_zero_point", "_g_idx")  # after ".weight"
_FP8_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`config`: the text model's fields (quantize.source.config); `weights`: its tensors by canonical name
    (quantize.source.names); `notes`: what the folder holds beside them and why it is left out."""

    folder: Path
    config: Mapping
    weights: Mapping[str, StoredWeight]
    notes: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Raises KimiLiteError where config.json, a shard or a header is missing, damaged or of an unknown kind."""
        config = read_config(folder)
        fp8_block = _check_quantization(config)
        raw, num_vision, num_extra = {}, 0, 0
        for stored_name, tensor in find_raw_tensors(folder).items():
            name = canonical_name(stored_name)
            if name is None:
                num_vision += prod(tensor.shape)
            elif layer_number(name) >= config["num_hidden_layers"]:
                num_extra += prod(tensor.shape)
            elif not name.endswith(".rotary_emb.inv_freq"):  # computed from config.json, as everywhere
                raw[name] = tensor
        notes = []
        if num_vision:
            what = f"vision tower and projector left out ({num_vision / 1e6:,.1f} M values)"
            notes.append(f"{what}: this file is the text model; --mmproj bf16 writes them to a file of their own")
        if num_extra:
            notes.append(f"next-token-prediction layers left out ({num_extra / 1e6:,.1f} M values)")
        names = dict.fromkeys(map(_weight_name, raw))
        return cls(folder, config, {name: make_weight(name, raw, fp8_block) for name in names}, tuple(notes))


def _weight_name(name: str) -> str:
    """`X.weight` for each of the tensors that store it together."""
    for suffix in _FACTOR_SUFFIXES:
        if name.endswith(f".weight{suffix}"):
            return name.removesuffix(suffix)
    return name


def _check_quantization(config: Mapping) -> tuple[int, int]:
    """Raises KimiLiteError for a way of quantizing that is not read here; returns the FP8 block's rows and columns."""
    quantization = config.get("quantization_config")
    if not quantization:
        return _FP8_BLOCK
    method = quantization.get("quant_method")
    if method == "fp8":
        rows, columns = quantization.get("weight_block_size") or _FP8_BLOCK
        return rows, columns
    if method == "humming" and quantization.get("b_dtype") == "uint2" and not quantization.get("has_zero_point"):
        return _FP8_BLOCK
    groups = quantization.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values()]
    is_int4 = all(w.get("num_bits") == 4 and w.get("type") == "int" and w.get("symmetric", True) for w in weights)
    if method == "compressed-tensors" and quantization.get("format") == "pack-quantized" and is_int4:
        return _FP8_BLOCK
    have = f"quant_method {method!r}, format {quantization.get('format')!r}"
    raise KimiLiteError(
        f"The checkpoint is quantized by {have}.",
        "Read are: none, block FP8, pack-quantized symmetric INT4, and uint2.",
    )
