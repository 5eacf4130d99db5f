"""ik_llama.cpp's types whose rows are interleaved by 4 or 8 (`_R4`, `_R8`): the same bits as in a type that is known
here, in another order.

A unit is so many rows: their scales, where rows have one, then blocks in which every bit of so many blocks has another
place. No kernel reads them as they are: `native.cpu.row_order` brings the bits back, and `kimi-lite quantize` writes a
file with it. Not here: IQ1_S_R4 and IQ1_M_R4, which have scales of their own, BF16_R16, and types without a form that
is not interleaved.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from kimi_lite.native.layouts import BY_NAME, Layout

Places = np.ndarray  # of bits: 8 * byte + bit, lowest first


@dataclass(frozen=True, slots=True)
class Interleaved:
    """`base`: the type of the rows; `num_rows`: of a unit. `places(row)`: pairs of places in a block of the base type
    and in an interleaved one, and a third place where a bit is the exclusive or of two."""

    name: str
    ggml_id: int
    base: Layout
    num_rows: int
    places: Callable[[int], list[tuple[Places, ...]]]


@cache
def sources(kind: Interleaved) -> tuple[np.ndarray, np.ndarray]:
    """int32 (rows, bits of a block): the place of each bit in an interleaved block, and of a second one or -1."""
    shape = (kind.num_rows, 8 * kind.base.block_bytes)
    first, second = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    for row in range(kind.num_rows):
        for ours, theirs, *more in kind.places(row):
            first[row, ours.ravel()] = theirs.ravel()
            if more:
                second[row, ours.ravel()] = more[0].ravel()
    assert (first >= 0).all(), kind.name
    return first, second


# Places in blocks. `at`: byte offset of a field; `row`: in the unit


def _run(at, width: int, first: int = 0) -> Places:
    """`width` bits from bit `first` of the byte `at` on, which may be many: (..., width)."""
    return (8 * np.asarray(at) + first)[..., None] + np.arange(width)


def _shifted(at, shift, width: int) -> Places:
    return (8 * np.asarray(at) + shift)[..., None] + np.arange(width)


_E32, _E = np.arange(32), np.arange(256)
_GROUP, _PLACE = _E // 32, _E % 32  # of 256 weights: which 32, which of them
_G16, _G32 = np.arange(16), np.arange(8)


def _pairs(at: int) -> Places:
    return _shifted(at + 32 * (_GROUP // 4) + _PLACE, 2 * (_GROUP % 4), 2)


def _plane(at: int) -> Places:
    return _shifted(at + _PLACE, _GROUP, 1)


def _nibbles16(at: int, elements: np.ndarray = _E) -> Places:
    group, place = elements // 32, elements % 32
    return _shifted(at + 16 * group + place % 16, 4 * (place // 16), 4)


def _nibbles32(at: int) -> Places:
    return _shifted(at + 32 * (_GROUP // 2) + _PLACE, 4 * (_GROUP % 2), 4)


def _r4_nibbles(at: int, row: int, elements: np.ndarray = _E) -> Places:
    group, place = elements // 32, elements % 32
    part = 2 * (place % 8 // 4) + place // 16
    return _shifted(at + 64 * group + 16 * part + 4 * row + place % 4, 4 * (place % 16 // 8), 4)


def _r4_pairs(at: int, row: int) -> Places:
    return _shifted(at + 32 * _GROUP + 16 * (_PLACE // 16) + 4 * row + _PLACE % 4, 2 * (_PLACE % 16 // 4), 2)


def _r4_bits(at: int, row: int, order: tuple[int, ...], elements: np.ndarray = _E) -> Places:
    group, place = elements // 32, elements % 32
    bit = np.argsort(order)[place // 4]
    return _shifted(at + 16 * group + 4 * row + place % 4, bit, 1)


def _r8_nibbles(at: int, row: int) -> Places:
    return _shifted(at + 32 * (_E32 % 16 // 4) + 4 * row + _E32 % 4, 4 * (_E32 // 16), 4)


_BIT3, _BIT5 = (0, 4, 8, 12, 16, 20, 24, 28), (0, 8, 16, 24, 4, 12, 20, 28)  # the first element of each bit's four
_BIT5K, _BIT50 = (0, 8, 4, 12, 16, 24, 20, 28), (0, 16, 4, 20, 8, 24, 12, 28)


def _number16(row: int) -> np.ndarray:
    """Of the scale of each group of 16 in the unit's list."""
    return 8 * (_G16 // 2) + 4 * (_G16 % 2) + row


def _six_bits(low: int, high: int, number: np.ndarray) -> list[Places]:
    """Low nibbles and pairs of high bits."""
    return [_shifted(low + number % 32, 4 * (number // 32), 4), _shifted(high + number % 16, 2 * (number // 16), 2)]


def _at(name: str, *fields: str) -> list[int]:
    return BY_NAME[name].offsets(*fields)


def _half(at: int) -> Places:
    return _run(at, 16)


def _step_bits(base: int, at: int, row: int) -> tuple[Places, Places]:
    """`extra` of the _K types: bit g of 16; interleaved in 8 bytes."""
    return 8 * base + _G16, 8 * (at + row + 4 * (_G16 % 2)) + _G16 // 2


def _q4_0_r8(row: int):
    d, qs = _at("Q4_0", "d", "qs")
    return [(_half(d), _half(2 * row)), (_nibbles16(qs, _E32), _r8_nibbles(16, row))]


def _q8_0_r8(row: int):
    d, qs = _at("Q8_0", "d", "qs")
    return [(_half(d), _half(2 * row)), (_run(qs + _E32, 8), _run(16 + 32 * (_E32 // 4) + 4 * row + _E32 % 4, 8))]


def _q5_0_r4(row: int):
    d, qh, qs = _at("Q5_0", "d", "qh", "qs")
    return [
        (_half(d), _half(2 * row)),
        (8 * qh + _E32[:, None], _r4_bits(8, row, _BIT50, _E32)),
        (_nibbles16(qs, _E32), _r4_nibbles(24, row, _E32)),
    ]


def _iq4_nl_r4(row: int):
    d, qs = _at("IQ4_NL", "d", "qs")
    return [(_half(d), _half(2 * row)), (_nibbles16(qs, _E32), _r4_nibbles(8, row, _E32))]


def _mxfp4_r8(row: int):
    e, qs = _at("MXFP4", "e", "qs")
    return [(_run(e, 8), _run(row, 8)), (_nibbles16(qs, _E32), _r8_nibbles(8, row))]


def _iq4_xs_r8(row: int):
    d, high, low, qs = _at("IQ4_XS", "d", "scales_h", "scales_l", "qs")
    codes = _shifted(64 + 128 * _GROUP + 32 * (_PLACE // 8) + 4 * row + _PLACE % 4, 4 * (_PLACE % 8 // 4), 4)
    scales = _six_bits(32, 16, 8 * _G32 + row)
    return [
        (_half(d), _half(2 * row)),
        (_shifted(low + _G32 // 2, 4 * (_G32 % 2), 4), scales[0]),
        (_shifted(high, 2 * _G32, 2), scales[1]),
        (_nibbles16(qs), codes),
    ]


def _iq4_ks_r4(row: int):
    scales, qs = _at("IQ4_KS", "scales", "qs")
    return [(_run(scales + _G32, 8), _run(4 * _G32 + row, 8)), (_nibbles16(qs), _r4_nibbles(32, row))]


def _iq5_ks_r4(row: int):
    scales, qs, qh = _at("IQ5_KS", "scales", "qs", "qh")
    return [
        (_run(scales + _G32, 8), _run(4 * _G32 + row, 8)),
        (_nibbles32(qs), _r4_nibbles(32, row)),
        (_plane(qh), _r4_bits(544, row, _BIT5)),
    ]


def _iq2_k_r4(row: int):
    d, extra, scales, qs = _at("IQ2_K", "d", "extra", "scales", "qs")
    number = _number16(row)
    return [
        (_half(d), _half(2 * row)),
        _step_bits(extra, 8, row),
        (_shifted(scales + _G16 // 2, 4 * (_G16 % 2), 4), _shifted(16 + number % 32, 4 * (number // 32), 4)),
        (_pairs(qs), _r4_pairs(48, row)),
    ]


def _iq3_k_r4(row: int):
    d, extra, high, low, qs, qh = _at("IQ3_K", "d", "extra", "scales_h", "scales_l", "qs", "qh")
    number = _number16(row)
    return [
        (_half(d), _half(2 * row)),
        _step_bits(extra, 8, row),
        (8 * high + _G16, 8 * (16 + number % 8) + number // 8),
        (_shifted(low + _G16 // 2, 4 * (_G16 % 2), 4), _shifted(24 + number % 32, 4 * (number // 32), 4)),
        (_pairs(qs), _r4_pairs(56, row)),
        (_plane(qh), _r4_bits(312, row, _BIT3)),
    ]


def _iq4_k_scales(row: int):
    d, extra, high, low = _at("IQ4_K", "d", "extra", "scales_h", "scales_l")  # the same in IQ5_K
    scales = _six_bits(32, 16, _number16(row))
    return [
        (_half(d), _half(2 * row)),
        _step_bits(extra, 8, row),
        (_shifted(low + _G16 // 2, 4 * (_G16 % 2), 4), scales[0]),
        (_shifted(high + _G16 // 4, 2 * (_G16 % 4), 2), scales[1]),
    ]


def _iq4_k_r4(row: int):
    [qs] = _at("IQ4_K", "qs")
    return [*_iq4_k_scales(row), (_nibbles16(qs), _r4_nibbles(64, row))]


def _iq5_k_r4(row: int):
    qs, qh = _at("IQ5_K", "qs", "qh")
    return [
        *_iq4_k_scales(row),
        (_nibbles32(qs), _r4_nibbles(64, row)),
        (_plane(qh), _r4_bits(576, row, _BIT5)),
    ]


def _q2_k_r4(row: int):
    scales, qs, d, dmin = _at("Q2_K", "scales", "qs", "d", "dmin")
    return [
        (_half(d), _half(2 * row)),
        (_half(dmin), _half(8 + 2 * row)),
        (_run(scales + _G16, 8), _run(16 + _number16(row), 8)),
        (_pairs(qs), _r4_pairs(80, row)),
    ]


def _q3_k_r4(row: int):
    hmask, qs, scales, d = _at("Q3_K", "hmask", "qs", "scales", "d")
    found = _six_bits(24, 8, _number16(row))
    return [
        (_half(d), _half(2 * row)),
        (_shifted(scales + _G16 % 8, 4 * (_G16 // 8), 4), found[0]),
        (_shifted(scales + 8 + _G16 % 4, 2 * (_G16 // 4), 2), found[1]),
        (_plane(hmask), _r4_bits(56, row, _BIT3)),
        (_pairs(qs), _r4_pairs(184, row)),
    ]


def _q4_k_scales(row: int):
    """Six bits of scale and of minimum for each 32, low nibbles apart from high pairs of bits."""
    d, dmin, scales = _at("Q4_K", "d", "dmin", "scales")  # the same in Q5_K
    number, group = 4 * _G32 + row, _G32 % 4
    places = [(_half(d), _half(2 * row)), (_half(dmin), _half(8 + 2 * row))]
    for part in range(2):  # scales, minima
        low = np.where(_G32 < 4, 8 * (scales + 4 * part + group), 8 * (scales + 8 + group) + 4 * part)
        high = np.where(_G32 < 4, 8 * (scales + 4 * part + group) + 4, 8 * (scales + 4 * part + group) + 6)
        places.append((low[:, None] + np.arange(4), _shifted(32 + number, 4 * part, 4)))
        places.append((high[:, None] + np.arange(2), _shifted(16 + number % 16, 4 * (number // 16) + 2 * part, 2)))
    return places


def _q4_k_r4(row: int):
    [qs] = _at("Q4_K", "qs")
    return [*_q4_k_scales(row), (_nibbles32(qs), _r4_nibbles(64, row))]


def _q5_k_r4(row: int):
    qh, qs = _at("Q5_K", "qh", "qs")
    return [*_q4_k_scales(row), (_plane(qh), _r4_bits(64, row, _BIT5K)), (_nibbles32(qs), _r4_nibbles(192, row))]


def _q6_k_r4(row: int):
    ql, qh, scales, d = _at("Q6_K", "ql", "qh", "scales", "d")
    half, place = _E // 128, _E % 128
    part = 4 * (_PLACE % 8 // 4) + 2 * (_PLACE % 16 // 8)
    return [
        (_half(d), _half(2 * row)),
        (_run(scales + _G16, 8), _run(8 + _number16(row), 8)),
        (_shifted(ql + 64 * half + place % 64, 4 * (place // 64), 4), _r4_nibbles(328, row)),
        (
            _shifted(qh + 32 * half + place % 32, 2 * (place // 32), 2),
            _shifted(72 + 32 * _GROUP + 4 * row + _PLACE % 4 + 16 * (_PLACE // 16), part, 2),
        ),
    ]


# The grid types: indices of points, signs


def _signs_and_scales(words: np.ndarray, row: int) -> list[tuple[Places, ...]]:
    """IQ2_XXS and IQ3_XXS: four times 7 signs and a scale of 4 bits in a word at these bytes (8,). There a word has the
    scale in the lowest bits of its bytes, and a sign is the exclusive or of two neighbours above."""
    theirs = 8 * (8 + 4 * (4 * _G32 + row))  # (8,)
    eights = theirs[:, None, None] + 8 * np.arange(4)[:, None] + np.arange(7)  # (8, 4, 7)
    ours = 8 * words[:, None, None] + 7 * np.arange(4)[:, None] + np.arange(7)
    lower = np.where(np.arange(7) == 0, -1, eights)  # bit 0 is the scale's
    return [
        (8 * words[:, None] + 28 + np.arange(4), theirs[:, None] + 8 * np.arange(4)),
        (ours, eights + 1, lower),
    ]


def _iq2_xxs_r4(row: int):
    d, qs = _at("IQ2_XXS", "d", "qs")
    group, index = np.arange(32) // 4, np.arange(32) % 4
    return [
        (_half(d), _half(2 * row)),
        *_signs_and_scales(qs + 8 * _G32 + 4, row),
        (_run(qs + 8 * group + index, 8), _run(136 + 16 * group + 4 * row + index, 8)),
    ]


def _iq3_xxs_r4(row: int):
    d, qs = _at("IQ3_XXS", "d", "qs")
    group, index = np.arange(64) // 8, np.arange(64) % 8
    return [
        (_half(d), _half(2 * row)),
        *_signs_and_scales(qs + 64 + 4 * _G32, row),
        (_run(qs + 8 * group + index, 8), _run(136 + 32 * group + 8 * row + index, 8)),
    ]


def _iq2_xs_r4(row: int):
    d, qs, scales = _at("IQ2_XS", "d", "qs", "scales")
    ours, theirs = 8 * (qs + 2 * np.arange(32)), 8 * (8 + 2 * (16 * (np.arange(32) // 4) + 4 * row + np.arange(32) % 4))
    signs = theirs[:, None] + 9 + np.arange(7)
    return [
        (_half(d), _half(2 * row)),
        (ours[:, None] + np.arange(9), theirs[:, None] + np.arange(9)),
        (ours[:, None] + 9 + np.arange(7), signs, np.where(np.arange(7) == 0, -1, signs - 1)),
        (_run(scales + _G32, 8), _run(264 + 4 * _G32 + row, 8)),
    ]


def _iq2_s_r4(row: int):
    d, qs, signs, qh, scales = _at("IQ2_S", "d", "qs", "signs", "qh", "scales")
    number = np.arange(32)
    theirs = 16 * (number // 4) + 4 * row + number % 4
    return [
        (_half(d), _half(2 * row)),
        (_run(qs + number, 8), _run(8 + theirs, 8)),
        (_run(qh + _G32, 8), _run(136 + 4 * _G32 + row, 8)),
        (_run(signs + number, 8), _run(168 + theirs, 8)),
        (_run(scales + _G32, 8), _run(296 + 4 * _G32 + row, 8)),
    ]


def _iq3_s_r4(row: int):
    d, qs, qh, signs, scales = _at("IQ3_S", "d", "qs", "qh", "signs", "scales")
    group, index = np.arange(64) // 8, np.arange(64) % 8
    number = 4 * _G32 + row
    return [
        (_half(d), _half(2 * row)),
        (_run(qs + 8 * group + index, 8), _run(8 + 32 * group + 8 * (index % 4) + 4 * (index // 4) + row, 8)),
        (_run(qh + _G32, 8), _run(264 + 4 * _G32 + row, 8)),
        (8 * signs + _E, 8 * (296 + 16 * _GROUP + 4 * row + _PLACE % 4) + _PLACE // 4),
        (_shifted(scales + _G32 // 2, 4 * (_G32 % 2), 4), _shifted(424 + number % 16, 4 * (number // 16), 4)),
    ]


@cache
def interleaved() -> dict[int, Interleaved]:
    """By their numbers, which are the base type's and 200."""
    found = {
        **{"Q4_0": (8, _q4_0_r8), "Q8_0": (8, _q8_0_r8), "Q5_0": (4, _q5_0_r4), "IQ4_NL": (4, _iq4_nl_r4)},
        **{"Q2_K": (4, _q2_k_r4), "Q3_K": (4, _q3_k_r4), "Q4_K": (4, _q4_k_r4), "Q5_K": (4, _q5_k_r4)},
        **{"Q6_K": (4, _q6_k_r4), "IQ4_XS": (8, _iq4_xs_r8), "IQ2_K": (4, _iq2_k_r4), "IQ3_K": (4, _iq3_k_r4)},
        **{"IQ4_K": (4, _iq4_k_r4), "IQ5_K": (4, _iq5_k_r4), "IQ4_KS": (4, _iq4_ks_r4), "IQ5_KS": (4, _iq5_ks_r4)},
        **{"IQ2_XXS": (4, _iq2_xxs_r4), "IQ2_XS": (4, _iq2_xs_r4), "IQ2_S": (4, _iq2_s_r4)},
        **{"IQ3_XXS": (4, _iq3_xxs_r4), "IQ3_S": (4, _iq3_s_r4)},
    }
    kinds = [
        Interleaved(f"{name}_R{num_rows}", 200 + BY_NAME[name].ggml_id, BY_NAME[name], num_rows, places)
        for name, (num_rows, places) in found.items()
    ]
    mxfp4 = Interleaved("MXFP4_R8", 353, BY_NAME["MXFP4"], 8, _mxfp4_r8)
    return {kind.ggml_id: kind for kind in (*kinds, mxfp4)}
