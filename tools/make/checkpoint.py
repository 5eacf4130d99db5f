"""Writes a Hugging Face folder with Kimi K2.5's dimensions, a few of its layers, and random weights stored as the
vendor does.

    python -m tools.make.checkpoint FOLDER --layers 0+1            # one layer of 384 INT4 experts, 9.5 GB
    kimi-lite quantize FOLDER out.gguf --recipe tq1_0
    python -m tools.make.checkpoint FOLDER --experts gsq         # 2-bit codes as GSQ leaves them; or humming

Routed experts are pack-quantized INT4 in groups of 32 (or 2-bit codes in groups of 128), all else bfloat16, a shard a
layer, so that `quantize` can be timed on what it will meet 60 times: seconds, memory and weights per second of one
layer extrapolate. Weights are Gaussian, codes go to -7..7; each tensor is cut from one tile of a few megabytes at
changing offsets.
"""

import base64
import json
import os
import time
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import typer

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import K2_5, slice_of
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.codecs.floats import encode_bf16
from kimi_lite.quantize.source.names import TensorSource, list_sources
from kimi_lite.quantize.write.writer import check_space

_GROUP, _GSQ_GROUP = 32, 128
Experts = Literal["int4", "gsq", "humming"]  # gsq: in a container of 4 bits, as compressed-tensors packs it
_TILE_ROWS, _TILE_COLUMNS = 512, 8192
_DTYPE_BYTES = {"BF16": 2, "F32": 4, "I32": 4}
_NUM_CONTROL = 256


class _Stored(NamedTuple):
    """One tensor of a shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * _DTYPE_BYTES[self.dtype]


def make_checkpoint(folder: Path, config: ModelConfig, seed: int = 0, experts: Experts = "int4") -> int:
    """Writes config.json, tokenizer, index and shards; returns the bytes of weights. Raises KimiLiteError."""
    if folder.exists() and any(folder.iterdir()):
        raise KimiLiteError(f"{folder} is not empty.", "Name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    shards = _group_tensors(config, experts)
    total_bytes = sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors)
    check_space(folder / "weights", total_bytes)
    tiles = _make_tiles(np.random.default_rng(seed), experts)
    for name, tensors in shards.items():
        _write_shard(folder / name, tensors, tiles)
    weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_config(folder, config, experts)
    return total_bytes


def _group_tensors(config: ModelConfig, experts: Experts) -> dict[str, list[_Stored]]:
    """Shard names to tensors: one shard a layer, the rest in the last."""
    biases = {
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        for layer in range(config.num_dense_layers, config.num_layers)
    }
    by_shard: dict[int, list[_Stored]] = {}
    seen: set[str] = set()
    for source in list_sources(config, biases):
        shard = int(source.name.split(".")[1]) if source.name.startswith("blk.") else config.num_layers
        by_shard.setdefault(shard, [])
        for tensor in _list_stored(source, config, experts):
            if tensor.name not in seen:
                seen.add(tensor.name)
                by_shard[shard].append(tensor)
    count = len(by_shard)
    return {
        f"model-{number + 1:05}-of-{count:06}.safetensors": by_shard[key] for number, key in enumerate(sorted(by_shard))
    }


def _list_stored(source: TensorSource, config: ModelConfig, experts: Experts) -> Iterator[_Stored]:
    """What the checkpoint holds for the parts of a GGUF tensor."""
    for part in source.parts:
        name = f"language_model.{part.weight}"
        if ".mlp.experts." in name:
            rows, row = part.stop - part.start, source.shape[-1]
            groups = row // (_GROUP if experts == "int4" else _GSQ_GROUP)
            if experts == "humming":
                yield _Stored(name, "I32", (rows, row // 16))
                yield _Stored(name.replace(".weight", ".zero_point"), "BF16", (rows, groups))
            else:
                yield _Stored(f"{name}_packed", "I32", (rows, row // 8))
                yield _Stored(f"{name}_shape", "I32", (2,))
            yield _Stored(f"{name}_scale", "BF16", (rows, groups))
        elif name.endswith("kv_b_proj.weight"):
            yield _Stored(name, "BF16", (config.num_heads * config.kv_head_dim, config.kv_lora_rank))
        else:
            yield _Stored(name, "F32" if name.endswith("bias") else "BF16", source.shape)


def _make_tiles(rng: np.random.Generator, experts: Experts) -> dict[str, np.ndarray]:
    """Flat uint8 values by kind: bfloat16 weights, codes with their scales and zero points, norms near one, small
    float32."""
    weights = rng.standard_normal((_TILE_ROWS, _TILE_COLUMNS), np.float32) * np.float32(0.02)
    groups = weights.reshape(-1, _GROUP)  # (groups, 32)
    scales = np.abs(groups).max(axis=1, keepdims=True) / np.float32(7)
    codes = (np.rint(groups / scales) + 8).astype(np.uint8).reshape(-1, 2)
    if experts != "int4":
        codes = rng.integers(6, 10, codes.shape).astype(np.uint8)  # -2 to 1 in 4 bits; of 2 bits any byte is four codes
    near_one = 1 + 0.1 * rng.standard_normal((1, _TILE_COLUMNS), np.float32)
    return {
        "weights": encode_bf16(weights).reshape(-1),
        "codes": rng.integers(0, 256, len(codes), np.uint8) if experts == "humming" else codes[:, 0] | codes[:, 1] << 4,
        "zeros": np.tile(encode_bf16(np.full((1, 256), 2, np.float32)).reshape(-1), 256),
        "scales": encode_bf16(scales).reshape(-1),
        "norms": encode_bf16(near_one.astype(np.float32)).reshape(-1),
        "biases": (0.1 * rng.standard_normal(_TILE_COLUMNS, np.float32)).astype("<f4").view(np.uint8),
    }


def _write_shard(path: Path, tensors: list[_Stored], tiles: Mapping[str, np.ndarray]) -> None:
    header, offset = {}, 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    encoded = json.dumps(header).encode()
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for number, tensor in enumerate(tensors):
            for piece in _pieces(tensor, number, tiles):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _pieces(tensor: _Stored, number: int, tiles: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    """The tensor's bytes, from its tile at an offset that depends on its number, over and over."""
    if tensor.name.endswith("_shape"):
        yield np.zeros(2, "<i4").tobytes()  # readers take the shape from the packed tensor
        return
    kind = "norms" if tensor.name.endswith(("norm.weight", "layernorm.weight")) else "weights"
    kind = "codes" if tensor.dtype == "I32" else kind
    for suffix, other in (("_scale", "scales"), ("bias", "biases"), (".zero_point", "zeros")):
        kind = other if tensor.name.endswith(suffix) else kind
    tile = memoryview(tiles[kind])
    start = (number * 2654435761 >> 8) % len(tile) // _GROUP * _GROUP
    left = tensor.num_bytes
    while left > 0:
        piece = tile[start : start + left]
        yield piece
        left -= len(piece)
        start = 0


def _write_config(folder: Path, config: ModelConfig, experts: Experts) -> None:
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": _GROUP if experts == "int4" else _GSQ_GROUP,
        "symmetric": True,
        "dynamic": False,
    }
    if experts == "humming":
        weights = {"dtype": "uint2", "group_size": _GSQ_GROUP, "has_zero_point": True, "is_fp_zero_point": True}
    quantization = {
        "quant_method": "humming" if experts == "humming" else "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    text = config.to_json() | {"model_type": "kimi_k2", "quantization_config": quantization}
    content = {"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(content, indent=1))
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    controls = {str(256 + i): {"content": f"<|control_{i}|>", "special": True} for i in range(3, _NUM_CONTROL)}
    named = {
        str(256 + i): {"content": name, "special": True} for i, name in enumerate(("[BOS]", "[EOS]", "<|im_end|>"))
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": named | controls}))


def main(
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    layers: Annotated[str, typer.Option(help="Dense layers + expert layers.")] = "0+1",
    num_experts: Annotated[int, typer.Option(help="Routed experts a layer; K2.5 has 384.", min=8)] = 384,
    vocab: Annotated[int, typer.Option(help="Tokens; K2.5 has 163840.", min=512)] = 8192,
    experts: Annotated[Experts, typer.Option(help="How the routed experts are stored.")] = "int4",
) -> None:
    """Write a K2.5-shaped checkpoint with random weights."""
    start_s = time.perf_counter()
    dense, _, sparse = layers.partition("+")
    if not (dense.isdecimal() and sparse.isdecimal() and int(dense) + int(sparse) > 0):
        raise typer.BadParameter(f"{layers!r} is not dense + expert layers, such as 0+1")
    try:
        config = slice_of(K2_5, int(dense), int(sparse), num_experts, vocab)
        num_bytes = make_checkpoint(folder, config, experts=experts)
    except KimiLiteError as error:
        typer.echo(f"make_checkpoint: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{folder}: {num_bytes / 1e9:.3f} GB in {time.perf_counter() - start_s:.1f} s")


if __name__ == "__main__":
    typer.run(main)
