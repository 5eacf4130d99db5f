"""Random but valid blocks of every GGUF type: random codes, and scales such that the weights have a wanted spread.

A random model of the right spread stays finite through its layers, and its bytes are as hard to multiply as real ones.
"""

from itertools import product

import numpy as np

from kimi_lite.native.layouts import Layout

# Root mean square of a weight whose scale `d` is 1 (for MXFP4 and NVFP4: whose decoded scale is 1) and whose codes are
# random as below. Found with reference decoders, which tests/tools/test_random_blocks.py repeats.
_UNIT_RMS = {
    "Q4_0": 4.637, "Q4_1": 4.610, "Q5_0": 9.247, "Q5_1": 9.233, "Q8_0": 73.90,
    "Q2_K": 9.843, "Q3_K": 43.5, "Q4_K": 168.4, "Q5_K": 337.3, "Q6_K": 1365.0,
    "IQ2_XXS": 53.4, "IQ2_XS": 55.7, "IQ2_S": 56.4, "IQ3_XXS": 142.0, "IQ3_S": 140.5, "IQ1_S": 7.25, "IQ1_M": 7.25,
    "IQ4_NL": 67.5, "IQ4_XS": 1242.0, "TQ1_0": 0.8165, "TQ2_0": 0.8165,
    "MXFP4": 5.852, "NVFP4": 5.852, "Q1_0": 1.0, "Q2_0": 1.2247,
}  # fmt: skip
_MINIMUM_PER_SCALE = {
    "Q2_K": 1.5,
    "Q4_K": 7.5,
    "Q5_K": 15.5,
    "Q4_1": -7.5,
    "Q5_1": -15.5,
}  # centres the weights on zero
_IS_LOPSIDED = frozenset({"Q4_0", "Q5_0", "IQ4_NL", "Q2_0"})  # codes reach further on one side: the sign of d varies
_JITTER = np.sqrt(1 + 1 / 12)  # rms of a scale that varies uniformly between half and one and a half times its mean
_FP4_SCALE = {"MXFP4": "e", "NVFP4": "d"}


def random_rows(layout: Layout, num_rows: int, row_weights: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 (num_rows, row_bytes) of weights with mean 0 and standard deviation `spread`."""
    num_blocks = num_rows * row_weights // layout.block_size
    blocks = random_blocks(layout, num_blocks, spread, rng)
    return blocks.view(np.uint8).reshape(num_rows, layout.row_bytes(row_weights))


def random_blocks(layout: Layout, num_blocks: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """(num_blocks,) of `layout.dtype`."""
    if layout.block_size == 1:
        return _random_floats(layout, num_blocks, spread, rng)
    blocks = rng.integers(0, 256, num_blocks * layout.block_bytes, np.uint8).view(layout.dtype)
    _restrict_codes(layout.name, blocks, rng)
    scale = spread / _UNIT_RMS[layout.name]
    if layout.name in _FP4_SCALE:
        field = blocks[_FP4_SCALE[layout.name]]
        field[...] = _nearest_codes(fp4_scales(layout.name), scale, field.shape, rng)
    else:
        _set_scales(layout.name, blocks, scale / _JITTER, rng)
    return blocks


def _random_floats(layout: Layout, num_weights: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    values = rng.standard_normal(num_weights, np.float32) * np.float32(spread)
    if layout.name == "BF16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    elif layout.name == "F16":
        values = values.astype(np.float16)
    return values.view(layout.dtype)


def _restrict_codes(name: str, blocks: np.ndarray, rng: np.random.Generator) -> None:
    """Only the bytes that an encoder writes, where that is not all of them; and minima that belong to their scales."""
    size = len(blocks)
    if name == "TQ1_0":  # five trits a byte, then four: the byte is the smallest above 256/243 of the number
        blocks["qs"] = -(-rng.integers(0, 243, (size, 48)) * 256 // 243)
        blocks["qh"] = -(-rng.integers(0, 81, (size, 4)) * 3 * 256 // 243)
    elif name == "TQ2_0":  # the code 3 is never written
        bytes_of_trits = np.array(
            [a | b << 2 | c << 4 | d << 6 for a, b, c, d in product(range(3), repeat=4)], np.uint8
        )
        blocks["qs"] = bytes_of_trits[rng.integers(0, 81, (size, 64))]
    elif name == "Q2_K":
        blocks["scales"] = (blocks["scales"] & 15) * 17
    elif name in ("Q4_K", "Q5_K"):  # eight scales and eight minima of six bits
        scales = blocks["scales"]
        scales[:, 4:8] = scales[:, :4]
        scales[:, 8:] = (scales[:, 8:] & 15) * 17


def _set_scales(name: str, blocks: np.ndarray, scale: float, rng: np.random.Generator) -> None:
    """float16 scales of mean magnitude `scale`, and the offsets that centre the weights."""
    d = scale * rng.uniform(0.5, 1.5, len(blocks))
    if name in _IS_LOPSIDED:
        d *= rng.choice((-1.0, 1.0), len(blocks))
    d = d.astype(np.float16)
    if name == "IQ1_M":  # the bits of d are the top nibbles of the four scale words
        nibbles = (d.view(np.uint16)[:, None] >> np.array([0, 4, 8, 12], np.uint16)) & 15
        blocks["scales"] = (blocks["scales"] & 0x0FFF) | (nibbles << 12)
    else:
        blocks["d"] = d
    if name in _MINIMUM_PER_SCALE:
        blocks["m" if name.endswith("_1") else "dmin"] = d * np.float16(_MINIMUM_PER_SCALE[name])


def fp4_scales(name: str) -> np.ndarray:
    """What each scale byte of the FP4 types multiplies the integers 0, 1, 2, 3, 4, 6, 8, 12 with; float64,
    ascending."""
    if name == "MXFP4":  # E8M0; 255 is NaN
        return np.exp2(np.arange(255) - 128.0)
    code = np.arange(127)  # UE4M3, half of it; 127 is NaN
    exponent, mantissa = code >> 3, code & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)) / 2


def _nearest_codes(scales: np.ndarray, wanted: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """The codes on either side of `wanted`, in the proportion that gives its mean square."""
    above = int(np.clip(np.searchsorted(scales, wanted), 1, len(scales) - 1))
    low, high = scales[above - 1] ** 2, scales[above] ** 2
    return above - 1 + (rng.random(shape) < (wanted**2 - low) / (high - low))
