"""Float rows to GGUF blocks of any type, for tests: the `gguf` package where it can encode, random blocks where it
cannot.

A random block is as good as an encoded one for testing a reader: both paths decode the same bytes. Only the standard
deviation of the decoded weights is kept, so that a model made of them stays numerically sane. Used by `tests.tiny`.
"""

import gguf
import numpy as np

from kimi_lite.native.layouts import Layout

_ENCODABLE = frozenset({"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"})
_MINIMUM_PER_SCALE = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}  # mean code: dmin = this * d centres the weights on zero


def encode_rows(weights: np.ndarray, layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """float32 (..., inputs) -> uint8 (..., row_bytes). Types that `gguf` cannot encode get random weights, equally
    spread."""
    assert weights.shape[-1] % layout.block_size == 0, (layout.name, weights.shape)
    if layout.name in _ENCODABLE:
        encoded = gguf.quants.quantize(np.ascontiguousarray(weights), gguf.GGMLQuantizationType(layout.ggml_id))
        return np.ascontiguousarray(encoded).view(np.uint8)
    num_blocks = weights.size // layout.block_size
    blocks = random_blocks(layout, num_blocks, float(weights.std()), rng)
    return blocks.view(np.uint8).reshape(*weights.shape[:-1], layout.row_bytes(weights.shape[-1]))


def random_blocks(layout: Layout, num_blocks: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """(num_blocks,) of layout.dtype: random codes and signs, scales that give about this standard deviation."""
    probe = _blocks_with_scale(layout, 64, 1.0, rng)
    return _blocks_with_scale(layout, num_blocks, spread / _spread_of(layout, probe), rng)


def _blocks_with_scale(layout: Layout, num_blocks: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    blocks = rng.integers(0, 256, (num_blocks, layout.block_bytes), np.uint8).view(layout.dtype).reshape(num_blocks)
    d = (scale * rng.uniform(0.5, 1.5, num_blocks)).astype(np.float16)
    if layout.name == "IQ1_M":  # the bits of d are the top nibbles of the four scale words
        nibbles = (d.view(np.uint16)[:, None] >> np.array([0, 4, 8, 12], np.uint16)) & 15
        blocks["scales"] = (blocks["scales"] & 0x0FFF) | (nibbles << 12).astype(np.uint16)
    elif layout.name == "NVFP4":  # four UE4M3 scales, exponent << 3 | mantissa; small weights end in the subnormals
        exponent = int(np.clip(7 + np.round(np.log2(scale)), 0, 14))
        blocks["d"] = (exponent << 3) | rng.integers(1, 8, (num_blocks, 4), np.uint8)
    else:
        blocks["d"] = d
    if layout.name in _MINIMUM_PER_SCALE:
        blocks["dmin"] = (d * _MINIMUM_PER_SCALE[layout.name]).astype(np.float16)
    return blocks


def _spread_of(layout: Layout, blocks: np.ndarray) -> float:
    if layout.name == "Q1_0":  # +d or -d
        return float(np.sqrt((blocks["d"].astype(np.float64) ** 2).mean()))
    if layout.name == "Q2_0":  # -d, 0, d or 2d
        return float(np.sqrt((blocks["d"].astype(np.float64) ** 2).mean() * 1.5))
    data = blocks.view(np.uint8).reshape(len(blocks), layout.block_bytes)
    return float(gguf.quants.dequantize(data, gguf.GGMLQuantizationType(layout.ggml_id)).std())
