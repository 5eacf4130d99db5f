"""The decode formula of every GGUF type in numpy: slow, obvious, and independent of the kernels and of other packages.

`dequantize` is what `native.reference` multiplies with and what tests compare the kernels' `values` and `unpack` to.
Byte layouts are drawn in `native.layouts`; the formulas are ggml's (ggml-quants.c, dequantize_row_*). Only the code
books of the IQ types come from the `gguf` package.
"""

from collections.abc import Callable

import numpy as np

from kimi_lite.native.layouts import BY_NAME

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # twice the E2M1 values


def dequantize(data: np.ndarray, name: str) -> np.ndarray:
    """uint8 (rows, row_bytes) of GGUF type `name` -> float32 (rows, K)."""
    layout = BY_NAME[name]
    assert data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] % layout.block_bytes == 0, (name, data.shape)
    blocks = np.ascontiguousarray(data).reshape(-1).view(layout.dtype)  # (B,)
    values = _DECODERS[name](blocks)  # (B, block_size)
    assert values.shape == (len(blocks), layout.block_size), (name, values.shape)
    return values.astype(np.float32).reshape(len(data), -1)


def _column(field: np.ndarray) -> np.ndarray:
    """(B,) or (B, G) -> float32 (B, 1) or (B, G, 1), to multiply groups of weights with."""
    return field.astype(np.float32)[..., None]


def _bits(field: np.ndarray, shifts: list[int], mask: int) -> np.ndarray:
    """(B, n) bytes -> (B, len(shifts), n) codes."""
    return (field[:, None, :] >> np.array(shifts, field.dtype)[None, :, None]) & mask


def _nibbles(qs: np.ndarray) -> np.ndarray:
    """(B, n) bytes -> (B, 2n) codes: the low nibbles, then the high ones."""
    return _bits(qs, [0, 4], 15).reshape(len(qs), -1)


def _two_bits(qs: np.ndarray) -> np.ndarray:
    """(B, 64) bytes -> (B, 256) codes: per 32 bytes, four times 32 codes."""
    return _bits(qs.reshape(-1, 32), [0, 2, 4, 6], 3).reshape(len(qs), 256)


def _grouped(codes: np.ndarray, group: int) -> np.ndarray:
    return codes.reshape(len(codes), -1, group).astype(np.float32)


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


# Floats and blocks of 32 ----------------------------------------------------------------------------------------------


def _bf16(b):
    return (b["x"].astype(np.uint32) << 16).view(np.float32)[:, None]


def _fifth_bit(b):
    """(B, 32) fifth bits of Q5_0 and Q5_1, in place."""
    return ((b["qh"][:, None] >> np.arange(32, dtype=np.uint32)) & 1).astype(np.uint8) << 4


def _mxfp4(b):
    exponent = b["e"].astype(np.float64) - 128  # E8M0, halved because the table is doubled
    return _FP4[_nibbles(b["qs"])] * np.exp2(exponent)[:, None]


def _nvfp4(b):
    d = b["d"].astype(np.int32)  # (B, 4) UE4M3, halved because the table is doubled
    exponent, mantissa = (d >> 3) & 15, d & 7
    scale = np.where(exponent == 0, mantissa * 2.0**-10, (1 + mantissa / 8) * np.exp2(exponent - 8.0))
    scale[(d == 0) | (d == 0x7F)] = 0
    codes = _nibbles(b["qs"].reshape(-1, 8)).reshape(len(b), 4, 16)
    return _flat(_FP4[codes] * scale[:, :, None])


# K types --------------------------------------------------------------------------------------------------------------


def _q2_k(b):
    scale, minimum = _column(b["d"]) * (b["scales"] & 15), _column(b["dmin"]) * (b["scales"] >> 4)
    return _flat(_grouped(_two_bits(b["qs"]), 16) * scale[..., None] - minimum[..., None])


def _q3_k(b):
    high = _bits(b["hmask"], list(range(8)), 1).reshape(len(b), 256)
    codes = _two_bits(b["qs"]).astype(np.int32) - np.where(high == 1, 0, 4)
    s = b["scales"].astype(np.int32)
    low = np.concatenate([s[:, :8] & 15, s[:, :8] >> 4], axis=1)  # (B, 16)
    upper = np.concatenate([(s[:, 8:12] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale = _column(b["d"]) * ((low | (upper << 4)) - 32)
    return _flat(_grouped(codes, 16) * scale[..., None])


def _six_bits(b):
    """Scales and minima (B, 8) of Q4_K and Q5_K."""
    s = b["scales"].astype(np.int32)
    first, second, third = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scale = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minimum = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return _column(b["d"]) * scale, _column(b["dmin"]) * minimum


def _pairs_of_nibbles(qs):
    """(B, 128) bytes -> (B, 256): per 32 bytes, 32 low nibbles and 32 high ones."""
    return _nibbles(qs.reshape(-1, 32)).reshape(len(qs), 256)


def _q4_k(b):
    scale, minimum = _six_bits(b)
    return _flat(_grouped(_pairs_of_nibbles(b["qs"]), 32) * scale[..., None] - minimum[..., None])


def _q5_k(b):
    scale, minimum = _six_bits(b)
    codes = _pairs_of_nibbles(b["qs"]) | (_bits(b["qh"], list(range(8)), 1).reshape(len(b), 256) << 4)
    return _flat(_grouped(codes, 32) * scale[..., None] - minimum[..., None])


def _q6_k(b):
    low = _nibbles(b["ql"].reshape(-1, 64)).reshape(len(b), 256)
    codes = low | (_two_bits(b["qh"]) << 4)
    return _flat(_grouped(codes.astype(np.int32) - 32, 16) * (_column(b["d"]) * b["scales"])[..., None])


# Ternary and two-valued -----------------------------------------------------------------------------------------------


def _trits(packed: np.ndarray, count: int) -> np.ndarray:
    """(B, n) bytes -> (B, count * n): the first digit of every byte, then the second, ..."""
    powers = 3 ** np.arange(count, dtype=np.uint16)
    remainders = packed[:, None, :] * powers[None, :, None] & 255
    return _flat(remainders * 3 >> 8)


def _tq1_0(b):
    codes = np.concatenate([_trits(b["qs"][:, :32], 5), _trits(b["qs"][:, 32:], 5), _trits(b["qh"], 4)], axis=1)
    return (codes.astype(np.float32) - 1) * _column(b["d"])


def _q1_0(b):
    ones = np.unpackbits(b["qs"], axis=1, bitorder="little")
    return np.where(ones == 1, _column(b["d"]), -_column(b["d"]))


def _q2_0(b):
    codes = _bits(b["qs"], [0, 2, 4, 6], 3).transpose(0, 2, 1)  # four neighbours a byte
    return (_flat(codes).astype(np.float32) - 1) * _column(b["d"])


# Code books -----------------------------------------------------------------------------------------------------------


def _book(name: str) -> np.ndarray:
    """float32 (entries, 8 or 4) of an IQ type."""
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    return kind.grid[0, 0]


def _signs_of(masks: np.ndarray) -> np.ndarray:
    """(B, n) sign bytes -> (B, 8 n) of +1 and -1."""
    return 1 - 2 * np.unpackbits(masks.astype(np.uint8), axis=1, bitorder="little").astype(np.float32)


def _even_signs(seven: np.ndarray) -> np.ndarray:
    """(B, n) of 7 bits -> (B, 8 n) of +1 and -1; the eighth bit makes the number of minus signs even."""
    bits = np.unpackbits(seven.astype(np.uint8)[..., None], axis=2, bitorder="little")  # (B, n, 8)
    parity = bits.sum(axis=2, dtype=np.uint8) & 1
    return _signs_of(seven | (parity << 7))


def _signed(values: np.ndarray, signs: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(B, 256) book values times signs times a scale per group (B, G)."""
    signed = _flat(values) * signs
    return _flat(_grouped(signed, 256 // scale.shape[1]) * scale[..., None])


def _in_words(words: np.ndarray, scale_of: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """uint32 (B, 8) of four 7-bit signs and a 4-bit scale -> signs (B, 256), factors (B, 8)."""
    seven = (words[:, :, None] >> np.array([0, 7, 14, 21], np.uint32)) & 127
    return _even_signs(_flat(seven)), scale_of((words >> 28).astype(np.float32))


def _iq2_xxs(b):
    words = np.ascontiguousarray(b["qs"]).view("<u4").reshape(len(b), 8, 2)
    index = np.ascontiguousarray(words[:, :, 0]).view(np.uint8)  # (B, 32)
    signs, factor = _in_words(words[:, :, 1], lambda s: (0.5 + s) * 0.25)
    return _signed(_book("IQ2_XXS")[index], signs, _column(b["d"]) * factor)


def _iq3_xxs(b):
    signs, factor = _in_words(b["sas"], lambda s: (0.5 + s) * 0.5)
    return _signed(_book("IQ3_XXS")[b["qs"]], signs, _column(b["d"]) * factor)


def _iq2_scales(b):
    """(B, 16): 4 bits for every 16 weights."""
    nibbles = _bits(b["scales"], [0, 4], 15).transpose(0, 2, 1)
    return _column(b["d"]) * ((0.5 + _flat(nibbles).astype(np.float32)) * 0.25)


def _iq2_xs(b):
    return _signed(_book("IQ2_XS")[b["qs"] & 511], _even_signs(b["qs"] >> 9), _iq2_scales(b))


def _iq2_s(b):
    high = (b["qh"][:, :, None].astype(np.uint16) >> np.array([0, 2, 4, 6], np.uint16)) & 3
    index = b["qs"] | (_flat(high) << 8)
    return _signed(_book("IQ2_S")[index], _signs_of(b["signs"]), _iq2_scales(b))


def _iq3_s(b):
    high = (b["qh"][:, :, None].astype(np.uint16) >> np.arange(8, dtype=np.uint16)) & 1
    index = b["qs"] | (_flat(high) << 8)
    nibbles = _bits(b["scales"], [0, 4], 15).transpose(0, 2, 1)
    scale = _column(b["d"]) * (1 + 2 * _flat(nibbles).astype(np.float32))
    return _signed(_book("IQ3_S")[index], _signs_of(b["signs"]), scale)


def _iq1_s(b):
    qh = b["qh"].astype(np.int32)
    high = (qh[:, :, None] >> np.array([0, 3, 6, 9])) & 7
    values = _book("IQ1_S")[b["qs"] | (_flat(high) << 8)].reshape(len(b), 8, 32)
    scale = _column(b["d"]) * (2 * ((qh >> 12) & 7) + 1)
    delta = np.where(qh & 0x8000, np.float32(-0.125), np.float32(0.125))
    return _flat(scale[..., None] * (values + delta[..., None]))


def _iq1_m(b):
    sc = b["scales"].astype(np.int32)  # (B, 4)
    bits = (sc[:, 0] >> 12) | ((sc[:, 1] >> 8) & 0xF0) | ((sc[:, 2] >> 4) & 0xF00) | (sc[:, 3] & 0xF000)
    three = _flat((sc[:, :, None] >> np.array([0, 3, 6, 9])) & 7)  # (B, 16)
    scale = _column(bits.astype(np.uint16).view(np.float16)) * (2 * three + 1)
    nibble = _flat(_bits(b["qh"], [0, 4], 15).transpose(0, 2, 1)).astype(np.int32)  # (B, 32)
    values = _book("IQ1_S")[b["qs"] | ((nibble & 7) << 8)]  # (B, 32, 8)
    delta = np.where(nibble & 8, np.float32(-0.125), np.float32(0.125))
    return _flat(np.repeat(scale, 2, axis=1)[..., None] * (values + delta[..., None]))


def _iq4_xs(b):
    low = _flat(_bits(b["scales_l"], [0, 4], 15).transpose(0, 2, 1)).astype(np.int32)  # (B, 8)
    high = (b["scales_h"][:, None].astype(np.int32) >> (2 * np.arange(8))) & 3
    codes = _nibbles(b["qs"].reshape(-1, 16)).reshape(len(b), 8, 32)
    return _flat(_IQ4[codes] * (_column(b["d"]) * ((low | (high << 4)) - 32))[..., None])


_DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda b: b["x"][:, None],
    "F16": lambda b: b["x"].astype(np.float32)[:, None],
    "BF16": _bf16,
    "Q4_0": lambda b: (_nibbles(b["qs"]).astype(np.float32) - 8) * _column(b["d"]),
    "Q4_1": lambda b: _nibbles(b["qs"]) * _column(b["d"]) + _column(b["m"]),
    "Q5_0": lambda b: ((_nibbles(b["qs"]) | _fifth_bit(b)).astype(np.float32) - 16) * _column(b["d"]),
    "Q5_1": lambda b: (_nibbles(b["qs"]) | _fifth_bit(b)) * _column(b["d"]) + _column(b["m"]),
    "Q8_0": lambda b: b["qs"] * _column(b["d"]),
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ3_XXS": _iq3_xxs,
    "IQ1_S": _iq1_s,
    "IQ4_NL": lambda b: _IQ4[_nibbles(b["qs"])] * _column(b["d"]),
    "IQ3_S": _iq3_s,
    "IQ2_S": _iq2_s,
    "IQ4_XS": _iq4_xs,
    "IQ1_M": _iq1_m,
    "TQ1_0": _tq1_0,
    "TQ2_0": lambda b: (_two_bits(b["qs"]).astype(np.float32) - 1) * _column(b["d"]),
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
}
