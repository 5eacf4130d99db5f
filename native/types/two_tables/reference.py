"""The decode formulas, as ik_llama.cpp has them (iqk_quantize.cpp, dequantize_row_*); IQ6_K with its rounded table."""

from typing import NamedTuple

import numpy as np

from kimi_lite.native.types.reference_parts import bits, flat, nibbles, two_bits
from kimi_lite.native.types.two_tables.layout import STEPS, VALUES


class Parts(NamedTuple):
    """What B blocks are made of: weight = unit * scale * (value + step)."""

    values: np.ndarray  # int32 (B, 256): of the first table
    scales: np.ndarray  # int32 (B, G), G groups of 16 or 32
    steps: np.ndarray  # int32 (B, G): what the chosen table has more
    unit: np.ndarray  # float32 (B,): of the block, or its row


def parts(name: str, b: np.ndarray) -> Parts:
    """`b`: blocks (B,), with a field `row_scale` where rows have one."""
    codes, (scales, is_second), values = _CODES[name](b), _SCALES[name](b), VALUES[name]
    if name == "IQ2_KL":
        codes = np.stack([codes, codes + 32], axis=-1)  # a pair's even and odd element
    unit = b["row_scale" if "row_scale" in b.dtype.names else "d"].astype(np.float32)
    return Parts(np.array(values, np.int32)[flat(codes)], scales, is_second * STEPS[values], unit)


def _decode(name: str, b: np.ndarray) -> np.ndarray:
    values, scales, steps, unit = parts(name, b)
    group = 256 // scales.shape[1]
    factors = unit[:, None] * scales.astype(np.float32)  # float32, rounded
    whole = (values + np.repeat(steps, group, axis=1)).astype(np.float32)
    return np.repeat(factors, group, axis=1) * whole


# Codes (B, 256), of IQ2_KL (B, 128)


def _plane(qh: np.ndarray) -> np.ndarray:
    """(B, n) bytes -> (B, 8 n): bit g of byte j is that of code j of group g."""
    return flat(bits(qh, list(range(8)), 1))


def _by_32(qs: np.ndarray) -> np.ndarray:
    return nibbles(qs.reshape(-1, 32)).reshape(len(qs), 256)


def _by_16(qs: np.ndarray) -> np.ndarray:
    return nibbles(qs.reshape(-1, 16)).reshape(len(qs), -1)


def _unfolded(qs: np.ndarray) -> np.ndarray:
    """IQ4_KSS: what was an exclusive or of neighbouring bits, without the lowest bit of each word."""
    words = qs.reshape(len(qs), -1).view("<u2") & 0xFFFE
    return (words ^ (words >> 1)).astype("<u2").view(np.uint8)


_CODES = {
    "IQ2_K": lambda b: two_bits(b["qs"]),
    "IQ2_KS": lambda b: two_bits(b["qs"]),
    "IQ2_KL": lambda b: _by_16(b["qs"]) | (_plane(b["qh"]) << 4),
    "IQ3_K": lambda b: two_bits(b["qs"]) | (_plane(b["qh"]) << 2),
    "IQ3_KS": lambda b: two_bits(b["qs"]) | (_plane(b["qh"]) << 2),
    "IQ4_K": lambda b: _by_16(b["qs"]),
    "IQ4_KS": lambda b: _by_16(b["qs"]),
    "IQ4_KSS": lambda b: _by_16(_unfolded(b["qs"])),
    "IQ5_K": lambda b: _by_32(b["qs"]) | (_plane(b["qh"]) << 4),
    "IQ5_KS": lambda b: _by_32(b["qs"]) | (_plane(b["qh"]) << 4),
    "IQ6_K": lambda b: _by_32(b["qs"]) | (two_bits(b["qh"]) << 4),
}

# Scales and whether the second table is meant, int32 (B, G) both


def _in_order(field: np.ndarray) -> np.ndarray:
    """(B, n) bytes -> (B, 2 n) nibbles: both of a byte, then of the next."""
    return flat(bits(field, [0, 4], 15).transpose(0, 2, 1)).astype(np.int32)


def _halves(field: np.ndarray) -> np.ndarray:
    """(B, n) bytes -> (B, 2 n) nibbles: all low ones, then all high ones."""
    return nibbles(field).astype(np.int32)


def _fields(field: np.ndarray, count: int, width: int = 1) -> np.ndarray:
    """(B,) or (B, n) words -> (B, count) fields of `width` bits, lowest first."""
    whole = np.ascontiguousarray(field).view(np.uint8).reshape(len(field), -1)
    single = np.unpackbits(whole, axis=1, bitorder="little")[:, : count * width].reshape(len(field), count, width)
    return (single.astype(np.int32) << np.arange(width)).sum(axis=2)


def _iq4_k(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (_in_order(b["scales_l"]) | (_fields(b["scales_h"], 16, 2) << 4)) - 32, _fields(b["extra"], 16)


def _iq3_k(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    signs = 1 - 2 * _fields(b["scales_h"], 16)
    return (2 * _in_order(b["scales_l"]) + 1) * signs, _fields(b["extra"], 16)


def _iq2_ks(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    extra = _fields(b["extra"], 16)
    return (_in_order(b["scales"]) | (extra[:, 8:] << 4)) - 16, extra[:, :8]


def _iq3_ks(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    extra = _fields(b["extra"], 16)
    return (_halves(b["scales"]) | (extra[:, :8] << 4)) - 16, extra[:, 8:]


def _iq2_kl(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = (_halves(b["scales_l"]) | (_fields(b["scales_h"], 8, 2) << 4)) - 32
    return scales, np.zeros_like(scales)


def _by_bytes(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, 8) bytes: bit 0 says which table."""
    whole = scales.astype(np.int32)
    return (whole & 254) - 127, whole & 1


def _iq4_kss(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    words = b["qs"].reshape(len(b), -1).view("<u2").reshape(len(b), 8, 8)
    return _by_bytes(((words & 1).astype(np.int32) << np.arange(8)).sum(axis=2))


_SCALES = {
    "IQ2_K": lambda b: (_in_order(b["scales"]) - 8, _fields(b["extra"], 16)),
    "IQ3_K": _iq3_k,
    "IQ4_K": _iq4_k,
    "IQ5_K": _iq4_k,
    "IQ6_K": lambda b: (b["scales"].astype(np.int32), _fields(b["extra"], 16)),
    "IQ2_KS": _iq2_ks,
    "IQ2_KL": _iq2_kl,
    "IQ3_KS": _iq3_ks,
    "IQ4_KS": lambda b: _by_bytes(b["scales"]),
    "IQ4_KSS": _iq4_kss,
    "IQ5_KS": lambda b: _by_bytes(b["scales"]),
}

DECODERS = {name: (lambda b, name=name: _decode(name, b)) for name in _SCALES}
