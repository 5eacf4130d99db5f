"""The decode formulas, as ggml has them (ggml-quants.c, dequantize_row_*)."""

import numpy as np

from kimi_lite.native.types.code_books import code_book
from kimi_lite.native.types.reference_parts import bits, column, even_signs, flat, in_words, signed, signs_of


def _iq2_xxs(b):
    words = np.ascontiguousarray(b["qs"]).view("<u4").reshape(len(b), 8, 2)
    index = np.ascontiguousarray(words[:, :, 0]).view(np.uint8)  # (B, 32)
    signs, factor = in_words(words[:, :, 1], lambda s: (0.5 + s) * 0.25)
    return signed(code_book("IQ2_XXS")[index], signs, column(b["d"]) * factor)


def _iq2_scales(b):
    """(B, 16): 4 bits for every 16 weights."""
    nibbles = bits(b["scales"], [0, 4], 15).transpose(0, 2, 1)
    return column(b["d"]) * ((0.5 + flat(nibbles).astype(np.float32)) * 0.25)


def _iq2_xs(b):
    return signed(code_book("IQ2_XS")[b["qs"] & 511], even_signs(b["qs"] >> 9), _iq2_scales(b))


def _iq2_s(b):
    high = (b["qh"][:, :, None].astype(np.uint16) >> np.array([0, 2, 4, 6], np.uint16)) & 3
    index = b["qs"] | (flat(high) << 8)
    return signed(code_book("IQ2_S")[index], signs_of(b["signs"]), _iq2_scales(b))


DECODERS = {
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
}
