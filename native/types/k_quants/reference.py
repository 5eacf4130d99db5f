"""The decode formulas, as ggml has them (ggml-quants.c, dequantize_row_*)."""

import numpy as np

from kimi_lite.native.types.reference_parts import bits, column, flat, grouped, nibbles, two_bits


def _q2_k(b):
    scale, minimum = column(b["d"]) * (b["scales"] & 15), column(b["dmin"]) * (b["scales"] >> 4)
    return flat(grouped(two_bits(b["qs"]), 16) * scale[..., None] - minimum[..., None])


def _q3_k(b):
    high = bits(b["hmask"], list(range(8)), 1).reshape(len(b), 256)
    codes = two_bits(b["qs"]).astype(np.int32) - np.where(high == 1, 0, 4)
    s = b["scales"].astype(np.int32)
    low = np.concatenate([s[:, :8] & 15, s[:, :8] >> 4], axis=1)  # (B, 16)
    upper = np.concatenate([(s[:, 8:12] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale = column(b["d"]) * ((low | (upper << 4)) - 32)
    return flat(grouped(codes, 16) * scale[..., None])


def _six_bits(b):
    """Scales and minima (B, 8) of Q4_K and Q5_K."""
    s = b["scales"].astype(np.int32)
    first, second, third = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scale = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minimum = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return column(b["d"]) * scale, column(b["dmin"]) * minimum


def _pairs_of_nibbles(qs):
    """(B, 128) bytes -> (B, 256): per 32 bytes, 32 low nibbles and 32 high ones."""
    return nibbles(qs.reshape(-1, 32)).reshape(len(qs), 256)


def _q4_k(b):
    scale, minimum = _six_bits(b)
    return flat(grouped(_pairs_of_nibbles(b["qs"]), 32) * scale[..., None] - minimum[..., None])


def _q5_k(b):
    scale, minimum = _six_bits(b)
    codes = _pairs_of_nibbles(b["qs"]) | (bits(b["qh"], list(range(8)), 1).reshape(len(b), 256) << 4)
    return flat(grouped(codes, 32) * scale[..., None] - minimum[..., None])


def _q6_k(b):
    low = nibbles(b["ql"].reshape(-1, 64)).reshape(len(b), 256)
    codes = low | (two_bits(b["qh"]) << 4)
    return flat(grouped(codes.astype(np.int32) - 32, 16) * (column(b["d"]) * b["scales"])[..., None])


DECODERS = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
