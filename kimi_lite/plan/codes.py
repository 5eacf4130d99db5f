"""Which recipes keep the codes that a checkpoint stores its experts by, without a loss.

From config.json alone where that says how many bits a code needs: Kimi's INT4, Humming's. GSQ's checkpoints in
compressed-tensors' form have containers of more bits than their codes need; there the codes of one expert are looked
at. `quantize` looks at all of them, and decides by that.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kimi_lite.arch.checkpoint import CheckpointConfig, inner_object
from kimi_lite.arch.recipe import LOSSLESS

OWN_FORMAT = "lite2_128"  # no other program reads it
_TWO_BITS = ("q2_0", OWN_FORMAT)
_KIMI_GROUP = 32  # columns that share a scale in Kimi's own INT4
_LOOKED_AT_ROWS = 64
_CODES = re.compile(r"\.experts\.\d+\.\w+_proj\.weight_packed$")


def kept_recipes(checkpoint: CheckpointConfig) -> tuple[str, ...]:
    """Recipes that write the experts' codes as they are, the one to take first; empty where there are none, or where
    the weights are not there to be looked at."""
    quantization = checkpoint.object("quantization_config")
    source = str(checkpoint.file)
    groups = inner_object(quantization, "config_groups", source)
    weights = next((inner_object(groups, name, source).get("weights") for name in groups), quantization)
    if not isinstance(weights, Mapping):
        return ()
    method = quantization.get("quant_method")
    if method == "humming":
        match = re.fullmatch(r"uint([2-4])", str(weights.get("dtype") or weights.get("b_dtype")))
        return {2: _TWO_BITS, 3: ("q4_0",), 4: ("q4_0",)}[int(match[1])] if match else ()
    if method != "compressed-tensors":
        return ()
    bits, group = weights.get("num_bits"), weights.get("group_size")
    if bits == 4 and group == _KIMI_GROUP:
        return (LOSSLESS,)
    if bits in (2, 3):
        return _TWO_BITS if bits == 2 else ("q4_0",)
    codes = _some_codes(checkpoint.file.parent) if bits == 4 else None
    if codes is None:
        return ()
    low, high = int(codes.min()) - 8, int(codes.max()) - 8
    return _TWO_BITS if (low >= -2 and high <= 1) or (low >= -1 and high <= 2) else ("q4_0",)


def _some_codes(folder: Path) -> np.ndarray | None:
    """Codes of 4 bits of the first expert found, with 8 for 0; None where no file has one."""
    from safetensors import SafetensorError, safe_open  # only for a folder of this kind

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                name = next(filter(_CODES.search, tensors.keys()), None)
                words = None if name is None else np.ascontiguousarray(tensors.get_slice(name)[:_LOOKED_AT_ROWS])
        except (OSError, SafetensorError):
            continue  # on its way, or damaged: quantize says so
        if words is not None and words.size:
            stream = words.view(np.uint8)
            return np.concatenate([stream & 15, stream >> 4])
    return None
