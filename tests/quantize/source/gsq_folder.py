"""Checkpoints as GSQ leaves them, written from the byte layouts alone: no code of ours packs or decodes here.

Two forms: compressed-tensors' pack-quantized container, whose codes may need fewer bits than it has, and Humming's.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.torch import load_file, save_file

GROUP = 128
LEVELS = {"2-bit": (-2, 1), "3-bit": (-4, 3), "ternary": (-1, 1), "4-bit": (-8, 7)}  # lowest and highest code


class Stored(NamedTuple):
    """Signed codes (N, M) and the scales (N, M / 128) as bfloat16 bits."""

    codes: np.ndarray
    scales: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """float32 (N, M): what the codes stand for."""
        scales = (self.scales.astype(np.uint32) << 16).view(np.float32)
        return self.codes.astype(np.float32) * np.repeat(scales, GROUP, axis=1)


def pack_words(unsigned: np.ndarray, bits: int) -> np.ndarray:
    """Codes (N, M) into int32 words (N, ceil(M * bits / 32)): code j takes the bits j * bits and up of the row."""
    rows, columns = unsigned.shape
    words = np.zeros((rows, -(-columns * bits // 32)), np.uint64)
    spilled = np.zeros((rows, words.shape[1] + 1), np.uint64)
    for column in range(columns):
        word, shift = divmod(column * bits, 32)
        value = unsigned[:, column].astype(np.uint64) << np.uint64(shift)
        spilled[:, word] |= value & np.uint64(0xFFFFFFFF)
        spilled[:, word + 1] |= value >> np.uint64(32)
    words[:] = spilled[:, : words.shape[1]]
    return words.astype(np.uint32).view(np.int32)


def quantized(weight: np.ndarray, levels: str) -> Stored:
    """Codes of a float matrix: what the format allows, not how well it was chosen."""
    low, high = LEVELS[levels]
    groups = weight.reshape(len(weight), -1, GROUP)
    scales = (np.abs(groups).mean(-1) * (0.5 if levels == "3-bit" else 1) / (4 if levels == "4-bit" else 1)).astype(
        np.float32
    )
    bits = (scales.view(np.uint32) >> 16).astype(np.uint16)
    exact = (bits.astype(np.uint32) << 16).view(np.float32)
    codes = np.clip(np.rint(groups / exact[..., None]), low, high)
    codes[:, 0, :2] = low, high  # every level is there
    return Stored(codes.reshape(weight.shape).astype(np.int8), bits)


def write_gsq(
    folder: Path,
    source: Path,
    form: str = "packed",
    levels: str = "2-bit",
    bits: int = 4,
    prefix: str = "language_model.",
    zero_points: bool = False,
    change=lambda name, stored: stored,
) -> dict[str, np.ndarray]:
    """`source`, a checkpoint in floats, with its routed experts as GSQ stores them; returns what they stand for, by
    their names in a text model. `change` may replace what is stored for one matrix."""
    import torch

    folder.mkdir()
    tensors, expected, dynamic = {}, {}, {}
    for file in sorted(source.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            if ".experts." not in name:
                tensors[f"{prefix}{name}"] = weight if name.endswith("bias") else weight.to(torch.bfloat16)
                continue
            stored = change(name, quantized(weight.float().numpy(), levels))
            expected[name] = stored.values
            stem = f"{prefix}{name}".removesuffix(".weight")
            unsigned = stored.codes.astype(np.int16) + (1 << (bits - 1))
            words = torch.from_numpy(pack_words(unsigned, bits))
            scales = torch.from_numpy(stored.scales.view(np.int16).copy()).view(torch.bfloat16)
            if form == "packed":
                tensors[f"{stem}.weight_packed"] = words
                tensors[f"{stem}.weight_shape"] = torch.tensor(stored.codes.shape)
            else:
                tensors[f"{stem}.weight"] = words
                dynamic["-:" + stem.replace(".", r"\.") + "$"] = _humming(bits, zero_points)
            tensors[f"{stem}.weight_scale"] = scales
            if zero_points:
                zeros = np.full(stored.scales.shape, 1 << (bits - 1), np.float32)
                tensors[f"{stem}.zero_point"] = torch.from_numpy(zeros).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    packed = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
    method = "compressed-tensors" if form == "packed" else "humming"
    weights = packed if form == "packed" else _humming(bits, zero_points)
    quantization = {
        "quant_method": method,
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    if form == "humming":
        quantization["dynamic"] = dynamic
    text = json.loads((source / "config.json").read_text())
    if prefix:
        inner = text | {"quantization_config": quantization}
        config = {"model_type": "kimi_k25", "text_config": inner, "vision_config": {"patch_size": 14}}
    else:
        config = text | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tiktoken.model", "tokenizer_config.json"):
        (folder / file).write_bytes((source / file).read_bytes())
    return expected


def _humming(bits: int, zero_points: bool) -> dict:
    return {
        "dtype": f"uint{bits}",
        "group_size": GROUP,
        "has_zero_point": zero_points,
        "is_fp_zero_point": zero_points,
        "symmetric": not zero_points,
    }
