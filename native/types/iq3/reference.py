"""The decode formulas, as ggml has them (ggml-quants.c, dequantize_row_*)."""

import numpy as np

from kimi_lite.native.types.code_books import code_book
from kimi_lite.native.types.reference_parts import bits, column, flat, in_words, signed, signs_of


def _iq3_xxs(b):
    signs, factor = in_words(b["sas"], lambda s: (0.5 + s) * 0.5)
    return signed(code_book("IQ3_XXS")[b["qs"]], signs, column(b["d"]) * factor)


def _iq3_s(b):
    high = (b["qh"][:, :, None].astype(np.uint16) >> np.arange(8, dtype=np.uint16)) & 1
    index = b["qs"] | (flat(high) << 8)
    nibbles = bits(b["scales"], [0, 4], 15).transpose(0, 2, 1)
    scale = column(b["d"]) * (1 + 2 * flat(nibbles).astype(np.float32))
    return signed(code_book("IQ3_S")[index], signs_of(b["signs"]), scale)


DECODERS = {
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
