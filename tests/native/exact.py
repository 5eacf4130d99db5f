"""The arithmetic of an expert, step by step in numpy: what the kernels of both sides must give, bit for bit.

Written from the rule (`native.cpu.dot`, "The order of sums") and not from the kernels: integers come out of the
reference decoders, run on blocks whose scales were replaced by one; the float32 part is numpy's, with a fused
multiply-add of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference import quantize_activations
from kimi_lite.native.reference_types import dequantize, with_row_scales
from kimi_lite.native.types.two_tables import layout as two_tables
from kimi_lite.native.types.two_tables.reference import parts as two_tables_parts

LANES = 16
F32 = np.float32


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once: in float64 rounded to odd, from which rounding to float32 is exact."""
    with np.errstate(all="ignore"):
        product, c64 = np.asarray(a, np.float64) * np.asarray(b, np.float64), np.asarray(c, np.float64)
        total = product + c64
        back = total - product
        lost = (product - (total - back)) + (c64 - back)  # what the sum left out (Knuth's two-sum)
        bits = np.atleast_1d(total).view(np.int64)
        is_inexact = np.isfinite(total) & (lost != 0) & ((bits.reshape(total.shape) & 1) == 0)
        step = np.where((lost > 0) == (total > 0), 1, -1)
        odd = (bits.reshape(total.shape) + np.where(is_inexact, step, 0)).view(np.float64)
        return odd.astype(F32).reshape(total.shape)


def lanes_summed(acc: np.ndarray) -> np.ndarray:
    """(..., 2^n) -> (...,): the upper half added to the lower one, again and again."""
    while acc.shape[-1] > 1:
        half = acc.shape[-1] // 2
        acc = acc[..., :half] + acc[..., half:]
    return acc[..., 0]


def _with(blocks: np.ndarray, **fields: object) -> np.ndarray:
    """A copy with other contents of these fields."""
    copy = blocks.copy()
    for name, value in fields.items():
        copy[name] = value(copy[name]) if callable(value) else value
    return copy


def _integers(name: str, blocks: np.ndarray, unit: int = 1) -> np.ndarray:
    """Blocks (B,) whose scale is one -> int64 (B, block size): the weights in units of 1 / unit."""
    rows, row_scale = np.ascontiguousarray(blocks).view(np.uint8).reshape(len(blocks), -1), BY_NAME[name].row_scale
    if row_scale:
        one = np.ones((len(rows), 1), row_scale).view(np.uint8)
        rows = np.concatenate([one, rows], axis=1)
    weights = dequantize(rows, name)
    return np.rint(weights.astype(np.float64) * unit).astype(np.int64)


def _iq1_m_one(words: np.ndarray) -> np.ndarray:
    """The scales' words with the nibbles of a float16 one, 0x3C00."""
    return (words & 0x0FFF) | np.array([0, 0, 0xC000, 0x3000], np.uint16)


def _iq1_m_d(words: np.ndarray) -> np.ndarray:
    nibbles = (words >> 12).astype(np.uint16) << np.array([0, 4, 8, 12], np.uint16)
    return np.bitwise_or.reduce(nibbles, axis=-1).astype(np.uint16).view(np.float16).astype(F32)


class SuperBlocks(NamedTuple):
    """(N, B) super-blocks: codes times scales, what is taken off, and the float32 scales."""

    codes: np.ndarray  # int64 (N, B, 256)
    taken: np.ndarray | None  # int64 (N, B, 256) <= 0: of every weight, summed by groups
    group: int  # of `taken`: 16 (a group for each of 16 lanes) or 32 (lanes 0..7)
    unit: np.ndarray  # float32 (N, B)
    minima: np.ndarray | None = None  # int64 (N, B, 8 or 16), with
    minimum: np.ndarray | None = None  # float32 (N, B)


_CODES = {  # fields that hold codes and what is left of them for the code zero; how weights are counted; groups
    "Q3_K": ({"qs": 0, "hmask": 0}, 1, 32),
    "Q6_K": ({"ql": 0, "qh": 0}, 1, 32),
    "TQ1_0": ({"qs": 0, "qh": 0}, 1, 16),
    "TQ2_0": ({"qs": 0}, 1, 16),
    "IQ1_S": ({"qs": 0, "qh": lambda qh: qh & 0xF000}, 8, 16),
    "IQ1_M": ({"qs": 0, "qh": 0x88}, 8, 16),
    "IQ2_XXS": ({}, 8, 0),
    "IQ2_XS": ({}, 8, 0),
    "IQ2_S": ({}, 8, 0),
    "IQ3_XXS": ({}, 4, 0),
    "IQ3_S": ({}, 1, 0),
    "Q2_K": ({}, 1, 0),
    "Q4_K": ({}, 1, 0),
    "Q5_K": ({}, 1, 0),
    "IQ3_KT": ({}, 1, 0),
}


def _super_blocks(name: str, blocks: np.ndarray) -> SuperBlocks:
    zero_codes, unit, group = _CODES[name]
    shape, flat = blocks.shape, blocks.reshape(-1)
    if name == "IQ1_M":
        d, one = _iq1_m_d(flat["scales"]), _with(flat, scales=_iq1_m_one)
    elif BY_NAME[name].row_scale:
        d, one = np.ones(len(flat), F32), flat.copy()
    else:
        d, one = flat["d"].astype(F32), _with(flat, d=1)
    minima = minimum = None
    if "dmin" in flat.dtype.names:
        size = BY_NAME[name].group
        minima = -_integers(name, _with(flat, d=0, dmin=1))[:, ::size].reshape(*shape, -1)
        minimum = flat["dmin"].astype(F32).reshape(shape)
        one["dmin"] = 0
    weights = _integers(name, one, unit).reshape(*shape, 256)
    taken = _integers(name, _with(one, **zero_codes), unit).reshape(*shape, 256) if group else None
    codes = weights if taken is None else weights - taken
    return SuperBlocks(codes, taken, group, (d * F32(1 / unit)).reshape(shape), minima, minimum)


def _by_lanes(products: np.ndarray) -> np.ndarray:
    """(..., 256) -> (..., 4, 16): four neighbours a lane, four chunks of 64."""
    return products.reshape(*products.shape[:-1], 4, LANES, 4).sum(axis=-1)


def _first_lanes(groups: np.ndarray) -> np.ndarray:
    """(..., 8) -> (..., 16): zeros behind."""
    return np.concatenate([groups, np.zeros_like(groups)], axis=-1)


def _two_tables_values(name: str, data: np.ndarray, x: np.ndarray, bias: int) -> np.ndarray:
    """uint8 (N, row_bytes), int64 (B, 256) -> float32 (N, B, 16): small values as integers, large ones by chunks."""
    shape, values = BY_NAME[name].blocks(data).shape, two_tables.VALUES[name]
    parts = two_tables_parts(name, with_row_scales(BY_NAME[name], data).reshape(-1))
    scales, steps = (
        np.repeat(each.astype(np.int64), 16 // each.shape[1], axis=1).reshape(*shape, 16)
        for each in (parts.scales, parts.steps)
    )
    unit = np.ones(shape, F32) if BY_NAME[name].row_scale else parts.unit.reshape(shape)
    codes, sums = parts.values.reshape(*shape, 256).astype(np.int64), x.reshape(len(x), 16, 16).sum(axis=-1)
    if values in two_tables.OFFSETS:
        offset = two_tables.OFFSETS[values]
        totals = _by_lanes((codes + offset) * x * np.repeat(scales, 16, axis=-1)).sum(axis=-2)
        taken = (scales * (steps - offset) * sums).reshape(*shape, 8, 2).sum(axis=-1)
        return (totals + _first_lanes(taken)).astype(F32) * unit[..., None]
    factors = scales.astype(F32) * unit[..., None]
    return _chunks((codes + bias) * x, factors, factors * sums.astype(F32) * (steps - bias).astype(F32))


def _super_values(name: str, blocks: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(N, B) blocks, int64 (B, 256) -> float32 (N, B, 16)."""
    parts = _super_blocks(name, blocks)
    totals = _by_lanes(parts.codes * x).sum(axis=-2)  # (N, B, 16)
    if parts.taken is not None:
        sums = (parts.taken * x).reshape(*parts.taken.shape[:-1], -1, parts.group).sum(axis=-1)
        totals = totals + (sums if parts.group == 16 else _first_lanes(sums))
    values, unit = totals.astype(F32), parts.unit[..., None]
    if parts.minima is None:
        return values * unit
    sums = x.reshape(len(x), -1, BY_NAME[name].group).sum(axis=-1)
    if name == "Q2_K":
        minima = -(parts.minima * sums).reshape(*blocks.shape, 8, 2).sum(axis=-1).astype(F32) * parts.minimum[..., None]
    else:
        minima = -(parts.minima.astype(F32) * parts.minimum[..., None]) * sums.astype(F32)
    return fma(values, unit, _first_lanes(minima))


def _iq4_xs_values(blocks: np.ndarray, x: np.ndarray, bias: int) -> np.ndarray:
    flat = blocks.reshape(-1)
    scales = _integers("IQ4_XS", _with(flat, d=1, qs=0))[:, ::32] // -127  # (B, 8); the first value is -127
    weights = _integers("IQ4_XS", _with(flat, d=1))
    wide = np.repeat(scales, 32, axis=1)
    codes = (np.where(wide == 0, 0, weights // np.where(wide == 0, 1, wide)) + bias).reshape(*blocks.shape, 256)
    factors = scales.reshape(*blocks.shape, 8).astype(F32) * blocks["d"].astype(F32)[..., None]
    sums = x.reshape(len(x), 8, 32).sum(axis=-1).astype(F32)
    return _chunks(codes * x, np.repeat(factors, 2, axis=-1), _first_lanes(factors * sums) * F32(-bias))


_ONE = {  # the scales' fields of the trellis types with scales of one
    "IQ1_KT": {"sh": lambda sh: sh & 0xF0 | 8},
    "IQ2_KT": {"scales": 0x88},
    "IQ4_KT": {"qs": lambda words: words & ~np.uint32(0xFE) | np.uint32(65 << 1)},
}


def _trellis_values(name: str, blocks: np.ndarray, x: np.ndarray, bias: int) -> np.ndarray:
    """Codes are 126 higher where the product wants them unsigned; scales follow from the largest weight of a group."""
    flat, offset = blocks.reshape(-1), 126 if bias else 0
    codes, weights = (_integers(name, b).reshape(-1, 8, 32) for b in (_with(flat, **_ONE[name]), flat))
    largest = np.abs(codes).argmax(axis=2)[..., None]
    scales = np.take_along_axis(weights, largest, 2) // np.take_along_axis(codes, largest, 2)
    assert (codes * scales == weights).all(), name
    factors = scales.reshape(*blocks.shape, 8).astype(F32)
    sums = x.reshape(len(x), 8, 32).sum(axis=-1).astype(F32)
    codes = codes.reshape(*blocks.shape, 256) + offset
    return _chunks(codes * x, np.repeat(factors, 2, axis=-1), _first_lanes(factors * sums) * F32(-offset))


def _chunks(products: np.ndarray, scales: np.ndarray, values: np.ndarray, lanes: Callable = _by_lanes) -> np.ndarray:
    """values + the products (..., 256) of each chunk times the scale of each 16, chunk after chunk -> (..., 16)."""
    totals = lanes(products).astype(F32)
    for chunk in range(4):
        spread = np.repeat(scales[..., 4 * chunk : 4 * chunk + 4], 4, axis=-1)
        values = fma(totals[..., chunk, :], spread, values)
    return values


def _by_fours(products: np.ndarray) -> np.ndarray:
    """(..., 256) -> (..., 4, 16) where a lane has every fourth of 16."""
    quads = products.reshape(*products.shape[:-1], 4, 4, 4, 4)  # chunks, 16 each, which of a lane, lane
    return quads.sum(axis=-2).reshape(*products.shape[:-1], 4, LANES)


_OFFSETS = {"Q4_0": 8, "Q5_0": 16, "MXFP4": 16, "NVFP4": 16, "Q1_0": 1, "Q2_0": 1, "LITE2_128": 1, "Q4_1": 0, "Q5_1": 0}


def _padded(array: np.ndarray, count: int) -> np.ndarray:
    """`count` zeros behind the last axis."""
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, count)])


def _block_values(name: str, blocks: np.ndarray, x: np.ndarray, x_scales: np.ndarray, bias: int) -> np.ndarray:
    """(N, B) blocks of 32 and more, int64 (K,), float32 (K / 32,) -> float32 (N, spans of 256, 16)."""
    layout, flat = BY_NAME[name], blocks.reshape(-1)
    offset = _OFFSETS.get(name, bias)
    if name == "MXFP4":
        weights, d = (
            _integers(name, _with(flat, e=128)),
            np.exp2(flat["e"].astype(np.float64) - 128).astype(F32)[:, None],
        )
    elif name == "NVFP4":
        weights = _integers(name, _with(flat, d=0x40))  # 1.0 where the values are doubled
        d = dequantize(_with(flat, qs=0x11).view(np.uint8).reshape(len(flat), -1), name)[:, ::16]
    else:
        weights = _integers(name, _with(flat, d=1, **({"m": 0} if "m" in flat.dtype.names else {})))
        d = flat["d"].astype(F32)[:, None]
    per_scale = 16 if name == "NVFP4" else 32
    d = np.repeat(d, layout.block_size // per_scale // d.shape[1], axis=1).reshape(len(blocks), -1)
    rest = -len(x) % 256
    codes = _padded(weights.reshape(len(blocks), -1) + offset, rest).reshape(len(blocks), -1, 256)
    x, x_scales = _padded(x, rest).reshape(-1, 256), _padded(x_scales, rest // 32)
    d = _padded(d, rest // per_scale)
    sums = x.reshape(len(x), -1, per_scale).sum(axis=-1).astype(F32)  # (spans, 8 or 16)
    if name == "NVFP4":
        scales = (d * np.repeat(x_scales, 2)).reshape(len(blocks), -1, 16)
        return _chunks(codes * x, scales, scales * sums * F32(-offset))
    scales, steps = (d * x_scales).reshape(len(blocks), -1, 8), x_scales.reshape(-1, 8)
    if "m" in flat.dtype.names:
        m = _padded(flat["m"].astype(F32).reshape(len(blocks), -1), rest // 32).reshape(scales.shape)
        values = _first_lanes(m * (steps * sums))
    else:
        values = _first_lanes(scales * sums) * F32(-offset)
    return _chunks(codes * x, np.repeat(scales, 2, axis=-1), values, _by_fours if name == "Q2_0" else _by_lanes)


def product(name: str, data: np.ndarray, x: np.ndarray, row_lanes: int, bias: int) -> np.ndarray:
    """uint8 (N, row_bytes), float32 (T, K) -> float32 (T, N). row_lanes, bias: of the CPU (`native.isa.SumOrder`)."""
    layout, kind = BY_NAME[name], activation_kind(name)
    with np.errstate(all="ignore"):
        return np.stack([_row_sums(name, layout, data, row, kind, row_lanes, bias) for row in x])


def _row_sums(name, layout, data, x, kind, row_lanes, bias) -> np.ndarray:
    if kind == 0:
        weights = dequantize(data, name).reshape(len(data), -1, LANES)
        acc = np.zeros((len(data), LANES), F32)
        for i, part in enumerate(x.reshape(-1, LANES)):
            acc = fma(weights[:, i], part, acc)
        return lanes_summed(acc)
    codes, scales = quantize_activations(x[None], kind)
    codes, scales = codes[0].astype(np.int64), scales[0]
    blocks = layout.blocks(data)
    if kind == 32:
        values = _block_values(name, blocks, codes, scales, bias)
        acc = np.zeros((len(data), LANES), F32)
        for span in range(values.shape[1]):
            acc = acc + values[:, span]
        return lanes_summed(acc)
    rows = codes.reshape(-1, 256)
    if name == "IQ4_XS":
        values = _iq4_xs_values(blocks, rows, bias)
    elif name in two_tables.VALUES:
        values = _two_tables_values(name, data, rows, bias)
    elif name in _ONE:
        values = _trellis_values(name, blocks, rows, bias)
    else:
        values = _super_values(name, blocks, rows)
    if row_lanes == 8:
        values = values[..., :8] + values[..., 8:]
    acc = np.zeros((len(data), row_lanes), F32)
    for b in range(values.shape[1]):
        acc = fma(values[:, b], scales[b], acc)
    total = lanes_summed(acc)
    return total * layout.row_scales(data).astype(F32) if layout.row_scale else total


def exp(x: np.ndarray) -> np.ndarray:
    """e^x as 2^n e^r: `native.cpu.vector_math`'s rule, with coefficients as Cephes has them (Moshier, expf.c)."""
    x = np.clip(x, F32(-87), F32(88))  # NaN stays NaN
    n = np.rint(x * F32(1.44269504))
    r = fma(n, F32(-1.42860677e-06), fma(n, F32(-0.693145752), x))
    p = np.full_like(x, 1.9875691e-4)
    for coefficient in (1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 1.6666666e-1, 0.5):
        p = fma(p, r, F32(coefficient))
    with np.errstate(invalid="ignore"):
        return np.ldexp(fma(p, r * r, r) + F32(1), np.nan_to_num(n).astype(np.int32))


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, float32."""
    with np.errstate(all="ignore"):
        return gate / (exp(-gate) + F32(1)) * up


class Weights(NamedTuple):
    """A matrix of an expert: a type's name and uint8 (rows, row_bytes)."""

    name: str
    data: np.ndarray


def expert(x: np.ndarray, gate: Weights, up: Weights, down: Weights, row_lanes: int, bias: int) -> np.ndarray:
    """float32 (T, D) -> (T, N): down(silu(gate x) * up x)."""
    order = (row_lanes, bias)
    hidden = swiglu(product(*gate, x, *order), product(*up, x, *order))
    return product(*down, hidden, *order)
