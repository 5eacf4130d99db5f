"""The decode formulas, as ggml has them (ggml-quants.c, dequantize_row_*)."""

import numpy as np

from kimi_lite.native.types.code_books import code_book
from kimi_lite.native.types.reference_parts import bits, column, flat


def _iq1_s(b):
    qh = b["qh"].astype(np.int32)
    high = (qh[:, :, None] >> np.array([0, 3, 6, 9])) & 7
    values = code_book("IQ1_S")[b["qs"] | (flat(high) << 8)].reshape(len(b), 8, 32)
    scale = column(b["d"]) * (2 * ((qh >> 12) & 7) + 1)
    delta = np.where(qh & 0x8000, np.float32(-0.125), np.float32(0.125))
    return flat(scale[..., None] * (values + delta[..., None]))


def _iq1_m(b):
    sc = b["scales"].astype(np.int32)  # (B, 4)
    d_bits = (sc[:, 0] >> 12) | ((sc[:, 1] >> 8) & 0xF0) | ((sc[:, 2] >> 4) & 0xF00) | (sc[:, 3] & 0xF000)
    three = flat((sc[:, :, None] >> np.array([0, 3, 6, 9])) & 7)  # (B, 16)
    scale = column(d_bits.astype(np.uint16).view(np.float16)) * (2 * three + 1)
    nibble = flat(bits(b["qh"], [0, 4], 15).transpose(0, 2, 1)).astype(np.int32)  # (B, 32)
    values = code_book("IQ1_S")[b["qs"] | ((nibble & 7) << 8)]  # (B, 32, 8)
    delta = np.where(nibble & 8, np.float32(-0.125), np.float32(0.125))
    return flat(np.repeat(scale, 2, axis=1)[..., None] * (values + delta[..., None]))


DECODERS = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
}
