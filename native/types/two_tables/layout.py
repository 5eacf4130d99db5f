"""Super-blocks of 256: a code of 2 to 6 bits stands for a value of one of two tables, of which the second is STEP
higher everywhere. Each 16 weights (`_K`), or each 32 (`_KS`, `_KSS`), have a scale and say which table. Rows of the
latter have a scale in front, blocks of the former one of their own. A code of IQ2_KL names two neighbours.

Codes: bits 0..1 of 32 bytes, then bits 2..3, ..., then of the next 32 (IQ2, IQ3, the high bits of IQ6_K); nibbles of 16
bytes, low ones first (IQ4), or of 32 (IQ5, IQ6); one more bit of code j of group g of 32 is bit g of qh[j]. Scales are
nibbles, with higher bits elsewhere; IQ4_KS and IQ5_KS have bytes whose bit 0 says which table. IQ4_KSS has them
in the lowest bits of its 16-bit words, whose other bits are the running exclusive or of the codes' bits.
"""

from kimi_lite.native.types.layout import F16, F32, I8, QK_K, U8, Layout
from kimi_lite.native.types.sixteen_values.layout import IQ4_VALUES

_U16 = "<u2"


def _by_16(name: str, ggml_id: int, max_code: int, *fields: tuple) -> Layout:
    fields = (("d", F16), ("extra", _U16), *fields)
    return Layout(name, ggml_id, QK_K, fields, "block256", 16, encoder="none", is_signed=True, max_code=max_code)


def _by_32(name: str, ggml_id: int, max_code: int, row_scale: str, *fields: tuple) -> Layout:
    form = {"encoder": "none", "is_signed": True, "row_scale": row_scale, "max_code": max_code}
    return Layout(name, ggml_id, QK_K, fields, "block256", 32, **form)


IQ2_K = _by_16("IQ2_K", 137, 31, ("scales", U8, 8), ("qs", U8, 64))
IQ3_K = _by_16("IQ3_K", 138, 63, ("scales_h", _U16), ("scales_l", U8, 8), ("qs", U8, 64), ("qh", U8, 32))
IQ4_K = _by_16("IQ4_K", 139, 127, ("scales_h", U8, 4), ("scales_l", U8, 8), ("qs", U8, 128))
IQ5_K = _by_16("IQ5_K", 140, 126, ("scales_h", U8, 4), ("scales_l", U8, 8), ("qs", U8, 128), ("qh", U8, 32))
IQ6_K = _by_16("IQ6_K", 141, 127, ("scales", I8, 16), ("qs", U8, 128), ("qh", U8, 64))
IQ2_KS = _by_32("IQ2_KS", 145, 31, F16, ("extra", _U16), ("scales", U8, 4), ("qs", U8, 64))
IQ2_KL = _by_32("IQ2_KL", 157, 63, F16, ("scales_h", _U16), ("scales_l", U8, 4), ("qs", U8, 64), ("qh", U8, 16))
IQ3_KS = _by_32("IQ3_KS", 156, 63, F16, ("extra", _U16), ("scales", U8, 4), ("qs", U8, 64), ("qh", U8, 32))
IQ4_KS = _by_32("IQ4_KS", 144, 127, F32, ("scales", U8, 8), ("qs", U8, 128))
IQ4_KSS = _by_32("IQ4_KSS", 146, 127, F32, ("qs", U8, 128))
IQ5_KS = _by_32("IQ5_KS", 152, 126, F32, ("scales", U8, 8), ("qs", U8, 128), ("qh", U8, 32))

LAYOUTS = (
    IQ2_K,
    IQ3_K,
    IQ4_K,
    IQ5_K,
    IQ6_K,
    IQ2_KS,
    IQ2_KL,
    IQ3_KS,
    IQ4_KS,
    IQ4_KSS,
    IQ5_KS,
)

TWO, THREE, FOUR = (-31, -13, 1, 17), (-63, -40, -23, -10, 1, 13, 28, 47), IQ4_VALUES
FIVE = (
    *(-126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6),
    *(-1, 5, 11, 17, 23, 29, 36, 43, 51, 59, 68, 77, 87, 97, 109, 121),
)
# A cubic, rounded: what ik_llama.cpp's products multiply; its conversion to floats does not round.
SIX = tuple(round(-127 + q * (6.2568 + q * (-0.11218 + q * 0.0011972))) for q in range(64))
# The even elements of IQ2_KL's 32 pairs, then the odd ones, as indices of THREE.
_EVEN = (0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7)
_ODD = (2, 5, 0, 3, 5, 7, 1, 2, 4, 5, 6, 0, 4, 5, 7, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 0, 2, 4, 6, 7, 2, 5)
PAIRS = tuple(THREE[index] for index in (*_EVEN, *_ODD))

VALUES = {
    **{"IQ2_K": TWO, "IQ2_KS": TWO, "IQ2_KL": PAIRS, "IQ3_K": THREE, "IQ3_KS": THREE},
    **{"IQ4_K": FOUR, "IQ4_KS": FOUR, "IQ4_KSS": FOUR, "IQ5_K": FIVE, "IQ5_KS": FIVE, "IQ6_K": SIX},
}
STEPS = {TWO: 5, PAIRS: 0, THREE: 4, FOUR: 4, FIVE: 2, SIX: 1}  # what the second table has more
OFFSETS = {TWO: 31, PAIRS: 63, THREE: 63}  # makes small values unsigned, so that integers take their scales
