"""The decode formulas, as ik_llama.cpp has them (iqk_quantize.cpp, dequantize_row_*)."""

import numpy as np

from kimi_lite.native.types.reference_parts import bits, column, flat, grouped
from kimi_lite.native.types.sixteen_values.layout import IQ4_VALUES
from kimi_lite.native.types.trellis.layout import CENTRE, FIRST_STATE, POWERS, SIX_BITS

_SCALES = np.array(IQ4_VALUES, np.float32)


def generated(indices: np.ndarray, count: int) -> np.ndarray:
    """(B, G) indices -> int32 (B, G * count): `count` weights of each."""
    states = (indices.astype(np.uint32) + np.uint32(FIRST_STATE))[..., None] * np.array(POWERS[:count], np.uint32)
    sums = np.ascontiguousarray(states & np.uint32(SIX_BITS)).view(np.uint8).reshape(*states.shape, 4).sum(axis=-1)
    return flat(sums.astype(np.int32) - CENTRE)


def _scaled(b: np.ndarray, scales: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Rows' scales times `scales` (B, 8), rounded, times `values` (B, 256)."""
    return flat(grouped(values, 32) * (column(b["row_scale"]) * scales.astype(np.float32))[..., None])


def _nibbles(field: np.ndarray) -> np.ndarray:
    """(B, n) bytes -> (B, 2 n): the low nibbles, then the high ones."""
    return flat(bits(field, [0, 4], 15))


def _iq1_kt(b):
    top = flat((b["sh"][..., None] >> np.arange(4, 8, dtype=np.uint8)) & 1).astype(np.uint32)  # (B, 32)
    index = b["ql"] | _nibbles(b["qh"]).astype(np.uint32) << 8 | top << 12
    return _scaled(b, _SCALES[b["sh"] & 15], generated(index, 8))


def _iq2_kt(b):
    return _scaled(b, _SCALES[_nibbles(b["scales"])], generated(b["qs"], 8))


def _iq3_kt(b):
    signs = 1 - 2 * flat(bits(b["qh"], list(range(8)), 1)).astype(np.int32)  # (B, 256)
    return _scaled(b, _nibbles(b["scales"]), signs * np.abs(generated(b["qs"], 8)))


def _iq4_kt(b):
    words = b["qs"]
    top = flat((words[..., None] >> np.arange(8, 32, 3, dtype=np.uint32)) & 7)  # (B, 64)
    index = b["ql"] | _nibbles(b["qh"]).astype(np.uint32) << 8 | top << 12 | np.repeat((words & 1) << 15, 8, axis=1)
    return _scaled(b, (words >> 1 & 127).astype(np.int32) - 64, generated(index, 4))


DECODERS = {
    "IQ1_KT": _iq1_kt,
    "IQ2_KT": _iq2_kt,
    "IQ3_KT": _iq3_kt,
    "IQ4_KT": _iq4_kt,
}
